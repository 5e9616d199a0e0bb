//! The documents for people who change the code: what they name exists.

use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const FOLDERS: [&str; 9] = [
    "src",
    "tests",
    "benches",
    "fuzz",
    "schema",
    "templates",
    "deploy",
    "docs",
    "scripts",
];

/// The paths of all files, relative to the repository.
fn files() -> Vec<String> {
    let mut folders: Vec<PathBuf> = FOLDERS.map(|folder| Path::new(ROOT).join(folder)).into();
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if !path.is_dir() {
                files.push(path.strip_prefix(ROOT).unwrap().to_str().unwrap().to_owned());
            } else if path.file_name().unwrap() != "target" {
                folders.push(path);
            }
        }
    }
    files
}

fn document(name: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join(name)).unwrap()
}

/// The texts between backticks, without those of code blocks.
fn code(document: &str) -> Vec<String> {
    let prose = document.split("```").step_by(2);
    let code = prose.flat_map(|prose| prose.split('`').skip(1).step_by(2));
    code.map(str::to_owned).collect()
}

#[test]
fn every_file_that_is_named_exists() {
    let files = files();
    let exists = |path: &str| {
        let ends = [path.to_owned(), format!("{path}.rs")].map(|path| format!("/{path}"));
        Path::new(ROOT).join(path).exists()
            || files.iter().any(|file| {
                let file = format!("/{file}");
                ends.iter().any(|end| file.ends_with(end)) || path.ends_with('/') && file.contains(&ends[0])
            })
    };
    for name in ["ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let is_path = |text: &String| {
            let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
            text.chars().all(is_plain) && (text.contains('/') || text.ends_with(".rs"))
        };
        let missing: Vec<String> = code(&document(name)).into_iter().filter(is_path).collect();
        assert!(missing.len() > 20, "{name} names files");
        let missing: Vec<String> = missing.into_iter().filter(|path| !exists(path)).collect();
        assert!(missing.is_empty(), "{name}: {missing:?}");
    }
    for name in ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"] {
        let document = document(name);
        let links = document
            .split("](")
            .skip(1)
            .filter_map(|link| link.split(')').next());
        for link in links.filter(|link| !link.contains("://") && !link.starts_with('#')) {
            let path = link.split('#').next().unwrap();
            assert!(Path::new(ROOT).join(path).exists(), "{name}: {link}");
        }
    }
}

#[test]
fn every_function_that_is_named_exists() {
    let sources: String = files()
        .iter()
        .filter(|file| file.ends_with(".rs"))
        .map(|file| document(file))
        .collect();
    let is_word = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    for name in ["ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let code = code(&document(name));
        // `module::function`, and the sentences that are the names of tests.
        let functions = code.iter().filter(|text| text.split("::").all(is_word));
        let functions = functions.filter(|text| text.contains("::") || text.matches('_').count() > 3);
        for function in functions {
            let last = function.rsplit("::").next().unwrap();
            let exists = ["fn", "const"]
                .iter()
                .any(|kind| sources.contains(&format!("{kind} {last}")));
            assert!(exists, "{name}: {function}");
        }
    }
}

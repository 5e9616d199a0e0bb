//! The documents: every message that they explain is in the program, every link leads somewhere, and every file and function that
//! they name for developers exists. `tests/e2e/docs.rs` runs the commands.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{CommandFactory, Parser};
use host_metrics::cli::Cli;
use host_metrics::config::NAMES;
use host_metrics::produce::host_file;
use host_metrics::sample::{Field, Outcome};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|own| own == extension) {
            found.push(path);
        }
    }
    found
}

/// The text with the line breaks of long literals removed.
fn joined(source: &str) -> String {
    let mut lines = source.split("\\\n");
    let first = lines.next().unwrap_or_default().to_owned();
    lines.fold(first, |text, line| text + line.trim_start())
}

#[test]
fn every_explained_message_is_in_the_program() {
    let sources: String = files(&root().join("src"), "rs")
        .iter()
        .map(|path| joined(&fs::read_to_string(path).unwrap()))
        .collect();
    let page = fs::read_to_string(root().join("docs/troubleshooting.md")).unwrap();
    let messages: Vec<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .collect();
    assert!(messages.len() > 10);
    for message in messages {
        let message = message.trim_matches('`');
        assert!(sources.contains(message), "{message}");
    }
}

#[test]
fn the_reference_has_every_command_variable_option_field_and_outcome() {
    let commands = Cli::command();
    let commands = commands
        .get_subcommands()
        .filter(|command| !command.is_hide_set());
    let commands = commands.map(|command| format!("host-metrics {}", command.get_name()));
    let outcomes = Outcome::ALL
        .iter()
        .map(|outcome| format!("`{}`", outcome.as_str()));
    let fields = Field::ALL.iter().map(|field| format!("`{}`", field.name()));
    // The suffix _FILE is explained once for all variables.
    let variables = NAMES
        .iter()
        .filter(|name| !name.ends_with("_FILE") || !NAMES.contains(&name.trim_end_matches("_FILE")));
    let options = host_file::OPTION_NAMES.map(|name| format!("`{name}="));
    let pages: [(&str, Vec<String>); 4] = [
        ("commands", commands.collect()),
        ("record", outcomes.chain(fields).collect()),
        ("variables", variables.map(|name| (*name).to_owned()).collect()),
        ("host-file", options.into()),
    ];
    for (page, words) in pages {
        let path = root().join("docs/reference").join(page).with_extension("md");
        let text = fs::read_to_string(path).unwrap();
        let missing: Vec<_> = words.iter().filter(|word| !text.contains(*word)).collect();
        assert!(missing.is_empty(), "{page}: {missing:?}");
    }
}

/// The pages for users.
fn pages() -> Vec<PathBuf> {
    let mut pages = files(&root().join("docs"), "md");
    pages.extend(files(&root().join("deploy"), "md"));
    pages.push(root().join("README.md"));
    pages
}

/// The words of a command, up to a comment or what a shell does with its result.
fn words(command: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for char in command.chars() {
        match (quote, char) {
            (Some(open), _) if open == char => quote = None,
            (None, '\'' | '"') => quote = Some(char),
            (None, '#' | '>' | '&' | '|' | ';') => break,
            (None, ' ') => words.extend(word.take()),
            _ => word.get_or_insert_default().push(char),
        }
    }
    words.extend(word);
    words
}

#[test]
fn every_command_that_the_documents_and_the_help_show_can_be_typed() {
    let cli = Cli::command();
    let nested = cli.get_subcommands().flat_map(clap::Command::get_subcommands);
    let mut lines: Vec<String> = Vec::new();
    for command in cli.get_subcommands().chain(nested) {
        let help = command
            .get_after_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        let examples = help.lines().filter_map(|line| line.strip_prefix("  "));
        let before = lines.len();
        lines.extend(examples.map(str::to_owned));
        assert!(lines.len() > before, "{} has no example", command.get_name());
    }
    for page in pages() {
        let mut is_fenced = false;
        for line in fs::read_to_string(&page).unwrap().lines() {
            is_fenced ^= line.starts_with("```");
            if is_fenced || line.starts_with("    ") {
                lines.push(line.trim().trim_start_matches("until ").to_owned());
            }
        }
    }
    let makefile = fs::read_to_string(root().join("Makefile")).unwrap();
    let mut typed = 0;
    for line in lines {
        if line.starts_with("host-metrics ") {
            if let Err(error) = Cli::try_parse_from(words(&line)) {
                panic!("{line}: {error}");
            }
            typed += 1;
        } else if let Some(target) = line.strip_prefix("make ").and_then(|rest| rest.split(' ').next()) {
            assert!(makefile.contains(&format!("\n{target}: ")), "{line}");
            typed += 1;
        }
    }
    assert!(typed > 60, "{typed}");
}

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = kept.replace(|char: char| !char.is_alphanumeric() && !" -_".contains(char), "");
    kept.replace(' ', "-")
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    let mut pages = files(&root().join("docs"), "md");
    pages.extend(
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(|page| root().join(page)),
    );
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match path {
                "" => page.clone(),
                path => page.parent().unwrap().join(path),
            };
            assert!(target.exists(), "{}: {link}", page.display());
            if !heading.is_empty() {
                let text = fs::read_to_string(&target).unwrap();
                let has = text
                    .lines()
                    .any(|line| line.starts_with('#') && anchor(line) == heading);
                assert!(has, "{}: {link}", page.display());
            }
        }
    }
}

/// The texts between backticks in the documents for developers, without those of code blocks.
fn code() -> Vec<String> {
    let pages =
        ["ARCHITECTURE.md", "CONTRIBUTING.md"].map(|page| fs::read_to_string(root().join(page)).unwrap());
    let prose = pages.iter().flat_map(|page| page.split("```").step_by(2));
    let code = prose.flat_map(|prose| prose.split('`').skip(1).step_by(2));
    code.map(str::to_owned).collect()
}

fn sources() -> Vec<PathBuf> {
    let folders = ["src", "tests", "benches", "fuzz/fuzz_targets"];
    folders
        .iter()
        .flat_map(|folder| files(&root().join(folder), "rs"))
        .collect()
}

#[test]
fn every_file_that_the_documents_for_developers_name_exists() {
    let sources = sources();
    // A path may leave out its beginning and the ending `.rs`.
    let exists = |path: &str| {
        let folder = Path::new("src").join(path);
        root().join(path).exists()
            || root().join(folder).exists()
            || sources.iter().any(|source| {
                let parts = [
                    source.clone(),
                    source.with_extension(""),
                    source.parent().unwrap().into(),
                ];
                parts.iter().any(|part| part.ends_with(path))
            })
    };
    let is_path = |text: &String| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
        text.chars().all(is_plain) && (text.contains('/') || text.ends_with(".rs"))
    };
    let named: Vec<String> = code().into_iter().filter(is_path).collect();
    assert!(named.len() > 50);
    let missing: Vec<&String> = named.iter().filter(|path| !exists(path)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_function_that_the_documents_for_developers_name_exists() {
    let sources: String = sources()
        .iter()
        .map(|source| fs::read_to_string(source).unwrap())
        .collect();
    let is_word = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    // `Type::function`, and the sentences that are the names of tests.
    let is_function = |text: &&String| {
        text.split("::").all(is_word) && (text.contains("::") || text.matches('_').count() > 3)
    };
    for function in code().iter().filter(is_function) {
        let last = function.rsplit("::").next().unwrap();
        let exists = ["fn", "const"]
            .iter()
            .any(|kind| sources.contains(&format!("{kind} {last}")));
        assert!(exists, "{function}");
    }
}

//! The build script: the commit that it sets, and the files that make cargo run it again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

#[expect(dead_code, clippy::print_stdout, reason = "its main is cargo's")]
#[path = "../../build.rs"]
mod build;

fn git(directory: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git")
        .arg("-C")
        .arg(directory)
        .args(["-c", "user.name=test", "-c", "user.email=test@example.com"])
        .args([
            "-c",
            "commit.gpgsign=false",
            "-c",
            "init.defaultBranch=some/branch",
        ])
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn commit(directory: &Path) -> String {
    git(directory, &["add", "--all"]);
    git(directory, &["commit", "--quiet", "--message", "x"]);
    git(directory, &["rev-parse", "--short=12", "HEAD"])
}

/// A directory with a minimal package.
fn package() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("src")).unwrap();
    for name in ["Cargo.toml", "README.md", "src/main.rs"] {
        fs::write(directory.path().join(name), "one").unwrap();
    }
    directory
}

#[test]
fn the_revision_is_the_commit_and_dirty_only_with_other_sources() {
    let package = package();
    let package = package.path();
    assert_eq!(build::revision(package), None, "no repository");
    git(package, &["init", "--quiet"]);
    assert_eq!(build::revision(package), None, "no commit");
    let first = commit(package);
    assert_eq!(build::revision(package), Some(first.clone()));
    fs::write(package.join("README.md"), "two").unwrap();
    assert_eq!(build::revision(package), Some(first.clone()), "not a source");
    for (file, before) in [("src/main.rs", "one"), ("Cargo.toml", "one")] {
        fs::write(package.join(file), "two").unwrap();
        assert_eq!(build::revision(package), Some(format!("{first}-dirty")), "{file}");
        fs::write(package.join(file), before).unwrap();
    }
    fs::write(package.join("src/new.rs"), "").unwrap();
    assert_eq!(
        build::revision(package),
        Some(format!("{first}-dirty")),
        "a new source"
    );
    let second = commit(package);
    assert_eq!(build::revision(package), Some(second));
    assert_eq!(
        build::revision(&package.join("src")),
        None,
        "somebody else's repository"
    );
}

#[test]
fn the_watched_files_exist_and_change_with_every_commit() {
    let package = package();
    let package = package.path();
    let contents = |directory: &Path| -> Vec<_> {
        let watched = build::watched(directory);
        let missing = watched.iter().find(|path| !path.exists());
        assert_eq!(missing, None, "cargo would build it each time");
        watched
            .into_iter()
            .map(|path| (fs::read(&path).ok(), path))
            .collect()
    };
    assert_eq!(contents(package).len(), 2, "Cargo.toml and src");
    git(package, &["init", "--quiet"]);
    commit(package);
    let before = contents(package);
    fs::write(package.join("README.md"), "two").unwrap();
    commit(package);
    let after = contents(package);
    assert_ne!(before, after);

    // The branch is now a line of packed-refs, and its directory is gone.
    git(package, &["pack-refs", "--all"]);
    let packed = contents(package);
    assert!(
        packed.iter().any(|(_, path)| path.ends_with("packed-refs")),
        "{packed:?}"
    );
    let heads = packed.iter().find(|(_, path)| path.ends_with("refs/heads"));
    assert!(heads.is_some(), "{packed:?}");
    let branch = package.join(".git/refs/heads/some/branch");
    assert!(!branch.exists());
    fs::write(package.join("README.md"), "three").unwrap();
    commit(package);
    assert!(branch.exists(), "in a directory that is watched");

    // In a linked worktree, HEAD and the branch are in different directories.
    let other = package.with_extension("worktree");
    git(
        package,
        &[
            "worktree",
            "add",
            "--quiet",
            "-b",
            "other",
            other.to_str().unwrap(),
        ],
    );
    let paths: Vec<_> = contents(&other).into_iter().map(|(_, path)| path).collect();
    let own_head = |path: &PathBuf| {
        path.ends_with("HEAD") && path.components().any(|part| part.as_os_str() == "worktrees")
    };
    assert!(paths.iter().any(own_head), "{paths:?}");
    assert!(
        paths.iter().any(|path| path.ends_with("refs/heads/other")),
        "{paths:?}"
    );
    assert_eq!(build::revision(&other), build::revision(package));
    fs::remove_dir_all(&other).unwrap();
}

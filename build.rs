//! Sets HOST_METRICS_REVISION, the commit that the program is built from: from the environment, or else from git.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The files that the program is built from. Changes in other files do not make it `-dirty`.
const SOURCES: [&str; 5] = ["Cargo.toml", "Cargo.lock", "build.rs", "schema", "src"];

#[expect(
    clippy::disallowed_methods,
    reason = "cargo passes its arguments to a build script in variables"
)]
fn main() {
    println!("cargo::rerun-if-env-changed=HOST_METRICS_REVISION");
    let given = env::var("HOST_METRICS_REVISION").unwrap_or_default();
    let directory = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    for path in watched(&directory) {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    if let Some(revision) = Some(given)
        .filter(|given| !given.is_empty())
        .or_else(|| revision(&directory))
    {
        println!("cargo::rustc-env=HOST_METRICS_REVISION={revision}");
    }
}

/// The commit, with `-dirty` if the sources have changed since. `None` without git, and if the directory is not the root of a
/// repository, such as a release that was unpacked inside another repository.
pub fn revision(directory: &Path) -> Option<String> {
    let top = PathBuf::from(git(directory, &["rev-parse", "--show-toplevel"])?);
    if top.canonicalize().ok()? != directory.canonicalize().ok()? {
        return None;
    }
    let commit = git(directory, &["rev-parse", "--short=12", "HEAD"])?;
    let status = [&["status", "--porcelain", "--"], &SOURCES[..]].concat();
    let is_dirty = !git(directory, &status)?.is_empty();
    Some(if is_dirty {
        format!("{commit}-dirty")
    } else {
        commit
    })
}

/// The files that decide the revision. Only those that exist, because cargo runs a build script every time if a watched
/// path does not exist.
pub fn watched(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = SOURCES.iter().map(|source| directory.join(source)).collect();
    let git_path = |name: &str| Some(directory.join(git(directory, &["rev-parse", "--git-path", name])?));
    paths.extend(git_path("HEAD"));
    // A branch is a file, or a line of packed-refs until its next commit. That commit creates the file, perhaps in a new
    // directory.
    if let Some(branch) = git(directory, &["symbolic-ref", "--quiet", "HEAD"]) {
        let file = git_path(&branch);
        let nearest = file
            .as_deref()
            .and_then(|file| file.ancestors().find(|path| path.exists()));
        paths.extend(nearest.map(Path::to_path_buf));
        paths.extend(git_path("packed-refs"));
    }
    paths.retain(|path| path.exists());
    paths
}

fn git(directory: &Path, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new("git");
    // Otherwise `git status` would write the index, which may disturb another git command.
    command
        .arg("--no-optional-locks")
        .arg("-C")
        .arg(directory)
        .args(arguments);
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

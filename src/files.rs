//! Reads small files that users name: only regular files, and only up to a limit.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

pub(crate) fn read(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    // Opening a pipe would wait for its writer, and a second read would find it empty.
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    read_bounded(File::open(path)?, max_bytes)
}

/// Reads to the end, which has to come within the limit.
pub(crate) fn read_bounded(from: impl Read, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut contents = Vec::new();
    from.take(max_bytes + 1).read_to_end(&mut contents)?;
    if contents.len() as u64 > max_bytes {
        return Err(io::Error::other(format!("it is longer than {max_bytes} bytes")));
    }
    Ok(contents)
}

/// The permissions of a file that every user of the machine can read.
pub(crate) fn mode_if_exposed(path: &Path) -> Option<u32> {
    let mode = path.metadata().ok()?.permissions().mode() & 0o7777;
    (mode & 0o004 != 0).then_some(mode)
}

/// Tells two states of a file apart: which file it is, its size, and when it was changed.
pub(crate) type FileState = (u64, u64, u64, i64, i64);

/// The file's state; `None` if there is no such file. Follows symbolic links, which Kubernetes switches.
pub(crate) fn state(path: &Path) -> Option<FileState> {
    let file = path.metadata().ok()?;
    Some((
        file.dev(),
        file.ino(),
        file.len(),
        file.ctime(),
        file.ctime_nsec(),
    ))
}

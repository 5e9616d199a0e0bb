//! The operating system's limits for this process: open files and threads.
//!
//! Raises the limit of open files, lowers MAX_THREADS to what it allows, and warns where the limits are too low.

use std::fs;
use std::path::Path;

use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};

use crate::terminal::counted;

/// Open files that the checks do not use: connections to Kafka, requests for metrics, the program's own files.
pub const OTHER_FILES: u64 = 64;

/// Threads that do not check: librdkafka's and our own.
const OTHER_THREADS: u64 = 32;

/// The limits; `None` if there is no limit, or it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub files: Option<u64>,
    /// The lower one of RLIMIT_NPROC and what the control group leaves.
    pub threads: Option<u64>,
}

/// Raises the soft limit of open files to the hard limit. Every check needs a file, and the soft limit is usually 1024, for
/// the sake of old programs that use select().
///
/// If a seccomp filter forbids this, the limit stays, and [`warnings`] reports whether it is enough.
pub fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::debug!("cannot raise the limit of open files from {limit:?}: {error}");
    }
}

/// The limits as they are now.
pub fn current() -> Limits {
    // The kernel does not apply it to root.
    let of_user = getrlimit(Resource::Nproc)
        .current
        .filter(|_| !geteuid().is_root());
    let of_group = fs::read_to_string("/proc/self/cgroup")
        .ok()
        .and_then(|groups| pids_left(&groups, Path::new("/sys/fs/cgroup")));
    Limits {
        files: getrlimit(Resource::Nofile).current,
        threads: of_user.into_iter().chain(of_group).min(),
    }
}

/// How many of `checks` may run at the same time so that the rest of the program keeps the files that it needs: a client of
/// librdkafka that finds none while it connects may not try again for minutes.
pub fn checks_that_fit(limits: Limits, checks: usize) -> usize {
    let fit = limits.files.map_or(u64::MAX, fits_open_files);
    checks.min(usize::try_from(fit).unwrap_or(usize::MAX))
}

/// How many checks fit into a limit of open files. If it is very low, half of it is for the checks.
fn fits_open_files(limit: u64) -> u64 {
    limit.saturating_sub(OTHER_FILES).max(limit / 2).max(1)
}

/// A line for each limit that this many checks at the same time would exceed; `lookups` of them look up a name.
pub fn warnings(limits: Limits, checks: usize, lookups: usize) -> Vec<String> {
    let (checks, lookups) = (checks as u64, lookups as u64);
    let may_need = format!("{} at the same time may need", counted(checks, "check"));
    let mut warnings = Vec::new();
    let files = checks + OTHER_FILES;
    if let Some(limit) = limits.files.filter(|limit| *limit < files) {
        let fit = fits_open_files(limit);
        warnings.push(format!(
            "{may_need} {files} open files, but this process may have {limit}; at most {fit} run at the same time, and the \
             others wait; raise the limit of open files (ulimit -n, LimitNOFILE= in a systemd unit, --ulimit nofile= for a \
             container), or set MAX_THREADS={fit}"
        ));
    }
    // A name is looked up on its own thread while the check's thread waits.
    let threads = checks + lookups + OTHER_THREADS;
    if let Some(limit) = limits.threads.filter(|limit| *limit < threads) {
        warnings.push(format!(
            "{may_need} {threads} threads, but this process may have {limit}; checks beyond that fail as agent_error; raise \
             the limit (ulimit -u, LimitNPROC= and TasksMax= in a systemd unit, --pids-limit for a container), or lower \
             MAX_THREADS"
        ));
    }
    warnings
}

/// The smallest remainder of `pids.max` in our control group and its ancestors (version 2). `groups` is the text of
/// /proc/self/cgroup.
fn pids_left(groups: &str, root: &Path) -> Option<u64> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // In a container, /proc may show the host's path although the container's own group is mounted as the root.
    Path::new(path)
        .ancestors()
        .filter_map(|group| {
            let group = root.join(group);
            let current = number(&group.join("pids.current")).unwrap_or(0);
            Some(number(&group.join("pids.max"))?.saturating_sub(current))
        })
        .min()
}

/// The number in a file; `None` also for `max`.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_too_low_is_named_with_the_remedy() {
        let enough = Limits {
            files: Some(164),
            threads: Some(232),
        };
        assert_eq!(warnings(enough, 100, 100), [""; 0]);
        assert_eq!(warnings(Limits::default(), 30_000, 30_000), [""; 0]);
        let short = Limits {
            files: Some(163),
            threads: Some(231),
        };
        let lines = warnings(short, 100, 100);
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert_eq!(
            lines[0],
            "100 checks at the same time may need 164 open files, but this process may have 163; at most 99 run at the \
             same time, and the others wait; raise the limit of open files (ulimit -n, LimitNOFILE= in a systemd unit, --ulimit nofile= for \
             a container), or set MAX_THREADS=99"
        );
        assert!(
            lines[1].contains("232 threads, but this process may have 231;"),
            "{lines:?}"
        );
        assert!(lines[1].ends_with("or lower MAX_THREADS"), "{lines:?}");
        assert_eq!(warnings(short, 99, 0), [""; 0]);
    }

    #[test]
    fn the_checks_leave_open_files_to_the_rest_of_the_program() {
        let fit = |files| {
            checks_that_fit(
                Limits {
                    files,
                    ..Limits::default()
                },
                100,
            )
        };
        assert_eq!(fit(None), 100);
        assert_eq!(fit(Some(u64::MAX)), 100);
        assert_eq!(fit(Some(164)), 100);
        assert_eq!(fit(Some(163)), 99);
        assert_eq!(fit(Some(60)), 30);
        assert_eq!(fit(Some(0)), 1);
    }

    #[test]
    fn the_lowest_limit_of_the_group_and_its_ancestors_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |file: &str, contents: &str| {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        };
        let left = |groups: &str| pids_left(groups, root.path());
        assert_eq!(left(""), None);
        assert_eq!(left("0::/\n"), None);
        write("system.slice/me.service/pids.max", "max\n");
        assert_eq!(left("0::/system.slice/me.service\n"), None);
        write("system.slice/me.service/pids.max", "500\n");
        write("system.slice/me.service/pids.current", "100\n");
        write("system.slice/pids.max", "300\n");
        write("system.slice/pids.current", "250\n");
        assert_eq!(left("0::/system.slice/me.service\n"), Some(50));
        // A container's own group, seen as the root.
        write("pids.max", "20\n");
        assert_eq!(left("0::/docker/0123\n"), Some(20));
    }
}

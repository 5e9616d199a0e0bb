//! The operating system's limits for this process: open files and threads.
//!
//! Raises the limit of open files, lowers MAX_THREADS to what it allows, and warns where the limits are too low.

use std::fs;
use std::path::{Path, PathBuf};

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
    /// RLIMIT_NPROC, for all processes of this user together.
    pub threads_of_user: Option<u64>,
    /// The kernel's limit, for all processes together.
    pub threads_of_kernel: Option<u64>,
    /// What the control group leaves: pids.max minus the threads that already run in it.
    pub threads_of_cgroup: Option<u64>,
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
    Limits {
        files: getrlimit(Resource::Nofile).current,
        // The kernel does not apply it to root.
        threads_of_user: getrlimit(Resource::Nproc)
            .current
            .filter(|_| !geteuid().is_root()),
        threads_of_kernel: ["threads-max", "pid_max"]
            .into_iter()
            .filter_map(|name| number(&Path::new("/proc/sys/kernel").join(name)))
            .min(),
        threads_of_cgroup: fs::read_to_string("/proc/self/cgroup")
            .ok()
            .and_then(|groups| pids_left(&groups, Path::new("/sys/fs/cgroup"))),
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
    let files = Need {
        what: "open files",
        count: checks + OTHER_FILES,
        fits: fits_open_files,
        otherwise: |fits| format!("at most {fits} run at the same time, and the others wait"),
    };
    // A name is looked up on its own thread while the check's thread waits.
    let threads = Need {
        what: "threads",
        count: checks + lookups + OTHER_THREADS,
        fits: if lookups == 0 {
            |limit| limit.saturating_sub(OTHER_THREADS)
        } else {
            |limit| limit.saturating_sub(OTHER_THREADS) / 2
        },
        otherwise: |_| "checks beyond that fail as agent_error".to_owned(),
    };
    [
        files.warning(
            checks,
            limits.files,
            "this process may have",
            "the limit of open files (ulimit -n, LimitNOFILE= in a systemd unit, --ulimit nofile= for a container)",
        ),
        threads.warning(
            checks,
            limits.threads_of_user,
            "this user may have",
            "the limit of processes (ulimit -u, LimitNPROC= in a systemd unit)",
        ),
        threads.warning(
            checks,
            limits.threads_of_kernel,
            "this machine may have",
            "kernel.threads-max and kernel.pid_max (sysctl)",
        ),
        threads.warning(
            checks,
            limits.threads_of_cgroup,
            "the control group leaves",
            "pids.max of the control group (TasksMax= in a systemd unit, --pids-limit for a container)",
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

struct Need {
    what: &'static str,
    count: u64,
    /// How many checks fit into a limit.
    fits: fn(u64) -> u64,
    /// What happens to the checks that do not fit, if this many do.
    otherwise: fn(u64) -> String,
}

impl Need {
    fn warning(&self, checks: u64, limit: Option<u64>, who: &str, knob: &str) -> Option<String> {
        let limit = limit.filter(|limit| *limit < self.count)?;
        let fits = (self.fits)(limit);
        let lower = match fits {
            0 => "lower MAX_THREADS".to_owned(),
            fits => format!("set MAX_THREADS={fits}"),
        };
        Some(format!(
            "{} at the same time may need {} {what}, but {who} {limit}; {}; raise {knob}, or \
             {lower}",
            counted(checks, "check"),
            self.count,
            (self.otherwise)(fits),
            what = self.what
        ))
    }
}

/// The smallest remainder of `pids.max` in our control group and its ancestors. `groups` is the text of /proc/self/cgroup.
fn pids_left(groups: &str, mounted_at: &Path) -> Option<u64> {
    let group = groups.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        // Version 1 has a hierarchy for pids alone; version 2 has one for everything: `0::/path`.
        match controllers.split(',').any(|controller| controller == "pids") {
            true => Some((mounted_at.join("pids"), path)),
            false => None,
        }
    });
    let version_2 = || {
        let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
        Some((mounted_at.to_owned(), path))
    };
    let (root, path) = group.or_else(version_2)?;
    // In a container, /proc may show the host's path although the container's own group is mounted as the root.
    let path = PathBuf::from(path.trim_start_matches('/'));
    path.ancestors()
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
            threads_of_user: Some(232),
            threads_of_kernel: Some(232),
            threads_of_cgroup: Some(232),
        };
        assert_eq!(warnings(enough, 100, 100), [""; 0]);
        assert_eq!(warnings(Limits::default(), 30_000, 30_000), [""; 0]);
        let short = Limits {
            files: Some(163),
            threads_of_user: Some(231),
            threads_of_kernel: Some(232),
            threads_of_cgroup: Some(10),
        };
        let lines = warnings(short, 100, 100);
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert_eq!(
            lines[0],
            "100 checks at the same time may need 164 open files, but this process may have 163; at most 99 run at the \
             same time, and the others wait; raise the limit of open files (ulimit -n, LimitNOFILE= in a systemd unit, --ulimit nofile= for \
             a container), or set MAX_THREADS=99"
        );
        assert!(
            lines[1].contains("232 threads, but this user may have 231;"),
            "{lines:?}"
        );
        assert!(lines[1].ends_with("or set MAX_THREADS=99"), "{lines:?}");
        assert!(lines[2].contains("the control group leaves 10;"), "{lines:?}");
        assert!(lines[2].ends_with("or lower MAX_THREADS"), "{lines:?}");
        assert_eq!(warnings(short, 99, 0).len(), 1);
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
        write("pids/docker/0123/pids.max", "7\n");
        assert_eq!(left("5:cpu,pids:/docker/0123\n1:name=systemd:/\n0::/\n"), Some(7));
    }
}

//! One directory and the child processes of the tests. None of them remains after the test run.
//!
//! A shell reads from a pipe that only this process holds open. However this process ends, the pipe is closed. The shell then
//! kills the registered child processes (a file for each process ID) and removes the directory.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const GUARD: &str = r#"
while read -r _; do :; done
for file in "$1"/processes/*; do kill -KILL "${file##*/}"; done 2>/dev/null
rm -rf -- "$1" || { sleep 1; rm -rf -- "$1"; }
"#;

struct Scratch {
    directory: PathBuf,
    // Its standard input is the pipe.
    _guard: Child,
}

fn scratch() -> &'static Scratch {
    static SCRATCH: OnceLock<Scratch> = OnceLock::new();
    SCRATCH.get_or_init(|| {
        let directory = tempfile::Builder::new()
            .prefix("host-metrics-e2e-")
            .tempdir()
            .unwrap()
            .keep();
        fs::create_dir(directory.join("processes")).unwrap();
        let guard = Command::new("/bin/sh")
            .args(["-c", GUARD, "host-metrics-e2e-guard"])
            .arg(&directory)
            // Ctrl-C in a terminal must end the tests, and not the shell that cleans up.
            .process_group(0)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        Scratch {
            directory,
            _guard: guard,
        }
    })
}

/// A new, empty directory.
pub fn directory(name: &str) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let path = scratch()
        .directory
        .join(format!("{name}-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir(&path).unwrap();
    path
}

/// A child process. It is killed when this is dropped, and whenever this process ends.
pub struct Process {
    child: Child,
    registered: PathBuf,
}

impl Process {
    pub fn start(command: &mut Command) -> Self {
        let processes = scratch().directory.join("processes");
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
        let registered = processes.join(child.id().to_string());
        fs::write(&registered, "").unwrap();
        Self { child, registered }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by its name without SIG, e.g. `TERM`.
    pub fn signal(&self, name: &str) {
        // It has not been waited for, so no other process can have its ID.
        let status = Command::new("kill")
            .arg(format!("-{name}"))
            .arg(self.id().to_string())
            .status()
            .unwrap();
        assert!(status.success(), "kill -{name} of {}", self.id());
    }

    /// Its memory at this moment.
    pub fn resident_bytes(&self) -> u64 {
        let id = self.child.id();
        let kib = match fs::read_to_string(format!("/proc/{id}/status")) {
            Ok(status) => status
                .lines()
                .find_map(|line| {
                    Some(
                        line.strip_prefix("VmRSS:")?
                            .trim_end_matches("kB")
                            .trim()
                            .to_owned(),
                    )
                })
                .expect("a running process has memory"),
            // Only Linux has that file.
            Err(_) => {
                let output = Command::new("ps")
                    .args(["-o", "rss=", "-p", &id.to_string()])
                    .output()
                    .unwrap();
                String::from_utf8_lossy(&output.stdout).trim().to_owned()
            }
        };
        kib.parse::<u64>().unwrap() * 1024
    }

    /// Its largest resident memory so far.
    pub fn peak_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = kib.expect("a running process has memory").trim_end_matches("kB");
        kib.trim().parse::<u64>().unwrap() * 1024
    }

    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Kills it with SIGKILL and waits for its end.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        fs::remove_file(&self.registered).ok();
    }
}

/// The text of the file; empty if it does not exist yet.
pub fn text(path: &std::path::Path) -> String {
    match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => panic!("cannot read {}: {error}", path.display()),
    }
}

/// Waits until `look` returns something, and returns that. Fails after `within` with the text of `explain`.
pub fn wait_for<T>(
    within: Duration,
    what: &str,
    mut look: impl FnMut() -> Option<T>,
    explain: impl FnOnce() -> String,
) -> T {
    let deadline = now() + within;
    loop {
        if let Some(found) = look() {
            return found;
        }
        if now() > deadline {
            panic!("not within {within:?}: {what}\n{}", explain());
        }
        pause(Duration::from_millis(20));
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "tests of real processes live in real time"
)]
pub fn now() -> Instant {
    Instant::now()
}

#[expect(clippy::disallowed_methods, reason = "between two looks at a condition")]
fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

//! Runs a test in a process of its own, with limits, an environment or a network that would disturb the other tests.
//!
//! The test calls [`run`] with its own name and returns. In the new process, [`is_it`] is true and the test does its work.

use std::process::Command;

#[cfg(target_os = "linux")]
use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};

const NAME: &str = "TEST_IN_A_PROCESS_OF_ITS_OWN";

/// Runs this test binary again with only the named test, at the end of the command line `through`.
pub fn run(test: &str, through: &mut Command) {
    let output = through
        .arg(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(NAME, test)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A shell that runs `first` and then executes the arguments that the caller adds.
pub fn shell(first: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("set -e\n{first}\nexec \"$0\" \"$@\"")]);
    shell
}

/// Runs a command as a user whose threads can be limited, unlike root's, and who can still read what root can read.
#[cfg(target_os = "linux")]
pub fn limitable() -> Command {
    if !geteuid().is_root() {
        return Command::new("env");
    }
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=61234", "--regid=61234", "--clear-groups"])
        .args([
            "--inh-caps=-all,+dac_override",
            "--ambient-caps=-all,+dac_override",
        ]);
    command
}

/// Until it is dropped, this process's user can start no thread and no process.
#[cfg(target_os = "linux")]
pub struct NoThreads(Rlimit);

#[cfg(target_os = "linux")]
impl NoThreads {
    pub fn begin() -> Self {
        let before = getrlimit(Resource::Nproc);
        let none = Rlimit {
            current: Some(0),
            ..before
        };
        setrlimit(Resource::Nproc, none).unwrap();
        Self(before)
    }
}

#[cfg(target_os = "linux")]
impl Drop for NoThreads {
    fn drop(&mut self) {
        setrlimit(Resource::Nproc, self.0).unwrap();
    }
}

pub fn is_it(test: &str) -> bool {
    variable(NAME).is_some_and(|named| named == test)
}

#[expect(clippy::disallowed_methods, reason = "tests know no configuration")]
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

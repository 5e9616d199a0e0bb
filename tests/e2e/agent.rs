//! The program as a child process, as a service manager runs it: environment, logs, signals and exit status.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use host_metrics::commands::demo::postgres::{ThrowAwayPostgres, free_port};

use crate::scratch::{self, Process, now, wait_for};

/// The longest time of a clean stop.
pub const STOP_WITHIN: Duration = Duration::from_secs(9);

/// The variables of one program.
#[derive(Clone, Debug, Default)]
pub struct Variables(Vec<(String, String)>);

impl Variables {
    pub fn new() -> Self {
        // No packet leaves this machine.
        Self::default()
            .with("LOG_LEVEL", "DEBUG")
            .with("REFERENCE_HOSTS", "none")
    }

    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.0.retain(|(known, _)| known != name);
        self.0.push((name.into(), value.to_string()));
        self
    }

    pub fn and(&self, others: &Self) -> Self {
        let with = |all: Self, (name, value): &(String, String)| all.with(name, value);
        others.0.iter().fold(self.clone(), with)
    }

    /// With a METRICS_ADDR of its own, for `health`.
    pub fn with_metrics(self) -> Self {
        self.with("METRICS_ADDR", format!("127.0.0.1:{}", free_port().unwrap()))
    }

    pub fn kafka(self, bootstrap_servers: &str, topic: &str) -> Self {
        self.with("KAFKA_BOOTSTRAP_SERVERS", bootstrap_servers)
            .with("KAFKA_TOPIC", topic)
    }

    pub fn database(self, server: &ThrowAwayPostgres) -> Self {
        self.with("DB_HOST", server.host())
            .with("DB_PORT", server.port())
            .with("DB_USER", server.superuser())
            .with("DB_NAME", server.database())
    }
}

pub struct Agent {
    process: Process,
    name: String,
    directory: PathBuf,
}

impl Agent {
    pub fn start(arguments: &[&str], variables: &Variables) -> Self {
        let directory = scratch::directory(arguments[0]);
        let mut command = Command::new(env!("CARGO_BIN_EXE_host-metrics"));
        command
            .args(arguments)
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .envs(variables.0.iter().map(|(name, value)| (name, value)))
            .current_dir(&directory)
            .stdin(Stdio::null())
            .stdout(File::create(directory.join("stdout")).unwrap())
            .stderr(File::create(directory.join("stderr")).unwrap());
        Self {
            process: Process::start(&mut command),
            name: arguments[0].into(),
            directory,
        }
    }

    /// The command's arguments.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn stderr(&self) -> String {
        scratch::text(&self.directory.join("stderr"))
    }

    pub fn stdout(&self) -> String {
        scratch::text(&self.directory.join("stdout"))
    }

    pub fn wait_for_stderr(&self, needle: &str, within: Duration) {
        let what = format!("{} says {needle:?}", self.name);
        wait_for(
            within,
            &what,
            || self.stderr().contains(needle).then_some(()),
            || tail(&self.stderr()),
        );
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    pub fn signal(&self, name: &str) {
        self.process.signal(name);
    }

    /// Its memory at this moment.
    pub fn resident_bytes(&self) -> u64 {
        self.process.resident_bytes()
    }

    /// Its largest memory so far.
    pub fn peak_bytes(&self) -> u64 {
        self.process.peak_bytes()
    }

    /// How many lines of the log contain the text.
    pub fn said(&self, needle: &str) -> usize {
        self.stderr().lines().filter(|line| line.contains(needle)).count()
    }

    /// Kills it with SIGKILL and waits for its end.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    pub fn wait(&mut self, within: Duration) -> ExitStatus {
        let what = format!("{} ends", self.name);
        let log = self.directory.join("stderr");
        wait_for(within, &what, || self.process.exited(), || scratch::text(&log))
    }

    /// Sends SIGTERM, and verifies that it ends cleanly within the bound.
    pub fn stop(mut self) {
        // A signal before the handlers are installed would end the process. The first line of the log comes after that.
        wait_for(
            STOP_WITHIN,
            "it has begun to work",
            || (!self.stderr().is_empty()).then_some(()),
            || format!("{} says nothing", self.name),
        );
        let begun = now();
        self.signal("TERM");
        let status = self.wait(STOP_WITHIN);
        assert_eq!(
            status.code(),
            Some(0),
            "{} after {:?}: {}",
            self.name,
            begun.elapsed(),
            self.stderr()
        );
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {} said:\n{}", self.name, tail(&self.stderr()));
        }
    }
}

/// Runs a command to its end. Returns the exit status and the output.
pub fn run(arguments: &[&str], variables: &Variables) -> (i32, String) {
    let mut command = Agent::start(arguments, variables);
    let status = command.wait(Duration::from_secs(60));
    (status.code().unwrap(), command.stdout() + &command.stderr())
}

/// The last lines of a log.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

//! A temporary Postgres cluster that is removed when its value is dropped.
//!
//! Finds Postgres's programs, creates the data directory, and starts, stops and removes the server. Uses no SQL.
//!
//! A guard process does the stop and the removal, so that they happen even if this process is killed. The guard is a shell
//! that reads a pipe from this process. When this process ends for any reason, the pipe ends too; the guard then stops the
//! server and removes its directory. (A parent-death signal would require unsafe code, and exists only on Linux.)

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;

use anyhow::{Context, bail, ensure};

use crate::lock::lock;

const SUPERUSER: &str = "postgres";
const DATABASE: &str = "postgres";

/// The longest time for a start or stop of the server, including recovery after an immediate stop on a slow disk.
const PATIENCE_SECONDS: &str = "60";

/// Ports for the server. They are below the range for outgoing connections (from 32768 on Linux, from 49152 elsewhere), so
/// that no outgoing connection takes the port between a stop and the next start.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// How often a start is tried. Another program may take a free port first, but not several times in a row.
const MAX_START_TRIES: usize = 5;

/// Where packages install the programs if not on the PATH. The highest version is used.
const PLACES: [(&str, &str, &str); 6] = [
    ("/usr/lib/postgresql", "", "bin"),                       // Debian, Ubuntu
    ("/usr", "pgsql-", "bin"),                                // PGDG on Fedora, RHEL
    ("/opt/homebrew/opt", "postgresql@", "bin"),              // Homebrew on Apple silicon
    ("/usr/local/opt", "postgresql@", "bin"),                 // Homebrew on Intel
    ("/home/linuxbrew/.linuxbrew/opt", "postgresql@", "bin"), // Homebrew on Linux
    ("/Applications/Postgres.app/Contents/Versions", "", "bin"),
];

/// Waits for the end of standard input, then stops the server and removes its directory. `$1` is pg_ctl, `$2` the directory.
const GUARD: &str = r#"
while read -r _; do :; done
"$1" -D "$2/data" -m immediate -t 10 stop >/dev/null 2>&1 ||
    { read -r pid <"$2/data/postmaster.pid" && kill -KILL "$pid"; } 2>/dev/null
rm -rf -- "$2"
"#;

/// Settings of a temporary server. The default suits a quick trial.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The superuser's password. `None`: every user of this machine may connect as superuser and can then run programs as the
    /// server's user, which is acceptable only for tests.
    pub password: Option<String>,
    /// Whether a COMMIT waits for the disk. Only a crash of the machine loses data without it.
    pub fsync: bool,
    /// Additional settings of `postgresql.conf`, such as `("ssl", "on")`.
    pub configuration: Vec<(String, String)>,
}

/// A server on 127.0.0.1. Dropping it stops the server and removes its directory.
#[derive(Debug)]
pub struct ThrowAwayPostgres {
    programs: Programs,
    directory: PathBuf,
    account: Option<SystemUser>,
    port: u16,
    password: Option<String>,
    guard: Child,
}

impl ThrowAwayPostgres {
    /// Starts a new cluster with the default settings.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with(&Settings::default())
    }

    /// Starts a new cluster and waits until it accepts connections.
    ///
    /// # Errors
    /// Postgres is not installed (the text names the places searched and how to install it), or it did not start (the text
    /// has the end of its log).
    pub fn start_with(settings: &Settings) -> anyhow::Result<Self> {
        let programs = Programs::find()?;
        let (directory, account) = make_directory()?;
        let guard = match start_guard(&programs, &directory, account) {
            Ok(guard) => guard,
            Err(error) => {
                // There is no guard to do this. The directory is still empty.
                fs::remove_dir(&directory).ok();
                return Err(error);
            }
        };
        // If anything fails from here on, dropping `server` cleans up.
        let mut server = Self {
            programs,
            directory,
            account,
            port: 0,
            password: settings.password.clone(),
            guard,
        };
        server.make_cluster(settings)?;
        for tries_left in (0..MAX_START_TRIES).rev() {
            server.port = free_port()?;
            server.configure(&[("port".into(), server.port.to_string())])?;
            match server.start_again() {
                Err(_) if tries_left > 0 && port_is_taken(server.port) => {}
                result => {
                    result?;
                    break;
                }
            }
        }
        Ok(server)
    }

    pub fn host(&self) -> &'static str {
        "127.0.0.1"
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn superuser(&self) -> &'static str {
        SUPERUSER
    }

    /// The database that exists in every cluster.
    pub fn database(&self) -> &'static str {
        DATABASE
    }

    /// A directory that is removed with the cluster. It belongs to the server's user.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn data_dir(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// The server's log so far.
    pub fn log(&self) -> String {
        fs::read(self.log_file()).map_or_else(
            |error| format!("(no log: {error})"),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// The user and group that run the server, if not this process's own. Files for the server, such as a TLS key, must
    /// belong to them.
    pub fn account(&self) -> Option<(u32, u32)> {
        self.account.map(|account| (account.uid, account.gid))
    }

    /// The path of another program of the same installation, such as `psql`.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.path(name)
    }

    /// The command for a person to open the database in psql.
    pub fn psql_command(&self) -> String {
        let (host, port) = (self.host(), self.port);
        let password = self
            .password
            .as_ref()
            .map(|password| format!(":{password}"))
            .unwrap_or_default();
        format!(
            "{} postgresql://{SUPERUSER}{password}@{host}:{port}/{DATABASE}",
            self.program("psql").display()
        )
    }

    /// Appends to `postgresql.conf`, for the next start.
    pub fn configure(&self, lines: &[(String, String)]) -> anyhow::Result<()> {
        let path = self.data_dir().join("postgresql.conf");
        let text: String = lines
            .iter()
            .map(|(name, value)| format!("{name} = '{}'\n", value.replace('\'', "''")))
            .collect();
        let mut file = fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        io::Write::write_all(&mut file, text.as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Starts the stopped server again, on the same port and data, and waits until it accepts connections.
    pub fn start_again(&self) -> anyhow::Result<()> {
        let mut command = self.pg_ctl();
        command.arg("-l").arg(self.log_file()).arg("-w").arg("start");
        // The server inherits standard output, so reading a pipe would never end.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let status = command
            .status()
            .with_context(|| format!("cannot run {command:?}"))?;
        ensure!(
            status.success(),
            "Postgres did not start in {}; the end of its log:\n{}",
            self.directory.display(),
            last_lines(&self.log(), 20)
        );
        Ok(())
    }

    /// Stops the server cleanly: ends all sessions and writes all data.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.stop_with("fast")
    }

    /// Stops the server as a crash would. The next start recovers its data.
    pub fn stop_immediately(&self) -> anyhow::Result<()> {
        self.stop_with("immediate")
    }

    /// Stops the server as a crash would, and starts it again.
    pub fn restart_immediately(&self) -> anyhow::Result<()> {
        self.stop_immediately()?;
        self.start_again()
    }

    fn stop_with(&self, mode: &str) -> anyhow::Result<()> {
        let mut command = self.pg_ctl();
        command.args(["-m", mode, "-w", "stop"]);
        run(&mut command).context("Postgres did not stop").map(drop)
    }

    fn make_cluster(&self, settings: &Settings) -> anyhow::Result<()> {
        let mut initdb = self.command("initdb");
        initdb.arg("-D").arg(self.data_dir());
        initdb.args(["-U", SUPERUSER, "--no-locale", "-E", "UTF8", "--no-sync"]);
        match &self.password {
            None => initdb.args(["-A", "trust"]),
            Some(password) => {
                let file = self.directory.join("password");
                // No other user can enter this directory.
                fs::write(&file, password).with_context(|| format!("cannot write {}", file.display()))?;
                initdb.args(["-A", "scram-sha-256", "--pwfile"]).arg(file)
            }
        };
        run(&mut initdb).context("cannot create a Postgres cluster")?;
        let own = [
            ("listen_addresses", "127.0.0.1"),
            ("unix_socket_directories", ""),
            ("fsync", if settings.fsync { "on" } else { "off" }),
            // The data is small.
            ("shared_buffers", "32MB"),
        ];
        self.configure(&own.map(|(name, value)| (name.into(), value.into())))?;
        self.configure(&settings.configuration)
    }

    fn pg_ctl(&self) -> Command {
        let mut command = self.command("pg_ctl");
        command
            .arg("-D")
            .arg(self.data_dir())
            .args(["-t", PATIENCE_SECONDS]);
        command
    }

    fn command(&self, program: &str) -> Command {
        command_as(self.account, &self.directory, &self.programs.path(program))
    }

    fn log_file(&self) -> PathBuf {
        self.directory.join("log")
    }
}

impl Drop for ThrowAwayPostgres {
    fn drop(&mut self) {
        // Ends the pipe, so that the guard does its work. Its waits are bounded.
        drop(self.guard.stdin.take());
        self.guard.wait().ok();
    }
}

/// A port of 127.0.0.1 that is free at the moment; a different one each time, because the caller listens on it only later.
pub fn free_port() -> anyhow::Result<u16> {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    (0..100)
        .map(|_| fastrand::u16(PORTS))
        .find(|port| !port_is_taken(*port) && lock(&GIVEN).insert(*port))
        .context("found no free port on 127.0.0.1 in 100 tries")
}

fn port_is_taken(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err()
}

/// The directory of the programs; `None` if they are on the PATH.
#[derive(Clone, Debug)]
struct Programs(Option<PathBuf>);

impl Programs {
    fn find() -> anyhow::Result<Self> {
        let mut candidates = std::iter::once(Self(None)).chain(
            PLACES
                .iter()
                .flat_map(|(parent, prefix, bin)| newest_first(Path::new(parent), prefix, bin))
                .map(|directory| Self(Some(directory))),
        );
        if let Some(programs) = candidates.find(Self::work) {
            return Ok(programs);
        }
        let places: Vec<String> = PLACES
            .iter()
            .map(|(parent, prefix, bin)| format!("{parent}/{prefix}VERSION/{bin}"))
            .collect();
        bail!(
            "Postgres is not installed: no initdb and pg_ctl on the PATH or in {}. Run `make setup` to install it, or \
             `apt-get install postgresql`, `dnf install postgresql-server` or `brew install postgresql@17`",
            places.join(", ")
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0
            .as_ref()
            .map_or_else(|| PathBuf::from(name), |directory| directory.join(name))
    }

    fn work(&self) -> bool {
        ["initdb", "pg_ctl", "postgres"].iter().all(|name| {
            Command::new(self.path(name))
                .arg("--version")
                .stdin(Stdio::null())
                .output()
                .is_ok_and(|output| output.status.success())
        })
    }
}

/// The `bin` directories of the entries of `parent` whose name is `prefix` and a version, highest version first.
fn newest_first(parent: &Path, prefix: &str, bin: &str) -> Vec<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let version = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some((version, entry.path().join(bin)))
        })
        .collect();
    found.sort_unstable_by(|a, b| b.cmp(a));
    found.into_iter().map(|(_, directory)| directory).collect()
}

/// The account that runs the server if this process is root, because Postgres refuses to run as root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SystemUser {
    uid: u32,
    gid: u32,
}

impl SystemUser {
    /// The account `nobody`, which every system has, from the text of `/etc/passwd`.
    fn nobody(passwd: &str) -> Option<Self> {
        let line = passwd.lines().find(|line| line.starts_with("nobody:"))?;
        let mut fields = line.split(':').skip(2);
        // macOS writes 4294967294 as -2.
        let mut number = || fields.next()?.parse::<i64>().ok().map(|id| id as u32);
        Some(Self {
            uid: number()?,
            gid: number()?,
        })
    }
}

/// Creates a directory for the server. Returns it with the account that owns it, if that is not this process's own.
fn make_directory() -> anyhow::Result<(PathBuf, Option<SystemUser>)> {
    let temporary = std::env::temp_dir();
    let is_root = rustix::process::geteuid().is_root();
    let parent = match is_root {
        false => temporary,
        true => [temporary.as_path(), Path::new("/tmp"), Path::new("/var/tmp")]
            .into_iter()
            .find(|path| others_may_enter(path))
            .with_context(|| {
                let place = temporary.display();
                format!(
                    "Postgres refuses to run as root, and no other user can enter {place}, /tmp or /var/tmp"
                )
            })?
            .to_owned(),
    };
    let directory = tempfile::Builder::new()
        .prefix("host-metrics-postgres-")
        .tempdir_in(&parent)
        .with_context(|| format!("cannot create a directory in {}", parent.display()))?;
    if !is_root {
        return Ok((directory.keep(), None));
    }
    let passwd = fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
    let account = SystemUser::nobody(&passwd)
        .context("Postgres refuses to run as root, and /etc/passwd has no user \"nobody\"")?;
    chown(directory.path(), Some(account.uid), Some(account.gid))
        .with_context(|| format!("cannot give {} to nobody", directory.path().display()))?;
    Ok((directory.keep(), Some(account)))
}

/// Whether every user can reach the files in `directory`.
fn others_may_enter(directory: &Path) -> bool {
    directory.canonicalize().is_ok_and(|path| {
        path.ancestors().all(|part| {
            part.metadata()
                .is_ok_and(|of| of.permissions().mode() & 0o001 != 0)
        })
    })
}

fn start_guard(programs: &Programs, directory: &Path, account: Option<SystemUser>) -> anyhow::Result<Child> {
    command_as(
        account,
        directory.parent().unwrap_or(directory),
        Path::new("/bin/sh"),
    )
    .args(["-c", GUARD, "host-metrics-postgres-guard"])
    .arg(programs.path("pg_ctl"))
    .arg(directory)
    .process_group(0)
    .stdin(Stdio::piped())
    .stdout(Stdio::null())
    .stderr(Stdio::null())
    .spawn()
    .context("cannot start /bin/sh")
}

fn command_as(account: Option<SystemUser>, working_directory: &Path, program: &Path) -> Command {
    let mut command = Command::new(program);
    // The account may be unable to enter the current directory.
    command.current_dir(working_directory).stdin(Stdio::null());
    // Its own process group, so that Ctrl-C reaches only this process, which stops the others in order.
    command.process_group(0);
    if let Some(SystemUser { uid, gid }) = account {
        // As root, this also drops the supplementary groups.
        command.uid(uid).gid(gid);
    }
    command
}

fn run(command: &mut Command) -> anyhow::Result<Output> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}",
        output.status,
        last_lines(&String::from_utf8_lossy(&output.stderr), 20)
    );
    Ok(output)
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ids_of_nobody_are_read_from_passwd_even_if_negative() {
        let debian =
            "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65533:nobody:/nonexistent:/usr/sbin/nologin\n";
        assert_eq!(
            SystemUser::nobody(debian),
            Some(SystemUser {
                uid: 65534,
                gid: 65533
            })
        );
        let mac = "nobody:*:-2:-2:Unprivileged User:/var/empty:/usr/bin/false\n";
        assert_eq!(
            SystemUser::nobody(mac),
            Some(SystemUser {
                uid: 4294967294,
                gid: 4294967294
            })
        );
        assert_eq!(SystemUser::nobody("root:x:0:0::/root:/bin/sh\n"), None);
        assert_eq!(SystemUser::nobody("nobody:x:none\n"), None);
    }

    #[test]
    fn installations_are_sorted_by_version_number_and_not_as_text() {
        let parent = tempfile::tempdir().unwrap();
        for name in [
            "postgresql@9",
            "postgresql@17",
            "postgresql@16",
            "postgresql@old",
            "redis@20",
        ] {
            fs::create_dir(parent.path().join(name)).unwrap();
        }
        let found = newest_first(parent.path(), "postgresql@", "bin");
        let names = ["postgresql@17/bin", "postgresql@16/bin", "postgresql@9/bin"];
        assert_eq!(found, names.map(|name| parent.path().join(name)));
        assert!(newest_first(Path::new("/no/such/place"), "", "bin").is_empty());
    }
}

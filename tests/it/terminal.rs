//! Every command that draws, on terminals and without one: colours, narrow terminals, pipes and pipes that the reader closes.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use host_metrics::commands::demo::postgres::ThrowAwayPostgres;
use host_metrics::commands::init;
use host_metrics::config::{self, Variables};
use rdkafka::ClientConfig;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use unicode_width::UnicodeWidthStr;

const ADDRESS: &str = "https://shop.example/a/long/path/that/no/narrow/terminal/has/room/for";

/// The most that a program may take.
const BOUND: Duration = Duration::from_secs(60);

/// A site, a Kafka with a record and a database with the state of two hosts.
struct Servers {
    site: String,
    host_file: tempfile::NamedTempFile,
    postgres: ThrowAwayPostgres,
    kafka: MockCluster<'static, DefaultProducerContext>,
}

impl Servers {
    fn start() -> Self {
        let postgres = ThrowAwayPostgres::start().unwrap();
        let port = postgres.port().to_string();
        let settings = config::status(&Variables::from_pairs([
            ("DB_HOST", postgres.host()),
            ("DB_PORT", &port),
            ("DB_NAME", postgres.database()),
            ("DB_USER", postgres.superuser()),
        ]));
        init::make_tables(&settings.unwrap().database).unwrap();
        let mut client = ::postgres::Config::new()
            .host(postgres.host())
            .port(postgres.port())
            .user(postgres.superuser())
            .dbname(postgres.database())
            .connect(::postgres::NoTls)
            .unwrap();
        client
            .batch_execute(&format!(
                "INSERT INTO host_metrics (address, scheduled_at, interval_seconds, is_valid, outcome, error, kafka_topic, kafka_partition,
                     kafka_offset)
                 VALUES ('{ADDRESS}', now(), 60, false, 'bad_status', 'the status is 503', 'host-metrics', 0, 0);
                 INSERT INTO host_metrics_offsets (group_id, topic, partition, next_offset) VALUES ('host-metrics', 'host-metrics', 0, 1);
                 INSERT INTO host_metrics_series (series_id, address, agent, name, \"group\", is_valid, since, last_seen_at,
                     interval_seconds, outcome, error, verdict, verdict_since, last_failed_at, last_failed_outcome, last_error)
                 VALUES (1, '{ADDRESS}', 'place', '日本語の店、とても長い名前', 'Shops', false, now(), now(), 60, 'bad_status',
                     'the status is 503', 'down', now(), now(), 'bad_status', 'the status is 503');
                 INSERT INTO host_metrics_incidents (address, number, started_at, checks, first_outcome,
                     most_frequent_outcome, last_outcome, outcomes, places, last_error)
                 VALUES ('{ADDRESS}', 1, now(), 1, 'bad_status', 'bad_status', 'bad_status', '{{}}', '[\"place\"]', 'the status is 503');
                 INSERT INTO host_metrics_hosts (address, frequency) VALUES ('{ADDRESS}', '1m')"
            ))
            .unwrap();
        let kafka = MockCluster::new(1).unwrap();
        kafka.create_topic("host-metrics", 1, 1).unwrap();
        let producer: BaseProducer = ClientConfig::new()
            .set("bootstrap.servers", kafka.bootstrap_servers())
            .create()
            .unwrap();
        let value = format!(r#"{{"address": "{ADDRESS}", "is_valid": false, "outcome": "bad_status"}}"#);
        // `tail` prints those that come after its start.
        thread::spawn(move || {
            while producer
                .send(BaseRecord::<str, str>::to("host-metrics").payload(&value))
                .is_ok()
            {
                producer.poll(Duration::from_millis(100));
            }
        });
        let site = site();
        let mut host_file = tempfile::NamedTempFile::new().unwrap();
        writeln!(host_file, "{site} 1m name=Site group=Here\n{site}other 1m").unwrap();
        Self {
            site,
            host_file,
            postgres,
            kafka,
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_host-metrics"));
        command
            .args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .envs([
                ("TERM", "xterm"),
                ("LOG_LEVEL", "OFF"),
                ("DB_HOST", self.postgres.host()),
                ("DB_PORT", &self.postgres.port().to_string()),
                ("DB_NAME", self.postgres.database()),
                ("DB_USER", self.postgres.superuser()),
                ("KAFKA_BOOTSTRAP_SERVERS", &self.kafka.bootstrap_servers()),
            ])
            .current_dir("/")
            .stdin(Stdio::null());
        command
    }

    /// Commands that end by themselves, and whether they have colours.
    fn commands(&self) -> Vec<(Vec<&str>, bool)> {
        let (site, file) = (self.site.as_str(), self.host_file.path().to_str().unwrap());
        vec![
            (vec!["check", site, "hello"], true),
            (vec!["check", site, "--repeat", "2", "--every", "1ms"], true),
            (vec!["validate", "-c", file], false),
            (vec!["status"], true),
            (vec!["status", "--host", ADDRESS], false),
            (vec!["status", "--incidents"], false),
            (vec!["hosts", "list"], false),
            (vec!["audit"], false),
        ]
    }
}

/// A server that answers every request, and its address.
fn site() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/", listener.local_addr().unwrap());
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
        }
    });
    address
}

/// A terminal on which a program runs.
struct Terminal {
    master: File,
    child: Child,
}

impl Terminal {
    fn start(mut command: Command, columns: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let path = Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
        let slave = File::options().read(true).write(true).open(path).unwrap();
        let size = Winsize {
            ws_row: 24,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&slave, size).unwrap();
        let end = || Stdio::from(OwnedFd::from(slave.try_clone().unwrap()));
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        Self {
            master: File::from(master),
            child,
        }
    }

    /// What the program has written, until it ends or has written `text`.
    fn read_until(mut self, text: &str) -> String {
        // A program that hangs is killed, and the test then misses what it should have written.
        let (ended, has_ended) = mpsc::channel::<()>();
        let pid = Pid::from_child(&self.child);
        let watch = thread::spawn(move || {
            if has_ended.recv_timeout(BOUND) == Err(RecvTimeoutError::Timeout) {
                let _ = kill_process(pid, Signal::KILL);
            }
        });
        let mut all = Vec::new();
        let mut part = [0; 4096];
        // An error says that the program has closed the terminal.
        while let Ok(count @ 1..) = self.master.read(&mut part) {
            all.extend(&part[..count]);
            if !text.is_empty() && String::from_utf8_lossy(&all).contains(text) {
                self.child.kill().unwrap();
            }
        }
        drop(ended);
        watch.join().unwrap();
        self.child.wait().unwrap();
        String::from_utf8_lossy(&all).replace("\r\n", "\n")
    }
}

fn on_terminal(command: Command, columns: u16) -> String {
    Terminal::start(command, columns).read_until("")
}

fn in_pipe(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn colours_are_for_terminals_that_want_them() {
    let servers = Servers::start();
    for (args, has_colours) in servers.commands() {
        let command = |more: &[&str], variable: Option<(&str, &str)>| {
            let mut command = servers.command(&[&args[..], more].concat());
            command.envs(variable);
            command
        };
        for (output, is_coloured, what) in [
            (on_terminal(command(&[], None), 80), has_colours, "a terminal"),
            (
                on_terminal(command(&[], Some(("NO_COLOR", "1"))), 80),
                false,
                "NO_COLOR",
            ),
            (
                on_terminal(command(&[], Some(("TERM", "dumb"))), 80),
                false,
                "TERM=dumb",
            ),
            (
                on_terminal(command(&["--color", "never"], None), 80),
                false,
                "never",
            ),
            (in_pipe(command(&[], None)), false, "a pipe"),
            (
                in_pipe(command(&["--color", "always"], None)),
                has_colours,
                "always",
            ),
        ] {
            assert!(output.lines().count() > 1, "{args:?}, {what}: {output:?}");
            assert_eq!(
                output.contains('\x1b'),
                is_coloured,
                "{args:?}, {what}: {output:?}"
            );
        }
    }
}

#[test]
fn records_have_colours_on_terminals_that_want_them() {
    let servers = Servers::start();
    let tail = || servers.command(&["tail"]);
    for (variable, is_coloured) in [
        (("LANG", "C"), true),
        (("NO_COLOR", "1"), false),
        (("TERM", "dumb"), false),
    ] {
        let mut command = tail();
        command.envs([variable]);
        let output = Terminal::start(command, 40).read_until(ADDRESS);
        assert_eq!(output.contains('\x1b'), is_coloured, "{variable:?}: {output:?}");
    }
}

#[test]
fn tables_fit_a_terminal_of_40_columns() {
    let servers = Servers::start();
    for args in [
        &["status"][..],
        &["status", "--host", ADDRESS],
        &["status", "--incidents"],
    ] {
        let mut command = servers.command(args);
        command.env("NO_COLOR", "1");
        let output = on_terminal(command, 40);
        for line in output.lines() {
            assert!(line.width() <= 40, "{args:?}: {line}");
        }
        assert!(output.contains("DOWN") || output.contains("INCIDENT"), "{output}");
    }
    let file = servers.host_file.path().to_str().unwrap();
    for args in [
        &["check", &servers.site, "bye", "--headers"][..],
        &["validate", "-c", file],
    ] {
        let mut command = servers.command(args);
        command.env("NO_COLOR", "1");
        let output = on_terminal(command, 40);
        assert!(output.lines().count() > 10, "{output}");
        for line in output.lines() {
            // Nothing is cut: what is longer has no space.
            assert!(
                line.width() <= 40 || !line.trim_start().contains(' '),
                "{args:?}: {line}"
            );
        }
    }
    let check = on_terminal(servers.command(&["check", &servers.site]), 40);
    let bars = check.lines().filter(|line| line.contains('█'));
    assert!(
        bars.clone().count() > 0 && bars.map(UnicodeWidthStr::width).max() <= Some(40),
        "{check}"
    );
}

#[test]
fn watching_the_status_redraws_it_in_place() {
    let servers = Servers::start();
    let next = "\x1b[J\r\x1b[";
    for (no_color, has_colours) in [("", true), ("1", false)] {
        let mut command = servers.command(&["status", "--watch"]);
        command.env("NO_COLOR", no_color);
        let output = Terminal::start(command, 40).read_until(next);
        let (first, second) = output.split_once(next).expect(&output);
        let lines = first.matches("\x1b[K\n").count();
        assert!(
            lines > 5 && second.starts_with(&format!("{lines}A")),
            "{output:?}"
        );
        assert_eq!(first.contains("\x1b[31mDOWN"), has_colours, "{output:?}");
    }
}

#[test]
fn a_trial_of_hosts_shows_its_progress_only_on_a_terminal() {
    let servers = Servers::start();
    let file = servers.host_file.path().to_str().unwrap();
    let command = || servers.command(&["validate", "--try", "-c", file]);
    let shown = on_terminal(command(), 40);
    assert!(shown.contains("\r[####################] 2 of 2\r "), "{shown:?}");
    let mut dumb = command();
    dumb.env("TERM", "dumb");
    for output in [on_terminal(dumb, 40), in_pipe(command())] {
        assert!(!output.contains("[#"), "{output:?}");
        assert_eq!(output.matches("  ok ").count(), 2, "{output}");
    }
}

#[test]
fn a_reader_that_closes_the_pipe_is_not_an_error() {
    let servers = Servers::start();
    let mut commands: Vec<_> = servers.commands().into_iter().map(|(args, _)| args).collect();
    commands.push(vec!["tail"]);
    commands.push(vec!["status", "--watch"]);
    commands.push(vec!["demo"]);
    for args in commands {
        let mut command = servers.command(&args);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let status = output.status.code();
        // `status` and `audit` also tell what they have found.
        let is_expected =
            matches!(status, Some(0)) || (status == Some(1) && ["status", "audit"].contains(&args[0]));
        assert!(is_expected && output.stderr.is_empty(), "{args:?}: {output:?}");
    }
}

#[test]
fn the_demo_draws_within_the_terminal_and_ends_with_what_to_try_next() {
    let servers = Servers::start();
    let mut command = servers.command(&["demo", "--for", "6s"]);
    command.env("NO_COLOR", "1");
    let output = on_terminal(command, 40);
    let (_, next) = output.split_once("\nTry next\n").expect(&output);
    assert!(next.contains("host-metrics demo -c FILE"), "{next}");
    assert!(output.contains("  page      http://127.0.0.1:"), "{output}");
    for colour in ["\x1b[1m", "\x1b[31m", "\x1b[32m"] {
        assert!(!output.contains(colour), "{output:?}");
    }
    let drawn: Vec<&str> = output
        .lines()
        .filter_map(|line| line.strip_suffix("\x1b[K"))
        .collect();
    assert!(drawn.iter().any(|line| line.contains("DOWN")), "{output}");
    for line in drawn {
        let text = anstream::adapter::strip_str(line).to_string();
        assert!(text.trim_start_matches('\r').width() <= 40, "{text:?}");
    }
}

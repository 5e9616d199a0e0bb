//! The real binary in an environment of its own: exit statuses, and the exact text on standard output and error.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use clap::CommandFactory;
use host_metrics::cli::Cli;
use host_metrics::config::NAMES;
use host_metrics::sample;

const BINARY: &str = env!("CARGO_BIN_EXE_host-metrics");

/// A working directory. Programs run in it with only the variables that the test sets.
struct Place(tempfile::TempDir);

struct Ran {
    status: i32,
    stdout: String,
    stderr: String,
}

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.path().join(name), contents).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command
            .args(args)
            .env_clear()
            .current_dir(self.path())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        ran(self.command(args).output().unwrap())
    }
}

fn ran(output: Output) -> Ran {
    Ran {
        status: output.status.code().unwrap_or_else(|| panic!("{output:?}")),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Ran {
    /// Expects exit status 2, nothing on standard output, and this text on standard error.
    #[track_caller]
    fn is_wrong(&self, stderr: &str) {
        assert_eq!(
            (self.stderr.as_str(), self.stdout.as_str(), self.status),
            (stderr, "", 2)
        );
    }
}

#[test]
fn a_ca_file_that_cannot_be_read_is_wrong_input_and_not_a_bad_site() {
    let place = Place::new();
    place.write("empty.pem", "");
    place.write("cut.pem", "-----BEGIN CERTIFICATE-----\nMIIB");
    for (file, what) in [
        ("empty.pem", "the file holds no certificate"),
        ("cut.pem", "a certificate of the file is damaged (bad end line)"),
    ] {
        let variable = format!("CHECK_CA_FILE={file}");
        place.run(&["check", "-e", &variable, "http://127.0.0.1:1"]).is_wrong(&format!(
            "CHECK_CA_FILE=\"{file}\": {what}; expected a PEM file with a certificate (-----BEGIN CERTIFICATE-----)\n"
        ));
    }
}

#[test]
fn help_and_version_are_results() {
    let place = Place::new();
    for flag in ["-h", "--help"] {
        let help = place.run(&[flag]);
        assert_eq!((help.status, help.stderr.as_str()), (0, ""));
        for word in [
            "produce",
            "consume",
            "check",
            "validate",
            "init",
            "drop",
            "status",
            "health",
            "demo",
            "Examples:",
            "Exit status:",
        ] {
            assert!(help.stdout.contains(word), "{flag} lacks {word}");
        }
        let widest = help.stdout.lines().map(str::len).max();
        assert!(widest <= Some(100), "{widest:?}");
    }
    let help = place.run(&["--help"]).stdout;
    for name in NAMES {
        assert!(help.contains(name), "--help lacks {name}");
    }
    for command in ["produce", "consume", "check", "validate", "init", "drop", "demo"] {
        assert_eq!(place.run(&[command, "-h"]).status, 0);
    }
    for args in [
        &["-v"][..],
        &["--version"],
        &["produce", "-v"],
        &["demo", "--version"],
    ] {
        let version = place.run(args);
        let number = env!("CARGO_PKG_VERSION");
        // The build script set the same revision for the program and for these tests.
        let expected = match option_env!("HOST_METRICS_REVISION") {
            Some(revision) => format!("host-metrics {number} ({revision})\n"),
            None => format!("host-metrics {number}\n"),
        };
        assert_eq!(version.stdout, expected, "{args:?}");
        assert_eq!((version.status, version.stderr.as_str()), (0, ""));
    }
}

#[test]
fn a_wrong_command_line_ends_with_status_2() {
    let place = Place::new();
    let cases: [&[&str]; 10] = [
        &[],
        &["frob"],
        &["produce"],
        &["produce", "-c"],
        &["consume", "--frob"],
        &["check"],
        &["check", "a", "b", "c"],
        &["init", "--partitions", "0"],
        &["demo", "--for", "30"],
        &["demo", "--for", "0s"],
    ];
    for args in cases {
        let ran = place.run(args);
        assert_eq!((ran.status, ran.stdout.as_str()), (2, ""), "{args:?}");
        assert!(!ran.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn all_wrong_variables_are_reported_in_one_run() {
    let remedy = |name| format!("set it in the environment, in .env or with -e {name}=VALUE");
    Place::new().run(&["consume", "-e", "DB_BATCH_SIZE=0", "-e", "DB_SSLMODE=allow"]).is_wrong(&format!(
        "KAFKA_BOOTSTRAP_SERVERS is not set: expected host:port, or several separated by commas; {}\n\
         DB_HOST is not set: expected the name or IP address of one host, or the directory of the database's socket; {}\n\
         DB_NAME is not set: expected the name of the database only; {}\n\
         DB_USER is not set: expected the name of the database's user; {}\n\
         DB_SSLMODE=\"allow\": expected disable, prefer, require, verify-ca or verify-full; correct it, or leave it \
         unset for prefer\n\
         DB_BATCH_SIZE=\"0\": expected a whole number from 1 to 100000; correct it, or leave it unset for 100\n",
        remedy("KAFKA_BOOTSTRAP_SERVERS"),
        remedy("DB_HOST"),
        remedy("DB_NAME"),
        remedy("DB_USER"),
    ));
}

#[test]
fn a_wrong_variable_and_a_wrong_host_file_are_reported_together() {
    let place = Place::new();
    place.write("hosts", "example.com 5x\n");
    place.run(&["produce", "-c", "hosts", "-e", "KAFKA_BOOTSTRAP_SERVERS=k:1", "-e", "MAX_THREADS=0"]).is_wrong(
        "MAX_THREADS=\"0\": expected a whole number from 1 to 30000; correct it, or leave it unset for 1024\n\
         hosts:1:13: `5x` is not a valid FREQUENCY: expected a whole number of minutes, or one with s, m, h or d, \
         e.g. `5` or `30s`\n    \
         example.com 5x\n    \
         \x20           ^\n",
    );
}

#[test]
fn an_unknown_variable_after_e_is_an_error_that_does_not_show_its_value() {
    let place = Place::new();
    place.write("hosts", "example.com 5\n");
    let args = [
        "validate",
        "-c",
        "hosts",
        "-e",
        "DB_PASSWD=secret",
        "-e",
        "DB_PASSWORD",
        "-e",
        "secret",
        "-e",
        "=secret",
    ];
    place.run(&args).is_wrong(
        "-e DB_PASSWD: no such variable; `host-metrics --help` lists the names\n\
         -e DB_PASSWORD: expected NAME=VALUE; write -e DB_PASSWORD=VALUE\n\
         -e: expected NAME=VALUE, found a word without a `=`\n\
         -e: the text before the `=` is not the name of a variable; `host-metrics --help` lists the names\n",
    );
}

#[test]
fn secrets_are_never_printed() {
    let place = Place::new();
    place.write("secret", "hunter2\n");
    place.write(
        ".env",
        "DB_PASSWORD=hunter2 and more\nKAFKA_SASL_PASSWORD='hunter2\n",
    );
    place.write("hosts", "https://me:hunter2@example.com/ 5\n");
    let secrets = [
        ("DB_PASSWORD", "hunter2"),
        ("KAFKA_SASL_USERNAME", "hunter2"),
        ("KAFKA_SASL_PASSWORD", "hunter2"),
    ];
    for (name, value) in secrets {
        let flag = format!("{name}={value}");
        let file = format!("{name}_FILE=secret");
        for (command, level) in [
            ("consume", "x"),
            ("produce", "TRACE"),
            ("init", "x"),
            ("drop", "x"),
        ] {
            for protocol in ["PLAINTEXT", "SASL_SSL", "x"] {
                let (level, protocol) = (
                    format!("LOG_LEVEL={level}"),
                    format!("KAFKA_SECURITY_PROTOCOL={protocol}"),
                );
                let mut args = vec![command, "-e", &flag, "-e", &file, "-e", &level, "-e", &protocol];
                if command == "produce" {
                    args.extend(["-c", "hosts"]);
                }
                let ran = place.run(&args);
                assert_eq!(ran.status, 2, "{args:?}");
                assert!(
                    !format!("{}{}", ran.stdout, ran.stderr).contains("hunter2"),
                    "{}",
                    ran.stderr
                );
            }
        }
    }
}

#[test]
fn a_flag_wins_over_the_environment_and_that_over_the_file() {
    let place = Place::new();
    place.write("hosts", "example.com 1h\n");
    let timeout = |args: &[&str], environment: Option<&str>| {
        let mut command = place.command(&[args, &["validate", "-c", "hosts"]].concat());
        if let Some(value) = environment {
            command.env("CHECK_TIMEOUT", value);
        }
        let ran = ran(command.output().unwrap());
        assert_eq!((ran.status, ran.stderr.as_str()), (0, ""));
        let row = ran.stdout.lines().nth(1).unwrap().to_owned();
        row.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(timeout(&[], None), "10s");
    place.write(
        ".env",
        "\u{feff}# mine\nOTHER=$x\nexport CHECK_TIMEOUT='4s' # seconds\n",
    );
    assert_eq!(timeout(&[], None), "4s");
    assert_eq!(timeout(&[], Some("5s")), "5s");
    assert_eq!(timeout(&["-e", "CHECK_TIMEOUT=6s"], Some("5s")), "6s");
    // An empty variable is set, and means the default.
    assert_eq!(timeout(&[], Some("")), "10s");
    assert_eq!(timeout(&["-e", "CHECK_TIMEOUT="], Some("5s")), "10s");
    assert_eq!(
        timeout(&["-e", "CHECK_TIMEOUT=6s", "-e", "CHECK_TIMEOUT=7s"], None),
        "7s"
    );
    place.write("other", "CHECK_TIMEOUT=8s\n");
    assert_eq!(timeout(&["--env-file", "other"], None), "8s");
}

#[test]
fn common_flags_may_come_before_or_after_the_command() {
    let place = Place::new();
    place.write("hosts", "example.com 1h\n");
    let ran = place.run(&[
        "-e",
        "MAX_THREADS=0",
        "-e",
        "CHECK_TIMEOUT=x",
        "validate",
        "-c",
        "hosts",
        "-e",
        "MAX_THREADS=1",
    ]);
    assert_eq!(ran.status, 2);
    assert!(ran.stderr.starts_with("CHECK_TIMEOUT=\"x\": "), "{}", ran.stderr);
    assert_eq!(ran.stderr.lines().count(), 1);
}

const QUOTE: &str =
    "on one line, in UTF-8; put a value with spaces, quotes, `#`, `$` or `\\` in single quotes";

#[test]
fn a_line_of_the_file_of_variables_that_cannot_be_understood_is_reported_with_its_number() {
    let place = Place::new();
    place.write("hosts", "example.com 1h\n");
    let validate = ["validate", "-c", "hosts"];
    place.write(
        ".env",
        "# DB_PASSWORD=two words\nDB_PORT=5432\n\n  # a comment's quote\nDB_PASSWORD=two words\nDB_NAME 'x'\n\
         DB_PASSWORD=two words\nDB_TABLE='no end\n\nDB_HOST='db'\n",
    );
    let lines = [
        (5, "DB_PASSWORD: expected DB_PASSWORD=VALUE"),
        (6, "DB_NAME: expected DB_NAME=VALUE"),
        (7, "DB_PASSWORD: expected DB_PASSWORD=VALUE"),
        (8, "DB_TABLE: expected DB_TABLE=VALUE"),
    ];
    let expected = |file: &str, lines: &[(usize, &str)]| -> String {
        lines
            .iter()
            .map(|(number, what)| format!("{file}:{number}: {what} {QUOTE}\n"))
            .collect()
    };
    place.run(&validate).is_wrong(&expected(".env", &lines));

    // A line that is not UTF-8, and Windows line ends.
    place.write(
        ".env",
        b"\xef\xbb\xbfDB_PORT=1\r\nDB_PASSWORD=\xff\xfe\r\nLOG_LEVEL=x y\r\n",
    );
    let lines = [
        (2, "DB_PASSWORD: expected DB_PASSWORD=VALUE"),
        (3, "LOG_LEVEL: expected LOG_LEVEL=VALUE"),
    ];
    place.run(&validate).is_wrong(&expected(".env", &lines));

    fs::remove_file(place.path().join(".env")).unwrap();
    place
        .run(&["--env-file", "none", "validate", "-c", "hosts"])
        .is_wrong("cannot read the file of variables \"none\": No such file or directory (os error 2)\n");
}

#[test]
fn another_programs_env_file_causes_no_error_unless_it_was_named() {
    let place = Place::new();
    place.write("hosts", "example.com 1h\n");
    let foreign = b"nonsense\nexport\nAPI KEY=x\nGREETING=it's me\nKEY=\"-----BEGIN\nabc=\n-----END\"\nLATIN=\xfc\n1=2\nF=a b\n\
        PORT=9\nCHECK_TIMEOUT=${PORT}s\n";
    place.write(".env", foreign);
    let timeout = |ran: Ran| {
        assert_eq!((ran.status, ran.stderr.as_str()), (0, ""));
        let row = ran.stdout.lines().nth(1).unwrap().to_owned();
        row.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(timeout(place.run(&["validate", "-c", "hosts"])), "9s");

    place.write("named", b"nonsense\nF=a b\nCHECK_TIMEOUT=9s\nLATIN=\xfc\n");
    let expected: String = [1, 2, 4]
        .map(|number| format!("named:{number}: expected NAME=VALUE {QUOTE}\n"))
        .concat();
    place
        .run(&["validate", "-c", "hosts", "--env-file", "named"])
        .is_wrong(&expected);

    // A line that cannot be read may have been meant for us, so it is reported.
    fs::remove_file(place.path().join(".env")).unwrap();
    fs::create_dir(place.path().join(".env")).unwrap();
    let ran = place.run(&["validate", "-c", "hosts"]);
    assert_eq!(ran.status, 0);
    assert!(
        ran.stderr.contains(
            "[WARN] cannot read \".env\": Is a directory (os error 21); any variables in it are not used"
        ),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_variable_that_is_not_utf_8_is_reported_and_unrelated_ones_are_ignored() {
    let place = Place::new();
    place.write("hosts", "example.com 1h\n");
    let mut command = place.command(&["validate", "-c", "hosts"]);
    let output = command
        .env("SOMEBODY_ELSES", OsStr::from_bytes(b"\xff"))
        .output()
        .unwrap();
    assert_eq!(ran(output).status, 0);
    let output = command
        .env("CHECK_TIMEOUT", OsStr::from_bytes(b"\xff"))
        .output()
        .unwrap();
    ran(output).is_wrong("CHECK_TIMEOUT: its value in the environment is not UTF-8; correct it\n");
}

#[test]
fn validate_prints_the_hosts_and_the_forecast() {
    let place = Place::new();
    place.write(
        "hosts",
        "# mine\n\
         https://google.com 5\n\
         https://shop.example/ 10s timeout=30s status=200-299,301 Add to basket\n",
    );
    let ran = place.run(&["validate", "-c", "hosts"]);
    assert_eq!((ran.status, ran.stderr.as_str()), (0, ""));
    let (before, cpu) = ran.stdout.split_once("cpu ").unwrap();
    let (cpu, after) = cpu.split_once('\n').unwrap();
    assert!(cpu.ends_with(" ms over https (measured here)"), "{cpu}");
    assert_eq!(
        format!("{before}{after}"),
        "EVERY  TIMEOUT  HOST\n\
         5m     10s      https://google.com\n\
         10s    9500ms   https://shop.example/  status=200-299,301 Add to basket\n\
         \n\
         hosts        2\n\
         checks/s     0.10\n\
         threads      about 1 if a check takes 300ms, at most 2 if every host hangs\n\
         files        about 65, at most 66\n\
         memory       about 12 MB, at most 12 MB if every host hangs\n\
         bodies       at most 23 MB more memory while bodies are read (up to 1 at once, MAX_BODY_BYTES=1048576), \
         and 2 KB for the compiled regexes (1 distinct)\n\
         records/day  8928\n\
         table/month  64 MB, at 240 bytes per row including the index\n\
         state/year   4 MB for each place that checks\n\
         \n\
         warning: https://shop.example/: timeout=30s is reduced to 9500ms, 95 % of the interval of 10s, \
         so that a check ends before the next one is due\n"
    );
}

#[test]
fn a_host_file_that_cannot_be_read_is_named() {
    let place = Place::new();
    let remedy = "-c expects a file, or - for standard input";
    place.run(&["validate", "-c", "."]).is_wrong(&format!(
        "cannot read the host file \".\": Is a directory (os error 21); {remedy}\n"
    ));
    place.run(&["validate", "-c", "none"]).is_wrong(&format!(
        "cannot read the host file \"none\": No such file or directory (os error 2); {remedy}\n"
    ));
    let set = ["-e", "KAFKA_BOOTSTRAP_SERVERS=k:1"];
    place
        .run(&[&set, ["produce", "-c"].as_slice(), &["none"]].concat())
        .is_wrong(&format!(
            "cannot read the host file \"none\": No such file or directory (os error 2); {remedy}\n"
        ));
}

#[test]
fn a_dash_is_standard_input() {
    let place = Place::new();
    let with_stdin = |bytes: &[u8]| {
        let mut command = place.command(&["validate", "-c", "-"]);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(bytes).unwrap();
        ran(child.wait_with_output().unwrap())
    };
    assert!(
        with_stdin(b"example.com 5\n")
            .stdout
            .contains("example.com -> https://example.com/")
    );
    with_stdin(b"x y\n").is_wrong(
        "<stdin>:1:3: `y` is not a valid FREQUENCY: expected a whole number of minutes, or one with s, m, h or d, \
         e.g. `5` or `30s`\n    \
         x y\n    \
         \x20 ^\n",
    );

    let no_host = "<stdin>:1:1: the file has no hosts; write one per line: ADDRESS FREQUENCY [option=value ...] [REGEX], \
                   e.g. https://example.com 5\n    \n    ^\n";
    with_stdin(b"").is_wrong(no_host);
    let closed = Command::new("/bin/sh")
        .args(["-c", &format!("exec '{BINARY}' validate -c - <&-")])
        .env_clear()
        .current_dir(place.path())
        .output()
        .unwrap();
    ran(closed).is_wrong(no_host);
}

#[test]
fn a_closed_pipe_is_not_an_error_and_a_full_disk_is_one() {
    let place = Place::new();
    place.write(
        "hosts",
        (0..5_000)
            .map(|n| format!("host-{n}.example 5\n"))
            .collect::<String>(),
    );
    let mut command = place.command(&["validate", "-c", "hosts"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let gone = ran(child.wait_with_output().unwrap());
    assert_eq!((gone.status, gone.stderr.as_str()), (0, ""));

    let full = File::options().write(true).open("/dev/full").unwrap();
    let full = ran(command.stdout(full).output().unwrap());
    assert_eq!(full.status, 1);
    assert_eq!(
        full.stderr,
        "error: cannot write to standard output: No space left on device (os error 28)\n"
    );
    // The error cannot be printed, and there is still no panic.
    let all_full = || File::options().write(true).open("/dev/full").unwrap();
    let status = place
        .command(&["--help"])
        .stdout(all_full())
        .stderr(all_full())
        .status();
    assert_eq!(status.unwrap().code(), Some(0));
    let status = place.command(&["consume"]).stderr(all_full()).status();
    assert_eq!(status.unwrap().code(), Some(2));
}

/// A server that answers one request, and its address.
fn site(answer: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
            request.push(byte[0]);
        }
        stream.write_all(answer.as_bytes()).unwrap();
    });
    address
}

#[test]
fn check_prints_what_it_found_and_its_exit_status_tells_whether_that_is_valid() {
    let place = Place::new();
    let hello = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
    let address = site(hello);
    let ran = place.run(&["check", &address, "h.llo"]);
    assert_eq!((ran.status, ran.stderr.as_str()), (0, ""));
    for line in [
        "valid        yes",
        "outcome      ok",
        "status       200",
        "protocol     HTTP/1.1",
        "body         5 bytes",
        "regex        found in line 1: hello",
        "ip           127.0.0.1",
    ] {
        assert!(
            ran.stdout.lines().any(|printed| printed == line),
            "{}",
            ran.stdout
        );
    }

    let ran = place.run(&["check", &site(hello), "bye"]);
    assert_eq!((ran.status, ran.stderr.as_str()), (1, ""));
    let advice = "The server answered, but its body does not meet the REGEX.";
    assert!(ran.stdout.contains(advice), "{}", ran.stdout);
    assert!(ran.stdout.contains("begins       hello\n"), "{}", ran.stdout);
    assert!(
        ran.stdout.contains("outcome      regex_mismatch"),
        "{}",
        ran.stdout
    );

    let address = site(hello);
    let moved = format!("HTTP/1.1 301 Moved\r\nLocation: {address}\r\nContent-Length: 0\r\n\r\n");
    let moved = site(moved.leak());
    let ran = place.run(&["check", &moved, "--color", "always", "h.llo"]);
    assert_eq!((ran.status, ran.stderr.as_str()), (0, ""));
    assert!(
        ran.stdout.contains("\x1b[1m\x1b[33mhello\x1b[0m"),
        "{}",
        ran.stdout.escape_debug()
    );
    for hop in [format!(" ms  301 {moved}"), format!(" ms  200 {address}")] {
        assert!(ran.stdout.contains(&hop), "{}", ran.stdout);
    }

    let address = site("HTTP/1.1 404 Not Found\r\nServer: \x1b[31mA\r\nContent-Length: 4\r\n\r\ngone");
    let ran = place.run(&["check", &address, "--headers"]);
    for part in [
        "server        [31mA\n",
        "body         4 bytes\nbegins       gone\nheaders      HTTP/1.1 404 Not Found\n             Server:  [31mA\n",
        "name it: -o status=404.",
    ] {
        assert!(ran.stdout.contains(part), "{part}: {}", ran.stdout);
    }

    let address = site("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
    let ran = place.run(&[
        "check",
        &address,
        "-o",
        "status=404",
        "--json",
        "-e",
        "AGENT_NAME=me",
    ]);
    assert_eq!((ran.status, ran.stderr.as_str()), (0, ""));
    let record = ran.stdout.strip_suffix('\n').unwrap();
    let sample = sample::decode(record.as_bytes()).unwrap();
    assert_eq!(
        (&*sample.address, sample.status_code, sample.is_valid),
        (&*address, Some(404), true)
    );
    assert_eq!(
        (sample.agent.as_deref(), sample.interval_seconds),
        (Some("me"), None)
    );
}

#[test]
fn check_repeats_on_request_and_ends_with_a_summary() {
    let place = Place::new();
    // Accepts no connection after it is dropped.
    let refused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let address = format!("http://{refused}/");
    let repeat = ["check", &address, "--repeat", "3", "--every", "1s"];
    let ran = place.run(&repeat);
    assert_eq!((ran.status, ran.stderr.as_str()), (1, ""));
    assert_eq!(ran.stdout.matches("connect_refused").count(), 3, "{}", ran.stdout);
    assert!(
        ran.stdout.ends_with("\n0 of 3 checks were valid\n"),
        "{}",
        ran.stdout
    );

    let ran = place.run(&[&repeat[..], &["--json", "--color", "always"]].concat());
    assert_eq!((ran.status, ran.stdout.lines().count()), (1, 3), "{}", ran.stdout);
    for record in ran.stdout.lines() {
        assert!(!sample::decode(record.as_bytes()).unwrap().is_valid);
    }
}

#[test]
fn no_printed_text_changes_the_direction_of_a_terminals_text() {
    const HIDDEN: [char; 3] = ['\u{202e}', '\u{200b}', '\u{2066}'];
    let hidden: String = HIDDEN.iter().collect();
    let place = Place::new();
    let address = || format!("{}#{hidden}", site("HTTP/1.1 200 OK\r\n\r\nhello"));
    for (arguments, expected) in [
        (&["check", &address()][..], "valid        yes"),
        (&["check", &address(), "--json"], r"#\u202e\u200b\u2066"),
        (&["check", "a.example", "-o", &format!("x{hidden}=1")], "OPTION:1"),
        (
            &["check", "a.example", "-e", &format!("CHECK_TIMEOUT=x{hidden}")],
            "CHECK_TIMEOUT",
        ),
    ] {
        let ran = place.run(arguments);
        let printed = ran.stdout + &ran.stderr;
        assert!(printed.contains(expected), "{arguments:?}: {printed}");
        assert!(
            !printed.contains(HIDDEN),
            "{arguments:?}: {}",
            printed.escape_unicode()
        );
    }
}

#[test]
fn check_refuses_wrong_input() {
    let place = Place::new();
    place
        .run(&[
            "check",
            "https://me:secret@example.com/",
            "a(",
            "-e",
            "CHECK_TIMEOUT=0s",
        ])
        .is_wrong(
            "CHECK_TIMEOUT=\"0s\": expected a whole number with ms, s, m, h or d, from 1ms to 1d, e.g. 10s\n\
             ADDRESS:9: remove the credentials from the address (`https://***@example.com/`): every record would contain them\n    \
             https://***@example.com/\n    \
             \x20       ^\n\
             REGEX:2: the REGEX is not valid: unclosed group\n    \
             a(\n    \
             \x20^\n",
        );
}

#[test]
fn a_log_line_has_its_time_in_utc_and_its_level_and_goes_to_standard_error() {
    let place = Place::new();
    place.write("no-authorities", "");
    let check = |level: &str| {
        let mut command = place.command(&["check", &site("HTTP/1.1 204 No Content\r\n\r\n")]);
        // The system's authorities are searched for here and not found, which causes a warning.
        command
            .env("SSL_CERT_FILE", "no-authorities")
            .env("SSL_CERT_DIR", ".");
        ran(command.env("LOG_LEVEL", level).output().unwrap())
    };
    for level in ["", "warn", "TRACE"] {
        let ran = check(level);
        assert_eq!(ran.status, 0);
        let (time, message) = ran.stderr.split_once(" [WARN] ").unwrap();
        let shape: String = time
            .chars()
            .map(|c| if c.is_ascii_digit() { '0' } else { c })
            .collect();
        assert_eq!(shape, "0000-00-00T00:00:00.000Z");
        assert!(
            message.starts_with("this machine has no trusted CA certificates"),
            "{message}"
        );
        assert_eq!(message.find('\n'), Some(message.len() - 1), "{message}");
    }
    for level in ["ERROR", "off"] {
        assert_eq!(check(level).stderr, "");
    }
}

#[test]
fn health_asks_the_agent_at_metrics_addr() {
    let place = Place::new();
    place.run(&["health"]).is_wrong(
        "METRICS_ADDR is not set: `health` asks the agent at this address; set the same value for the agent and for \
         `health`, e.g. METRICS_ADDR=127.0.0.1:9464\n",
    );
    place.run(&["health", "-e", "METRICS_ADDR=localhost"]).is_wrong(
        "METRICS_ADDR=\"localhost\": expected an IP address and a port, e.g. 0.0.0.0:9464 or [::]:9464\n",
    );
    let nobody = place.run(&["health", "-e", "METRICS_ADDR=0.0.0.0:1"]);
    assert_eq!((nobody.status, nobody.stdout.as_str()), (1, ""));
    assert!(
        nobody
            .stderr
            .starts_with("error: no agent answers at 127.0.0.1:1: "),
        "{}",
        nobody.stderr
    );
    for (answer, status, stdout) in [
        ("HTTP/1.1 200 OK\r\n\r\nready\n", 0, "ready\n"),
        (
            "HTTP/1.1 503 Service Unavailable\r\n\r\nwaiting for Kafka\n",
            1,
            "not ready: waiting for Kafka\n",
        ),
    ] {
        let address = site(answer)
            .trim_start_matches("http://")
            .trim_end_matches('/')
            .to_owned();
        let ran = place.run(&["health", "-e", &format!("METRICS_ADDR={address}")]);
        assert_eq!(
            (ran.status, ran.stdout.as_str(), ran.stderr.as_str()),
            (status, stdout, "")
        );
    }
}

#[test]
fn an_agent_whose_metrics_addr_is_in_use_does_not_start_except_with_once() {
    let place = Place::new();
    place.write("hosts", "http://127.0.0.1:1/ 1m\n");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let metrics = format!("METRICS_ADDR={address}");
    let expected =
        format!("error: METRICS_ADDR: cannot listen on {address}; free that address or set another one: ");
    let kafka = rdkafka::mocking::MockCluster::new(1).unwrap();
    kafka.create_topic("host-metrics", 1, 1).unwrap();
    let servers = format!("KAFKA_BOOTSTRAP_SERVERS={}", kafka.bootstrap_servers());
    let database = ["-e", "DB_HOST=127.0.0.1", "-e", "DB_NAME=n", "-e", "DB_USER=u"];
    let produce = ["produce", "-c", "hosts", "-e", &metrics, "-e", &servers];
    let consume = [&["consume", "-e", &metrics, "-e", &servers][..], &database].concat();
    for args in [&produce[..], &consume] {
        let ran = place.run(args);
        assert_eq!(ran.status, 1, "{}", ran.stderr);
        assert!(ran.stderr.starts_with(&expected), "{}", ran.stderr);
    }
    // It can run beside an agent that uses the address.
    let once = place.run(&[&produce[..], &["--once"]].concat());
    assert_eq!(once.status, 0, "{}", once.stderr);
}

#[test]
fn status_names_the_variables_and_the_server_that_are_missing() {
    let place = Place::new();
    let ran = place.run(&["status"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (2, ""));
    for name in ["DB_HOST", "DB_NAME", "DB_USER"] {
        assert!(
            ran.stderr.contains(&format!("{name} is not set")),
            "{}",
            ran.stderr
        );
    }
    assert!(!ran.stderr.contains("KAFKA"), "it can do without: {}", ran.stderr);
    let flags = [
        "-e",
        "DB_HOST=127.0.0.1",
        "-e",
        "DB_PORT=1",
        "-e",
        "DB_NAME=n",
        "-e",
        "DB_USER=u",
    ];
    let ran = place.run(&[&["status", "--json"][..], &flags].concat());
    assert_eq!((ran.status, ran.stdout.as_str()), (1, ""));
    assert!(
        ran.stderr.starts_with("error: Postgres at 127.0.0.1:1: "),
        "{}",
        ran.stderr
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_reload_during_the_first_read_of_the_host_file_does_not_end_the_program() {
    use std::io::{BufRead, BufReader};

    let place = Place::new();
    let hosts = place.path().join("hosts");
    assert!(Command::new("mkfifo").arg(&hosts).status().unwrap().success());
    let mut produce = place
        .command(&["produce", "-c", "hosts"])
        .env("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
        .env("LOG_LEVEL", "INFO")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It waits until the pipe is written. As soon as it catches SIGHUP (bit 0 of the mask), it gets one.
    let status = format!("/proc/{}/status", produce.id());
    let catches_hangups = || {
        let status = fs::read_to_string(&status).unwrap();
        let mask = status
            .lines()
            .find_map(|line| line.strip_prefix("SigCgt:"))
            .unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap() & 1 == 1
    };
    let mut looks = 0;
    while !catches_hangups() {
        looks += 1;
        assert!(looks < 1_000_000, "it never catches SIGHUP");
        std::thread::yield_now();
    }
    let pid = rustix::process::Pid::from_child(&produce);
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    fs::write(&hosts, "http://127.0.0.1:1/ 60\n").unwrap();
    let mut said = BufReader::new(produce.stderr.take().unwrap()).lines();
    let mut says = |what: &str| said.any(|line| line.unwrap().contains(what));
    assert!(says("hosts=1"), "it begins");
    fs::write(&hosts, "http://127.0.0.1:1/ 60\nhttp://127.0.0.1:2/ 60\n").unwrap();
    let reloaded = says("reload hosts=2");
    produce.kill().unwrap();
    produce.wait().unwrap();
    assert!(reloaded);
}

/// A site that accepts connections and never answers, and `count` host lines for it.
#[cfg(target_os = "linux")]
fn hanging_hosts(count: usize) -> (TcpListener, String) {
    let site = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = site.local_addr().unwrap();
    let line = |n| format!("http://{address}/{n} 1h timeout=1s\n");
    (site, (0..count).map(line).collect())
}

#[cfg(target_os = "linux")]
#[test]
fn the_limit_of_open_files_is_raised_and_a_limit_that_is_too_low_is_reported() {
    const HOSTS: usize = 80;

    let place = Place::new();
    let (_site, hosts) = hanging_hosts(HOSTS);
    place.write("hosts", hosts);
    let kafka = rdkafka::mocking::MockCluster::new(1).unwrap();
    kafka.create_topic("host-metrics", 1, 1).unwrap();
    let once = |limit: &str| {
        // The mock brokers of tests that run at the same time leave their sockets open in every child process.
        let close = "for fd in /dev/fd/*; do fd=${fd##*/}; ((fd < 3)) || eval \"exec $fd>&-\"; done";
        let mut command = Command::new("bash");
        command
            .args([
                "-c",
                &format!("{close}; {limit} && exec '{BINARY}' produce --once -c hosts"),
            ])
            .env_clear()
            .env("KAFKA_BOOTSTRAP_SERVERS", kafka.bootstrap_servers())
            .env("LOG_LEVEL", "WARN")
            .current_dir(place.path());
        let ran = ran(command.output().unwrap());
        assert_eq!(ran.status, 0, "{}", ran.stderr);
        ran.stderr
    };
    assert_eq!(once("ulimit -Sn 60 && ulimit -Hn 300"), "");

    let said = once("ulimit -n 60");
    let warning = "80 checks at the same time may need 144 open files, but this process may have 60; at most 30 run at the \
                   same time, and the others wait;";
    assert!(said.contains(warning), "{said}");
    assert!(said.contains("LimitNOFILE="), "{said}");
    assert_eq!(said.lines().count(), 1, "every host is checked: {said}");
}

#[test]
fn likely_mistakes_in_a_host_file_cause_warnings_in_validate_and_at_the_start() {
    let place = Place::new();
    place.write("hosts", "http://127.0.0.1:1/ 1h \"quoted\"\n");
    let ran = place.run(&["validate", "-c", "hosts"]);
    assert_eq!((ran.status, ran.stderr.as_str()), (0, ""));
    let warning = "hosts:1:24: the quotes around `\"quoted\"` are part of the REGEX; remove them unless the page contains them";
    assert!(
        ran.stdout.ends_with(&format!("\nwarning: {warning}\n")),
        "{}",
        ran.stdout
    );
    let kafka = rdkafka::mocking::MockCluster::new(1).unwrap();
    kafka.create_topic("host-metrics", 1, 1).unwrap();
    let servers = format!("KAFKA_BOOTSTRAP_SERVERS={}", kafka.bootstrap_servers());
    let ran = place.run(&["produce", "--once", "-c", "hosts", "-e", &servers]);
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    assert!(
        ran.stderr.contains(&format!("[WARN] {warning}\n")),
        "{}",
        ran.stderr
    );
}

#[test]
fn an_installation_has_the_program_a_manual_page_for_every_command_and_completions() {
    let place = Place::new();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/install");
    let install = Command::new(script).arg(place.path()).arg(BINARY).output();
    let installed = ran(install.unwrap());
    assert_eq!((installed.status, installed.stderr.as_str()), (0, ""));

    let program = place.path().join("bin/host-metrics");
    let pages = Cli::command();
    let nested = pages.get_subcommands().flat_map(|command| {
        let inner = command.get_subcommands();
        inner.map(|inner| format!("-{}-{}", command.get_name(), inner.get_name()))
    });
    let commands = pages
        .get_subcommands()
        .map(|command| format!("-{}", command.get_name()));
    for page in commands.chain(nested).chain([String::new()]) {
        let page = format!("host-metrics{page}");
        let text = fs::read_to_string(place.path().join(format!("share/man/man1/{page}.1"))).unwrap();
        assert!(text.contains(&format!(".TH {page} 1")), "{page}: {text}");
        // The lines of the examples stay lines.
        assert!(
            text.contains("\n.SH EXAMPLES\n.nf\n  host\\-metrics "),
            "{page}: {text}"
        );
    }
    for (shell, script) in [
        ("bash", "bash-completion/completions/host-metrics"),
        ("zsh", "zsh/site-functions/_host-metrics"),
        ("fish", "fish/vendor_completions.d/host-metrics.fish"),
    ] {
        let script = fs::read_to_string(place.path().join("share").join(script)).unwrap();
        let printed = ran(Command::new(&program)
            .args(["completions", shell])
            .output()
            .unwrap());
        assert_eq!(script, printed.stdout, "{shell}");
        assert!(
            script.contains("validate") && script.contains("incidents"),
            "{shell}"
        );
    }
}

#[test]
fn a_second_signal_ends_the_program_at_once() {
    // A site that takes connections and never answers, so the first signal waits for the check.
    let site = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = Place::new();
    place.write("hosts", format!("http://{}/ 60s", site.local_addr().unwrap()));
    let mut command = place.command(&["produce", "-c", "hosts"]);
    let mut child = command
        .env("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
        .env("REFERENCE_HOSTS", "none")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let _connection = site.accept().unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    let signal = |signal| rustix::process::kill_process(pid, signal).unwrap();
    signal(rustix::process::Signal::TERM);
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let stopping = lines
        .map(Result::unwrap)
        .find(|line| line.contains("stopping under_way=1"));
    assert!(stopping.is_some());
    signal(rustix::process::Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

//! No secret of a host file leaves the program except in the requests to its host: every command is run at TRACE with
//! planted secrets, and everything that comes out is searched for them.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;

use host_metrics::commands::demo::postgres::free_port;
use host_metrics::produce::host_file;

use crate::consume::wait_for;
use crate::site::{self, Site};

const PLANTED: [&str; 4] = ["planted-password", "cGxhbnRlZC", "planted-key", "planted-bearer"];

/// A site that sends back what it got, and a folder with secrets and with host files that name them.
fn planted() -> (Site, tempfile::TempDir) {
    let site = Site::start(|mut stream, requests| {
        let request = site::read_request(&mut stream);
        let text = String::from_utf8_lossy(&request).replace("\r\n", " ");
        requests.lock().unwrap().push(request);
        let _ = stream.write_all(&site::ok(format!("{{\"echo\":\"{text}\"}}")));
    });
    let folder = tempfile::tempdir().unwrap();
    let secrets = folder.path().join("secrets");
    fs::create_dir(&secrets).unwrap();
    fs::write(secrets.join("basic"), "me:planted-password\n").unwrap();
    fs::write(secrets.join("bearer"), "Bearer planted-bearer\n").unwrap();
    fs::write(secrets.join("key"), "planted-key\n").unwrap();
    let options = "plain-auth=yes header=\"X-Key: Token @key\" json=/echo:x";
    let good = format!(
        "@p {options}\n{} 1m @p auth=@basic\n{} 1m @p auth=@bearer\n",
        site.url("/a"),
        site.url("/b")
    );
    fs::write(folder.path().join("hosts"), &good).unwrap();
    // Wrong in every way, so that every message about it is printed.
    let wrong = format!(
        "{good}{} 1m auth=@basic\n{} 1m @p auth=@bearer slow=x\n",
        site.url("/c"),
        site.url("/d")
    );
    fs::write(folder.path().join("wrong"), wrong).unwrap();
    (site, folder)
}

fn assert_shows_none(what: &str, text: &str) {
    for planted in PLANTED {
        assert!(!text.contains(planted), "{what} shows {planted}: {text}");
    }
}

/// The password is only sent in base64.
fn assert_all_were_sent(site: &Site) {
    let requests = site.requests().join("\n");
    for planted in &PLANTED[1..] {
        assert!(requests.contains(planted), "{planted} was never sent: {requests}");
    }
}

#[test]
fn no_metric_panic_or_crash_shows_a_secret_of_the_host_file() {
    let (site, folder) = planted();
    let path = |name: &str| folder.path().join(name);
    let hosts = host_file::parse_contents(&path("hosts"), fs::read(path("hosts")), Some(&path("secrets")));
    let targets = hosts.unwrap().targets;
    assert!(targets.iter().all(|target| target.auth.is_some()));
    // A panic has nothing else to show.
    assert_shows_none("the message of a panic", &format!("{targets:?}"));

    let port = free_port().unwrap();
    let metrics = format!("METRICS_ADDR=127.0.0.1:{port}");
    let args = [
        "produce",
        "-c",
        "hosts",
        "-e",
        "KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:1",
        "-e",
        &metrics,
    ];
    let agent = command(folder.path(), "60", &args)
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let scrape = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").ok()?;
        let mut page = String::new();
        stream.read_to_string(&mut page).ok()?;
        let counted = "host_metrics_checks_total{outcome=\"json_mismatch\"} 2\n";
        page.contains(counted).then_some(page)
    };
    let page = wait_for(scrape);
    assert_shows_none("/metrics", &page);
    assert_all_were_sent(&site);
    // `timeout` passes the signal on to the agent.
    let killed = Command::new("kill")
        .args(["-QUIT", &agent.id().to_string()])
        .status();
    assert!(killed.unwrap().success());
    let output = agent.wait_with_output().unwrap();
    assert_shows_none("a crash", &String::from_utf8_lossy(&output.stderr));
    assert_shows_none("a crash", &String::from_utf8_lossy(&output.stdout));
}

#[test]
fn no_command_shows_a_secret_of_the_host_file() {
    let (site, folder) = planted();
    let address = site.url("/");
    let checked = [
        "-o",
        "plain-auth=yes",
        "-o",
        "auth=@basic",
        "-o",
        "header=X-Key: @key",
        "-o",
        "json=/echo:x",
    ];
    let with = |first: &[&'static str], last: &[&'static str]| [first, last].concat();
    let kafka = ["-e", "KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:1"];
    let database = [
        "-e",
        "DB_HOST=127.0.0.1",
        "-e",
        "DB_PORT=1",
        "-e",
        "DB_NAME=d",
        "-e",
        "DB_USER=u",
    ];
    let servers = [&kafka[..], &database[..]].concat();
    let mut commands: Vec<Vec<&str>> = vec![
        with(&["validate", "-c", "hosts"], &[]),
        with(&["validate", "-c", "wrong"], &[]),
        with(&["produce", "-c", "wrong"], &kafka),
        with(&["produce", "--once", "-c", "hosts"], &kafka),
        with(&["init", "--print-sql"], &servers),
        with(&["init"], &servers),
        with(&["drop", "--yes"], &servers),
        with(&["status"], &servers),
        with(&["consume"], &servers),
        with(&["skip", "t/0"], &servers),
        with(&["tail"], &servers),
        with(&["audit"], &servers),
        with(&["produce", "-c", "hosts", "-c", "postgres:"], &servers),
        with(&["hosts", "import", "hosts"], &database),
        with(&["hosts", "import", "wrong"], &database),
        with(
            &["hosts", "add", "http://127.0.0.1:1/", "1x", "-o", "auth=@basic"],
            &database,
        ),
        with(&["hosts", "export"], &database),
        with(&["page", "--out", "page"], &servers),
        with(&["demo", "--for", "1s", "-c", "wrong"], &[]),
        with(&["health"], &["-e", "METRICS_ADDR=127.0.0.1:1"]),
    ];
    for json in [&["--json"][..], &[]] {
        commands.push([&["check", &address], &checked[..], json].concat());
    }
    let help = run(folder.path(), &["--help"]);
    let help = String::from_utf8(help.stdout).unwrap();
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = listed.take_while(|line| !line.is_empty()).filter_map(|line| {
        // A longer description goes on in the next line.
        let is_name = line.starts_with("  ") && !line.starts_with("   ");
        line.split_whitespace().next().filter(|_| is_name)
    });
    let (without_hosts, names): (Vec<_>, Vec<_>) =
        names.partition(|name| ["completions", "man"].contains(name));
    assert_eq!(without_hosts.len(), 2, "{help}");
    for name in names {
        assert!(
            commands.iter().any(|args| args[0] == name),
            "{name} is not run here"
        );
    }
    // Several wait for servers, so all run at once.
    thread::scope(|scope| {
        for args in &commands {
            let folder = folder.path();
            scope.spawn(move || {
                let output = run(folder, args);
                for text in [&output.stdout, &output.stderr] {
                    assert_shows_none(&format!("{args:?}"), &String::from_utf8_lossy(text));
                }
            });
        }
    });
    assert_all_were_sent(&site);
}

/// Runs the command until it ends by itself or by a signal after some seconds, for agents whose servers are not there.
fn run(folder: &Path, args: &[&str]) -> Output {
    command(folder, "3", args).output().unwrap()
}

fn command(folder: &Path, seconds: &str, args: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command
        .args([
            "--signal=TERM",
            "--kill-after=20",
            seconds,
            env!("CARGO_BIN_EXE_host-metrics"),
        ])
        .args(args)
        .args(["-e", "LOG_LEVEL=TRACE", "-e", "SECRETS_DIR=secrets"])
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("RUST_BACKTRACE", "full")
        .current_dir(folder)
        .stdin(Stdio::null());
    command
}

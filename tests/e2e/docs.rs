//! The pages of `docs/` as a reader follows them: the `sh` blocks of a page are one script, against a real Kafka and Postgres.
//! Blocks of another language need names of the reader's own, or servers that are not here.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use host_metrics::commands::demo::postgres::free_port;

use crate::browser::Browser;
use crate::database::{Database, server};
use crate::kafka::Kafka;
use crate::scratch::{self, Process, wait_for};
use crate::site::{PAGES, Site};

const DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs");

macro_rules! pages {
    ($($test:ident: $page:literal,)*) => {
        $(#[test]
        fn $test() {
            follow($page);
        })*

        #[test]
        fn no_page_with_commands_is_left_out() {
            let with_commands = fs::read_dir(DIRECTORY).unwrap().filter_map(|entry| {
                let path = entry.unwrap().path();
                let page = path.file_stem()?.to_str()?.to_owned();
                (path.is_file() && !script(&page).is_empty()).then_some(page)
            });
            let followed = [$($page),*].map(str::to_owned);
            assert_eq!(with_commands.collect::<BTreeSet<_>>(), BTreeSet::from(followed));
        }
    };
}

pages! {
    the_tutorial_leads_to_audited_rows: "tutorial",
    the_page_about_kafka_works: "own-kafka",
    the_page_about_postgres_works: "own-postgres",
    the_page_about_many_hosts_works: "many-hosts",
    the_page_about_places_works: "places",
    the_page_about_a_second_table_works: "second-table",
    the_page_about_the_original_works: "from-host-checker",
    the_page_about_alerts_works: "alerts",
    a_restored_backup_gets_every_record: "backup",
}

/// All `sh` blocks of a page.
fn script(page: &str) -> String {
    let text = fs::read_to_string(Path::new(DIRECTORY).join(page).with_extension("md")).unwrap();
    let blocks = text.split("\n```sh\n").skip(1);
    blocks
        .map(|rest| rest.split("```").next().unwrap_or_default())
        .collect()
}

fn follow(page: &str) {
    let kafka = Kafka::shared();
    let database = Database::new();
    let server = server();
    let (port, topic) = (server.port().to_string(), format!("docs-{page}"));
    let program = Path::new(env!("CARGO_BIN_EXE_host-metrics")).parent().unwrap();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(program.to_owned()).chain(std::env::split_paths(&path));
    let path = std::env::join_paths(path).unwrap().into_string().unwrap();
    let directory = scratch::directory(page);
    let log = directory.join("log");
    let file = File::create(&log).unwrap();
    let mut command = Command::new("sh");
    command
        .args(["-euxc", &script(page)])
        .env_clear()
        .envs([
            ("PATH", path.as_str()),
            ("SITE", &Site::start().address_of(&PAGES[0])),
            ("KAFKA_BOOTSTRAP_SERVERS", &kafka.bootstrap_servers()),
            ("KAFKA_TOPIC", &topic),
            ("KAFKA_GROUP_ID", &topic),
            ("DB_HOST", server.host()),
            ("DB_PORT", &port),
            ("DB_USER", server.superuser()),
            ("DB_NAME", &database.name),
            ("PGHOST", server.host()),
            ("PGPORT", &port),
            ("PGUSER", server.superuser()),
            ("PGDATABASE", &database.name),
            // No packet leaves this machine.
            ("REFERENCE_HOSTS", "none"),
        ])
        .current_dir(&directory)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file);
    // Two agents of a page would want the same one.
    if page == "alerts" {
        command.env("METRICS_ADDR", format!("127.0.0.1:{}", free_port().unwrap()));
    }
    let mut shell = Group(Process::start(&mut command));
    let status = wait_for(
        Duration::from_secs(90),
        &format!("the commands of {page} end"),
        || shell.0.exited(),
        || scratch::text(&log),
    );
    assert!(status.success(), "{page}: {}", scratch::text(&log));
}

/// A shell with the agents that it started.
struct Group(Process);

impl Drop for Group {
    fn drop(&mut self) {
        // Nobody is left if the page stopped its agents.
        let group = format!("-{}", self.0.id());
        Command::new("kill")
            .args(["-KILL", "--", &group])
            .stderr(Stdio::null())
            .status()
            .ok();
    }
}

/// With PICTURES it also makes the README's picture, as `make pictures` does.
#[test]
fn a_check_in_a_terminal_is_pictured_for_the_readme() {
    let address = Site::start().address_of(PAGES.iter().find(|page| page.path == "/moved").unwrap());
    let ran = Command::new(env!("CARGO_BIN_EXE_host-metrics"))
        .args(["check", &address, "fi.e", "--color", "always"])
        .output()
        .unwrap();
    let text = String::from_utf8(ran.stdout).unwrap();
    assert!(
        text.contains("found in line 1: \x1b[1m\x1b[33mfine\x1b[0m"),
        "{text}"
    );
    let Some(pictures) = std::env::var_os("PICTURES") else {
        return;
    };
    let body = format!("$ host-metrics check {address} fi.e\n{text}")
        .replace('<', "&lt;")
        .replace("\x1b[1m\x1b[33m", "<b style='color:#fd5'>")
        .replace("\x1b[32m", "<b style='color:#5d8'>")
        .replace("\x1b[0m", "</b>");
    let style = "margin:16px;background:#1b1f24;color:#e6e6e6;font:14px/1.35 monospace;white-space:pre";
    let page = scratch::directory("terminal").join("page.html");
    let html = format!("<!doctype html><meta charset=utf-8><body style=\"{style}\">{body}");
    fs::write(&page, html).unwrap();
    let browser = Browser::start();
    browser.open(&format!("file://{}", page.display()));
    browser.show_as(760, 360, "dark");
    fs::create_dir_all(&pictures).unwrap();
    fs::write(Path::new(&pictures).join("check-760-dark.png"), browser.picture()).unwrap();
}

//! `consume` and the other commands through PgBouncer, in each of its modes.

use std::fs;
use std::process::Command;

use host_metrics::commands::demo::postgres::free_port;
use postgres::{Client, NoTls};

use crate::agent::{Agent, Variables, run};
use crate::case::{Case, SOON};
use crate::database::server;
use crate::scratch::{self, Process, wait_for};

struct Pooler {
    port: u16,
    _process: Process,
}

impl Pooler {
    fn start(mode: &str, more: &str) -> Self {
        let port = free_port().unwrap();
        let directory = scratch::directory("pgbouncer");
        let settings = directory.join("pgbouncer.ini");
        let text = format!(
            "[databases]\n* = host={} port={} user={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = any\npool_mode = {mode}\n{more}\n",
            server().host(),
            server().port(),
            server().superuser()
        );
        fs::write(&settings, text).unwrap();
        let log = directory.join("log");
        let mut command = Command::new("pgbouncer");
        // PgBouncer refuses to run as root.
        if rustix::process::geteuid().is_root() {
            command.args(["-u", "nobody"]);
        }
        command.arg(&settings).stderr(fs::File::create(&log).unwrap());
        let pooler = Self {
            port,
            _process: Process::start(&mut command),
        };
        wait_for(
            SOON,
            "pgbouncer answers (`make setup` installs it)",
            || pooler.try_connect("postgres"),
            || scratch::text(&log),
        );
        pooler
    }

    fn try_connect(&self, database: &str) -> Option<Client> {
        let user = server().superuser();
        let text = format!("host=127.0.0.1 port={} user={user} dbname={database}", self.port);
        Client::connect(&text, NoTls).ok()
    }

    fn variables(&self, case: &Case) -> Variables {
        case.variables()
            .with("DB_PORT", self.port)
            .with("LOG_LEVEL", "INFO")
    }
}

#[test]
fn a_pooler_that_keeps_sessions_works_whatever_its_connections_were_used_for() {
    let mut case = Case::new("pooled-session", 2);
    let pooler = Pooler::start("session", "");
    for numbers in [0..10, 10..20] {
        case.write(0, numbers.clone());
        let consumer = Agent::start(&["consume"], &pooler.variables(&case));
        case.wait_for_rows(numbers.end, &[&consumer]);
        consumer.stop();
    }
    let (status, said) = run(&["status"], &pooler.variables(&case));
    assert_eq!(status, 0, "{said}");
    case.assert_exactly_once(&["pooled-session"]);
}

#[test]
fn a_pooler_that_does_not_keep_sessions_is_recognised_before_anything_is_set_in_them() {
    let case = Case::new("pooled-otherwise", 1);
    for (mode, more, words) in [
        ("transaction", "", ""),
        ("transaction", "server_round_robin = 1\nmin_pool_size = 4", ""),
        (
            "statement",
            "",
            "transaction blocks not allowed in statement pooling mode",
        ),
    ] {
        let pooler = Pooler::start(mode, more);
        for command in [
            &["consume"][..],
            &["consume"],
            &["init"],
            &["status"],
            &["skip", "pooled-otherwise/0:0"],
        ] {
            let (status, said) = run(command, &pooler.variables(&case));
            assert_eq!(status, 1, "{mode} {command:?}: {said}");
            for words in ["does not keep the session", "pool_mode=session", words] {
                assert!(said.contains(words), "{mode} {command:?}: {said}");
            }
        }
        let mut other = pooler.try_connect(&case.db.name).unwrap();
        for setting in ["lock_timeout", "idle_in_transaction_session_timeout"] {
            let rows = other.simple_query(&format!("SHOW {setting}")).unwrap();
            let value = rows.iter().find_map(|row| match row {
                postgres::SimpleQueryMessage::Row(row) => row.get(0),
                _ => None,
            });
            assert_eq!(
                value,
                Some("0"),
                "{mode}: {setting} is left to the pool's other clients"
            );
        }
    }
}

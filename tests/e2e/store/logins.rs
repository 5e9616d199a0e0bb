//! Rights, logins and TLS.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use host_metrics::commands::demo::postgres::{Settings, ThrowAwayPostgres};
use host_metrics::commands::init;
use host_metrics::config::{DbSslMode, Secret};
use host_metrics::consume::batch::Batch;
use host_metrics::consume::batch::Flushed;
use host_metrics::consume::store::Store;
use host_metrics::postgres::{self as bounded, Bounds, Session};
use postgres::{Client, NoTls};

use super::{P0, fatal, ok, reject, retry, row, start_at};
use crate::database::{Database, config, server};

#[test]
fn the_rights_that_the_contract_names_are_enough_and_each_missing_one_is_named() {
    let mut db = Database::new();
    let mut poor = db.store_without_create("host_metrics");
    let text = fatal(poor.open());
    assert!(text.contains("does not exist: run `host-metrics init`"), "{text}");
    assert!(
        text.contains("could not create what is missing: permission denied for schema public"),
        "{text}"
    );

    init::make_tables(&db.config().database).unwrap();
    let text = fatal(poor.open());
    for grant in [
        "GRANT INSERT ON \"public\".\"host_metrics\" TO",
        "GRANT SELECT, INSERT, UPDATE ON \"public\".\"host_metrics_offsets\" TO",
        "GRANT INSERT ON \"public\".\"host_metrics_rejected\" TO",
    ] {
        assert!(text.contains(grant), "{text}");
    }
    // Following the advice of the message helps.
    for grant in text
        .split("; ")
        .filter_map(|problem| problem.split("denied: ").nth(1))
    {
        db.execute(grant);
    }
    let layout = poor.open().unwrap();
    start_at(&mut poor, &[(P0, 0)]);
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    reject(&mut batch, P0, 0, 1, None, None, "empty");
    assert_eq!(poor.flush(&batch).unwrap(), Flushed::Durable);
    assert_eq!(db.count("host_metrics"), 1);

    // If a right is revoked during a run, the program stops and names it.
    let user = format!("poor_{}", db.name);
    let mut next = Batch::default();
    row(&mut next, &layout, P0, 2, 2, &ok("https://a.example/"));
    reject(&mut next, P0, 2, 3, None, None, "empty");
    for (right, table) in [
        ("INSERT", "host_metrics"),
        ("UPDATE", "host_metrics_offsets"),
        ("INSERT", "host_metrics_rejected"),
    ] {
        poor.open().unwrap();
        db.execute(&format!("REVOKE {right} ON {table} FROM {user}"));
        let text = fatal(poor.flush(&next));
        assert!(
            text.contains("42501") && text.contains(&format!("{table}\" to this user")),
            "{text}"
        );
        db.execute(&format!("GRANT {right} ON {table} TO {user}"));
    }
    poor.open().unwrap();
    assert_eq!(poor.flush(&next).unwrap(), Flushed::Durable);
}

#[test]
fn a_login_that_cannot_succeed_stops_with_what_to_do_and_shows_no_password() {
    let own = tls_server();
    let mut wrong = config(own.server(), "postgres", "m");
    wrong.database.user = "scram".into();
    wrong.database.password = Some(Secret::new("not-the-password".into()));
    let text = fatal(Store::new(&wrong).unwrap().open());
    assert!(text.contains("28P01") && text.contains("DB_PASSWORD"), "{text}");
    assert!(!text.contains("not-the-password"), "{text}");

    wrong.database.password = None;
    let text = fatal(Store::new(&wrong).unwrap().open());
    assert!(text.contains("password missing"), "{text}");

    let mut nowhere = config(server(), "no_such_database", "m");
    let text = fatal(Store::new(&nowhere).unwrap().open());
    assert!(text.contains("3D000") && text.contains("DB_NAME"), "{text}");

    nowhere.database.name = "postgres".into();
    nowhere.database.table.schema = Some("no_such_schema".into());
    let text = fatal(Store::new(&nowhere).unwrap().open());
    assert!(text.contains("\"no_such_schema\".\"m\" does not exist"), "{text}");

    // A database that does not exist yet is waited for.
    nowhere.database.port = host_metrics::commands::demo::postgres::free_port().unwrap();
    retry(Store::new(&nowhere).unwrap().open());
    nowhere.database.host = "no-such-host.invalid".into();
    retry(Store::new(&nowhere).unwrap().open());
}

#[test]
fn the_five_values_of_sslmode_mean_the_same_as_in_libpq() {
    let own = tls_server();
    use DbSslMode::{Disable, Prefer, Require, VerifyCa, VerifyFull};
    let (ca, other_ca) = (Some(own.file("ca.pem")), Some(own.file("other-ca.pem")));
    // The server's certificate is valid for localhost only. `Ok` has whether the connection is encrypted.
    type Case<'a> = (DbSslMode, &'a Option<PathBuf>, &'a str, Result<bool, &'a str>);
    let cases: [Case<'_>; 15] = [
        (Disable, &None, "127.0.0.1", Ok(false)),
        (Disable, &other_ca, "127.0.0.1", Ok(false)),
        (Prefer, &None, "127.0.0.1", Ok(true)),
        // With a CA that did not sign it, prefer continues without TLS.
        (Prefer, &other_ca, "127.0.0.1", Ok(false)),
        (Prefer, &ca, "127.0.0.1", Ok(true)),
        (Require, &None, "127.0.0.1", Ok(true)),
        // With a CA, require means verify-ca.
        (Require, &ca, "127.0.0.1", Ok(true)),
        (Require, &other_ca, "127.0.0.1", Err("certificate verify failed")),
        (VerifyCa, &ca, "127.0.0.1", Ok(true)),
        (VerifyCa, &other_ca, "127.0.0.1", Err("certificate verify failed")),
        // No CA that this machine trusts has signed it.
        (
            VerifyFull,
            &Some("system".into()),
            "localhost",
            Err("certificate verify failed"),
        ),
        (VerifyFull, &ca, "localhost", Ok(true)),
        (VerifyFull, &ca, "127.0.0.1", Err("IP address mismatch")),
        (
            VerifyFull,
            &other_ca,
            "localhost",
            Err("certificate verify failed"),
        ),
        (
            VerifyCa,
            &Some(own.file("no-such.pem")),
            "localhost",
            Err("no-such.pem"),
        ),
    ];
    for (mode, root, host, expected) in cases {
        let mut config = config(own.server(), "postgres", "m").database;
        config.host = host.into();
        config.ssl_mode = mode;
        config.ssl_root_cert = root.clone();
        let case = format!("{mode:?} {root:?} {host}");
        let runtime = bounded::runtime().unwrap();
        let encrypted = runtime.block_on(async {
            let session = Session::open(&config, Bounds::default()).await?;
            let row = session
                .client
                .query_one("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", &[])
                .await?;
            let encrypted: bool = row.get(0);
            session.close().await;
            Ok::<_, bounded::Fault>(encrypted)
        });
        match (encrypted, expected) {
            (Ok(is), Ok(expected)) => assert_eq!(is, expected, "{case}"),
            (Err(fault), Err(words)) => {
                assert!(fault.text.contains(words), "{case}: {fault}");
                assert_eq!(fault.kind, bounded::Kind::Operator, "{case}: {fault}");
            }
            (result, _) => panic!("{case}: {result:?}"),
        }
    }
    // A server without TLS.
    for (mode, is_fine) in [(Disable, true), (Prefer, true), (Require, false)] {
        let mut plain = config(server(), "postgres", "m").database;
        plain.ssl_mode = mode;
        let runtime = bounded::runtime().unwrap();
        let opened = runtime.block_on(Session::open(&plain, Bounds::default()));
        match opened {
            Ok(_) => assert!(is_fine, "{mode:?}"),
            Err(fault) => {
                assert!(
                    !is_fine && fault.text.contains("server does not support TLS"),
                    "{mode:?}: {fault}"
                );
                assert_eq!(fault.kind, bounded::Kind::Operator);
            }
        }
    }
    // A server that accepts this user only without TLS.
    let mut only_plain = config(own.server(), "postgres", "m").database;
    only_plain.user = "plain".into();
    let runtime = bounded::runtime().unwrap();
    runtime
        .block_on(Session::open(&only_plain, Bounds::default()))
        .unwrap();
    only_plain.ssl_mode = Require;
    let fault = runtime
        .block_on(Session::open(&only_plain, Bounds::default()))
        .err()
        .unwrap();
    assert!(fault.text.contains("pg_hba.conf"), "{fault}");
}

/// A server with a TLS certificate of its own CA, and users with different authentication methods.
struct TlsServer {
    server: ThrowAwayPostgres,
    directory: tempfile::TempDir,
}

fn tls_server() -> &'static TlsServer {
    static SERVER: OnceLock<TlsServer> = OnceLock::new();
    SERVER.get_or_init(|| {
        let server = ThrowAwayPostgres::start_with(&Settings {
            configuration: vec![("password_encryption".into(), "scram-sha-256".into())],
            ..Settings::default()
        })
        .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (ca, ca_key) = authority("host-metrics test CA");
        let (other_ca, _) = authority("another CA");
        std::fs::write(directory.path().join("ca.pem"), ca.pem()).unwrap();
        std::fs::write(directory.path().join("other-ca.pem"), other_ca.pem()).unwrap();

        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
        let issuer = rcgen::Issuer::new(ca_params("host-metrics test CA"), ca_key);
        let certificate = params.signed_by(&key, &issuer).unwrap();
        let place = |name: &str, text: &str| {
            let path = server.data_dir().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            if let Some((user, group)) = server.account() {
                chown(&path, Some(user), Some(group)).unwrap();
            }
        };
        place("server.crt", &certificate.pem());
        place("server.key", &key.serialize_pem());
        let text = format!("host=127.0.0.1 port={} user=postgres", server.port());
        let mut client = Client::connect(&text, NoTls).unwrap();
        client
            .batch_execute("CREATE ROLE scram LOGIN PASSWORD 'right'; CREATE ROLE plain LOGIN")
            .unwrap();
        drop(client);
        place(
            "pg_hba.conf",
            "host all scram all scram-sha-256\nhostnossl all plain all trust\nhost all postgres all trust\n",
        );
        server.configure(&[("ssl".into(), "on".into())]).unwrap();
        server.stop().unwrap();
        server.start_again().unwrap();
        TlsServer { server, directory }
    })
}

impl TlsServer {
    fn server(&self) -> &ThrowAwayPostgres {
        &self.server
    }

    fn file(&self, name: &str) -> PathBuf {
        Path::new(self.directory.path()).join(name)
    }
}

fn ca_params(name: &str) -> rcgen::CertificateParams {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params
}

fn authority(name: &str) -> (rcgen::Certificate, rcgen::KeyPair) {
    let key = rcgen::KeyPair::generate().unwrap();
    (ca_params(name).self_signed(&key).unwrap(), key)
}

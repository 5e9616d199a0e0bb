//! The temporary Postgres of the demo.

use std::net::TcpStream;

use host_metrics::commands::demo::postgres::{Settings, ThrowAwayPostgres};
use postgres::{Client, NoTls};

fn connect(server: &ThrowAwayPostgres) -> Client {
    postgres::Config::new()
        .host(server.host())
        .port(server.port())
        .user(server.superuser())
        .dbname(server.database())
        .connect(NoTls)
        .expect("the server accepts connections")
}

#[test]
fn a_throw_away_postgres_keeps_its_rows_over_a_crash_and_leaves_nothing_behind() {
    let server = ThrowAwayPostgres::start().unwrap();
    connect(&server)
        .batch_execute("CREATE TABLE t (n int); INSERT INTO t VALUES (7)")
        .unwrap();
    let mut open_session = connect(&server);
    server.restart_immediately().unwrap();
    assert!(
        open_session.simple_query("SELECT 1").is_err(),
        "the crash ended every session"
    );
    let n: i32 = connect(&server).query_one("SELECT n FROM t", &[]).unwrap().get(0);
    assert_eq!(n, 7);
    server.stop().unwrap();
    assert!(TcpStream::connect((server.host(), server.port())).is_err());
    server.start_again().unwrap();
    let (directory, port) = (server.data_dir(), server.port());
    let parent = directory.parent().unwrap().to_owned();
    assert!(directory.exists());
    drop(server);
    assert!(!parent.exists());
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[test]
fn a_throw_away_postgres_with_a_password_asks_for_it() {
    let settings = Settings {
        password: Some("s3cret".into()),
        ..Settings::default()
    };
    let server = ThrowAwayPostgres::start_with(&settings).unwrap();
    let mut config = postgres::Config::new();
    config
        .host(server.host())
        .port(server.port())
        .user(server.superuser())
        .dbname(server.database());
    assert!(config.connect(NoTls).is_err());
    assert!(config.password("wrong").connect(NoTls).is_err());
    config.password("s3cret").connect(NoTls).unwrap();
    assert!(
        server.psql_command().contains("postgres:s3cret@127.0.0.1"),
        "{}",
        server.psql_command()
    );
}

//! A database for one test, on the Postgres server that all tests share that do not disturb it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use host_metrics::commands::demo::postgres::ThrowAwayPostgres;
use host_metrics::config::{ConsumeConfig, DatabaseConfig, DbSslMode, KafkaConfig, KafkaSecurity};
use host_metrics::tables::names::TableName;
use postgres::{Client, NoTls};

/// For [`Database::count`]: the sessions of this database that wait for an advisory lock.
pub const WAITS_FOR_ADVISORY_LOCK: &str = "pg_locks WHERE locktype = 'advisory' AND NOT granted \
     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

pub fn server() -> &'static ThrowAwayPostgres {
    static SERVER: OnceLock<ThrowAwayPostgres> = OnceLock::new();
    SERVER.get_or_init(|| ThrowAwayPostgres::start().unwrap())
}

/// A new database on the shared server, with a superuser's connection to it.
pub struct Database {
    pub name: String,
    pub client: Client,
}

impl Database {
    pub fn exists(&mut self, table: &str) -> bool {
        self.one(&format!("SELECT (to_regclass('{table}') IS NOT NULL)::text")) == "true"
    }

    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}", COUNT.fetch_add(1, Ordering::Relaxed));
        superuser("postgres")
            .batch_execute(&format!("CREATE DATABASE {name}"))
            .unwrap();
        let client = superuser(&name);
        Self { name, client }
    }

    /// Another connection to an existing database.
    pub fn again(name: &str) -> Self {
        Self {
            name: name.into(),
            client: superuser(name),
        }
    }

    pub fn execute(&mut self, sql: &str) {
        self.client
            .batch_execute(sql)
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    pub fn one(&mut self, sql: &str) -> String {
        let row = self
            .client
            .query_one(sql, &[])
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        row.get(0)
    }

    pub fn many(&mut self, sql: &str) -> Vec<String> {
        let rows = self
            .client
            .query(sql, &[])
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        rows.iter().map(|row| row.get(0)).collect()
    }

    pub fn count(&mut self, table: &str) -> i64 {
        self.one(&format!("SELECT count(*)::text FROM {table}"))
            .parse()
            .unwrap()
    }
}

fn superuser(database: &str) -> Client {
    let server = server();
    let text = format!(
        "host={} port={} user={} dbname={database}",
        server.host(),
        server.port(),
        server.superuser()
    );
    Client::connect(&text, NoTls).unwrap()
}

/// The configuration of `consume` for this database, with a Kafka that does not exist.
pub fn config(server: &ThrowAwayPostgres, database: &str, table: &str) -> ConsumeConfig {
    ConsumeConfig {
        kafka: KafkaConfig {
            bootstrap_servers: "127.0.0.1:1".into(),
            security: KafkaSecurity {
                tls: None,
                sasl: None,
            },
        },
        topics: vec!["t".into(), "u".into()],
        group_id: "g".into(),
        group_instance_id: None,
        database: DatabaseConfig {
            host: server.host().into(),
            port: server.port(),
            name: database.into(),
            user: server.superuser().into(),
            password: None,
            table: TableName {
                schema: None,
                name: table.into(),
            },
            ssl_mode: DbSslMode::Prefer,
            ssl_root_cert: None,
        },
        batch_size: 100,
        batch_wait: Duration::from_secs(1),
        is_asynchronous: false,
        retention: None,
        state: None,
        metrics_addr: None,
    }
}

//! The first start of the bundled Postgres creates the agents' user and database, without the rights of a superuser.

use std::process::Command;

use host_metrics::commands::demo::postgres::ThrowAwayPostgres;
use host_metrics::commands::init;
use host_metrics::config::{DatabaseConfig, Secret};
use postgres::{Client, NoTls};

use crate::database;

const SCRIPT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/deploy/postgres/create-agents-user.sh"
);

#[test]
fn the_agents_user_owns_its_database_and_is_not_a_superuser() {
    // Names with special characters, which neither SQL nor the shell may interpret.
    let (user, password, name) = ("o'brien \"x\"", "pa$s'w\"o`rd\\", "metrics; -- $(x)");
    let server = ThrowAwayPostgres::start().unwrap();
    let psql = server.program("psql");
    let output = Command::new(SCRIPT)
        .env_clear()
        .env(
            "PATH",
            format!("{}:/usr/bin:/bin", psql.parent().unwrap().display()),
        )
        .env("PGHOST", server.host())
        .env("PGPORT", server.port().to_string())
        .env("POSTGRES_USER", server.superuser())
        .env("DB_USER", user)
        .env("DB_PASSWORD", password)
        .env("DB_NAME", name)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(said, "");

    let connect = |user: &str, password: &str, database: &str| {
        let mut config = Client::configure();
        config.host(server.host()).port(server.port()).user(user);
        config.password(password).dbname(database);
        config.connect(NoTls)
    };
    let mut superuser = connect(server.superuser(), "", "postgres").unwrap();
    let row = superuser
        .query_one(
            "SELECT rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls, rolpassword, pg_get_userbyid(datdba)
             FROM pg_authid, pg_database WHERE rolname = $1 AND datname = $2",
            &[&user, &name],
        )
        .unwrap();
    assert!(!row.get::<_, bool>(0), "rights that the agents do not need");
    assert!(row.get::<_, String>(1).starts_with("SCRAM-SHA-256$"));
    assert_eq!(row.get::<_, String>(2), user);

    // Only a server that requires the password shows that the password is right.
    let hba = server.data_dir().join("pg_hba.conf");
    std::fs::write(hba, "host all all all scram-sha-256\n").unwrap();
    superuser.batch_execute("SELECT pg_reload_conf()").unwrap();
    crate::scratch::wait_for(
        std::time::Duration::from_secs(20),
        "the password is asked for",
        || connect(user, "wrong", name).err(),
        || server.log(),
    );
    let mut theirs = connect(user, password, name).unwrap();
    init::make_tables(&DatabaseConfig {
        user: user.into(),
        password: Some(Secret::new(password.into())),
        ..database::config(&server, name, "host_metrics").database
    })
    .unwrap();
    theirs.batch_execute("TABLE host_metrics_latest").unwrap();
}

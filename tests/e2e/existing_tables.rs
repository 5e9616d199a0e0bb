//! Existing tables: `consume` writes the fields that they can hold, and logs at the start which fields they cannot hold.

use crate::agent::Agent;
use crate::case::{Case, SOON, wait_for_count};

/// DB_TABLE, the SQL that creates it, a row of it as text, and the beginning of the logged list of fields that are not
/// stored.
const TABLES: [(&str, &str, &str, &str); 8] = [
    (
        "original",
        "CREATE TABLE original (address varchar, latency numeric, status_code integer, is_valid boolean)",
        "(http://h/0,0.5,200,t)",
        "\"public\".\"original\" has no columns for these fields, which are not stored: outcome, error",
    ),
    (
        "single",
        "CREATE TABLE single (address text, latency real, status_code smallint, is_valid boolean)",
        "(http://h/0,0.5,200,t)",
        "\"public\".\"single\" has no columns for these fields, which are not stored: outcome, error",
    ),
    (
        "double",
        "CREATE TABLE double (address text, latency double precision, status_code bigint, is_valid boolean)",
        "(http://h/0,0.5,200,t)",
        "\"public\".\"double\" has no columns for these fields, which are not stored: outcome, error",
    ),
    (
        "extended",
        "CREATE TABLE extended (team text NOT NULL DEFAULT 'web', address text NOT NULL, \
         latency numeric(8,3), status_code integer, is_valid boolean NOT NULL, \
         is_slow boolean GENERATED ALWAYS AS (latency > 0.4) STORED, outcome text)",
        "(web,http://h/0,0.500,200,t,t,)",
        "\"public\".\"extended\" has no columns for these fields, which are not stored: error",
    ),
    (
        "facade",
        "CREATE TABLE hosts (name text, seen bigint); \
         CREATE VIEW facade AS SELECT name AS address, false AS is_valid FROM hosts; \
         CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
         INSERT INTO hosts VALUES (NEW.address, 1); RETURN NEW; END $$; \
         CREATE TRIGGER see INSTEAD OF INSERT ON facade FOR EACH ROW EXECUTE FUNCTION see()",
        "(http://h/0,f)",
        "\"public\".\"facade\" has no columns for these fields, which are not stored: latency",
    ),
    (
        "Our Checks.Host-Metrics",
        "CREATE SCHEMA \"Our Checks\"; CREATE TABLE \"Our Checks\".\"Host-Metrics\" (\"address\" text, \
         is_valid boolean, \"Latency\" real)",
        "(http://h/0,t,)",
        "\"Our Checks\".\"Host-Metrics\" has no columns for these fields, which are not stored: latency",
    ),
    (
        "Mixed.HostMetrics",
        "CREATE SCHEMA \"Mixed\"; CREATE TABLE \"Mixed\".\"HostMetrics\" (address text, \"Is_Valid\" boolean)",
        "(http://h/0,)",
        "\"Mixed\".\"HostMetrics\" has no columns for these fields, which are not stored: latency, status_code, is_valid",
    ),
    (
        "parts",
        "CREATE TABLE parts (address text, status_code integer) PARTITION BY LIST (status_code); \
         CREATE TABLE parts_good PARTITION OF parts FOR VALUES IN (200)",
        "(http://h/0,200)",
        "\"public\".\"parts\" has no columns for these fields, which are not stored: latency, is_valid",
    ),
];

/// The table in SQL.
fn quoted(table: &str) -> String {
    let parts: Vec<String> = table.split('.').map(|part| format!("\"{part}\"")).collect();
    parts.join(".")
}

#[test]
fn existing_tables_get_the_fields_they_can_hold_and_the_other_fields_are_logged_at_start() {
    const RECORDS: i64 = 30;
    let mut case = Case::new("existing", 2);
    let agents: Vec<Agent> = TABLES
        .iter()
        .map(|(table, sql, ..)| {
            case.db.execute(sql);
            let variables = case
                .variables()
                .with("LOG_LEVEL", "INFO")
                .with("DB_TABLE", table)
                .with("KAFKA_GROUP_ID", format!("existing {table}"));
            Agent::start(&["consume"], &variables)
        })
        .collect();
    case.write(0, 0..RECORDS / 2);
    case.write(1, RECORDS / 2..RECORDS);
    for ((table, _, row, not_stored), agent) in TABLES.iter().zip(agents) {
        let name = quoted(table);
        wait_for_count(&mut case.db, &name, RECORDS, &[&agent]);
        let rows = case.db.many(&format!("SELECT t::text FROM {name} t"));
        assert!(rows.iter().any(|found| found == row), "{table}: {rows:?}");
        assert_eq!(agent.said(not_stored), 1, "{table}: {}", agent.stderr());
        agent.stop();
    }
}

#[test]
fn a_user_with_the_contracts_rights_alone_stores_and_outlives_a_lost_connection() {
    let mut case = Case::new("poor", 1);
    let user = format!("writer_{}", case.db.name);
    case.db.execute(&format!(
        "CREATE ROLE {user} LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC; \
         CREATE TABLE host_metrics (address text, latency numeric, status_code integer, is_valid boolean); \
         GRANT INSERT ON host_metrics TO {user}"
    ));
    // The tables next to it, created by hand as docs/reference/tables.md says.
    let mut init = Agent::start(&["init"], &case.variables());
    assert_eq!(init.wait(SOON).code(), Some(0), "{}", init.stderr());
    case.db.execute(&format!(
        "GRANT SELECT, INSERT, UPDATE ON host_metrics_offsets TO {user}; GRANT INSERT ON host_metrics_rejected TO {user}"
    ));
    let consumer = Agent::start(&["consume"], &case.variables().with("DB_USER", &user));
    case.write(0, 0..10);
    case.wait_for_rows(10, &[&consumer]);
    case.end_backends();
    case.write(0, 10..20);
    case.kafka
        .write(case.name, [(0, None, Some(b"no record".to_vec()))]);
    case.wait_for_rows(20, &[&consumer]);
    wait_for_count(&mut case.db, "host_metrics_rejected", 1, &[&consumer]);
    consumer.stop();
}

#[test]
fn a_column_added_while_running_is_written_after_the_next_connection() {
    let mut case = Case::new("grown", 1);
    case.db
        .execute("CREATE TABLE host_metrics (address text, is_valid boolean)");
    let consumer = Agent::start(&["consume"], &case.variables().with("DB_BATCH_SIZE", 7));
    case.write(0, 0..20);
    case.wait_for_rows(20, &[&consumer]);
    case.db
        .execute("ALTER TABLE host_metrics ADD latency real, ADD kafka_offset bigint");
    case.end_backends();
    case.write(0, 20..40);
    case.wait_for_rows(40, &[&consumer]);
    // These records were read before the connection broke, but none was written with the old columns.
    assert_eq!(
        case.db
            .count("host_metrics WHERE latency = 0.5 AND kafka_offset >= 20"),
        20
    );
    let doubled = "(SELECT FROM host_metrics GROUP BY address HAVING count(*) > 1) t";
    assert_eq!(case.db.count(doubled), 0);
    consumer.stop();
}

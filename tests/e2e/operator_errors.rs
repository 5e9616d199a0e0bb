//! Errors that only the operator can correct: `consume` stops immediately with status 1, tells what to do, shows no password, and
//! has committed nothing that is not stored.

use host_metrics::commands::demo::postgres::{Settings, ThrowAwayPostgres};

use crate::agent::{Agent, Variables};
use crate::case::{Case, SOON};

const PASSWORD: &str = "hunter2-never-shown";

/// Runs `consume` until it ends, and returns its log.
fn gives_up(variables: &Variables) -> String {
    // At TRACE, every line that could show a secret is logged.
    let mut consumer = Agent::start(&["consume"], &variables.clone().with("LOG_LEVEL", "TRACE"));
    let status = consumer.wait(SOON);
    let said = consumer.stderr();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(!said.contains(PASSWORD), "{said}");
    assert_eq!(consumer.stdout(), "");
    said
}

/// The last line, which has the error.
fn last_line(said: &str) -> &str {
    said.lines().next_back().unwrap_or_default()
}

#[test]
fn an_error_that_the_operator_must_correct_ends_consume_with_advice() {
    let mut case = Case::new("operator", 1);
    case.write(0, 0..10);
    let user = format!("poor_{}", case.db.name);
    case.db.execute(&format!(
        "CREATE ROLE {user} LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC; \
         CREATE TABLE unfit (address integer, is_valid text); \
         CREATE TABLE demanding (address text, customer integer NOT NULL); \
         CREATE TABLE strangers (number integer); \
         CREATE TABLE denied (address text, is_valid boolean); \
         CREATE VIEW glass AS SELECT address FROM denied"
    ));
    let base = case.variables().with("DB_PASSWORD", PASSWORD);
    let poor = base.clone().with("DB_USER", &user);
    for (variables, words) in [
        (
            base.clone().with("DB_NAME", "nowhere"),
            &["\"nowhere\" does not exist", "DB_NAME"][..],
        ),
        (
            base.clone().with("DB_TABLE", "nowhere.metrics"),
            &["schema \"nowhere\"", "DB_TABLE"],
        ),
        (
            base.clone().with("DB_USER", "nobody_known"),
            &["\"nobody_known\"", "DB_USER"],
        ),
        (
            base.clone().with("DB_TABLE", "unfit"),
            &["\"unfit\"", "\"address\"", "\"is_valid\"", "integer"],
        ),
        (
            base.clone().with("DB_TABLE", "demanding"),
            &["customer", "NOT NULL without a default"],
        ),
        (
            base.clone().with("DB_TABLE", "strangers"),
            &["none of the columns"],
        ),
        (base.clone().with("DB_TABLE", "glass"), &["INSTEAD OF INSERT"]),
        (
            poor.clone().with("DB_TABLE", "denied"),
            &["permission denied: GRANT INSERT ON \"public\".\"denied\" TO"],
        ),
        (
            poor.clone(),
            &["\"host_metrics\" does not exist", "host-metrics init"],
        ),
    ] {
        let said = gives_up(&variables);
        for words in words {
            assert!(
                last_line(&said).contains(words),
                "expected {words:?} in the last line of\n{said}"
            );
        }
    }
    // The view is refused with the first batch. Until then the group may have committed where it began.
    let committed = case.kafka.committed("operator", "operator");
    assert!(matches!(committed[..], [None | Some(0)]), "{committed:?}");
}

#[test]
fn a_wrong_password_ends_consume_and_is_never_shown() {
    let case = Case::new("password", 1);
    case.write(0, 0..10);
    let server = ThrowAwayPostgres::start_with(&Settings {
        password: Some("the right one".into()),
        ..Settings::default()
    })
    .unwrap();
    let variables = case.variables().database(&server);
    let said = gives_up(&variables.clone().with("DB_PASSWORD", PASSWORD));
    assert!(
        last_line(&said).contains("password authentication failed")
            && last_line(&said).contains("DB_PASSWORD"),
        "{said}"
    );
    let said = gives_up(&variables);
    assert!(last_line(&said).contains("password"), "{said}");
    assert_eq!(case.kafka.committed("password", "password"), [None]);
}

#[test]
fn rights_and_tables_that_are_removed_end_consume_and_after_their_return_no_record_is_lost() {
    let mut case = Case::new("taken", 2);
    let user = format!("taken_{}", case.db.name);
    case.db.execute(&format!(
        "CREATE ROLE {user} LOGIN; GRANT ALL ON SCHEMA public TO {user}"
    ));
    let variables = case.variables().with("DB_USER", &user);
    let mut rows = 0;
    for (take, words, give) in [
        (
            format!("REVOKE INSERT ON host_metrics FROM {user}"),
            "GRANT INSERT ON \"public\".\"host_metrics\"",
            format!("GRANT INSERT ON host_metrics TO {user}"),
        ),
        (
            format!("REVOKE UPDATE ON host_metrics_offsets FROM {user}"),
            "GRANT SELECT, INSERT, UPDATE ON \"public\".\"host_metrics_offsets\"",
            format!("GRANT UPDATE ON host_metrics_offsets TO {user}"),
        ),
        (
            "ALTER TABLE host_metrics RENAME COLUMN latency TO duration".to_owned(),
            "start again",
            "ALTER TABLE host_metrics RENAME COLUMN duration TO latency".to_owned(),
        ),
        (
            "ALTER TABLE host_metrics RENAME TO elsewhere".to_owned(),
            "host-metrics init",
            "ALTER TABLE elsewhere RENAME TO host_metrics".to_owned(),
        ),
    ] {
        let mut consumer = Agent::start(&["consume"], &variables);
        case.write(0, rows..rows + 10);
        case.wait_for_rows(rows + 10, &[&consumer]);
        // An owner cannot lose rights. So the user creates the tables, and then another user owns them.
        case.db.execute(&format!(
            "REASSIGN OWNED BY {user} TO postgres; GRANT INSERT ON host_metrics, host_metrics_rejected TO {user}; \
             GRANT SELECT, INSERT, UPDATE ON host_metrics_offsets TO {user}"
        ));
        case.db.execute(&take);
        case.write(1, rows + 10..rows + 20);
        let status = consumer.wait(SOON);
        let said = consumer.stderr();
        assert_eq!(status.code(), Some(1), "{take}: {said}");
        assert!(
            last_line(&said).contains(words),
            "{take}: expected {words:?} in the last line of\n{said}"
        );
        case.db.execute(&give);
        let again = Agent::start(&["consume"], &variables);
        rows += 20;
        case.wait_for_rows(rows, &[&again]);
        again.stop();
    }
    case.assert_exactly_once(&["taken"]);
}

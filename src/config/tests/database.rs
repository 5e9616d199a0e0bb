//! The forms of DB_HOST and DB_TABLE.

use super::*;

fn wrong_database(pair: (&str, &str)) -> String {
    let pairs = DATABASE
        .into_iter()
        .filter(|(name, _)| *name != pair.0)
        .chain([pair]);
    let lines = wrong(consume(&Variables::from_pairs(pairs)));
    assert_eq!(lines.len(), 1, "{lines:?}");
    lines.into_iter().next().unwrap()
}

#[test]
fn a_database_host_is_a_name_an_address_or_a_directory() {
    for (text, host) in [
        ("db", "db"),
        ("10.0.0.7", "10.0.0.7"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("/var/run/postgresql", "/var/run/postgresql"),
    ] {
        assert_eq!(consumed(&[("DB_HOST", text)]).database.host, host);
    }
}

#[test]
fn a_value_that_is_not_a_database_host_is_answered_with_the_remedy() {
    let cases = [
        (
            "postgres://me:hunter2@db.example:6432/metrics",
            "set DB_HOST=db.example, and set DB_PORT",
        ),
        (
            "postgresql://me:hunter2@[::1]/metrics",
            "set DB_HOST=::1, and set DB_PORT",
        ),
        (
            "postgresql://me:hun/ter2@db/metrics",
            "this is a URL: set DB_HOST to its host",
        ),
        (
            "postgres://db/metrics?user=me&password=hun@ter2",
            "this is a URL: set DB_HOST to its host",
        ),
        (
            "jdbc:postgresql://db/metrics?password=hunter2",
            "set DB_HOST=db, and set DB_PORT",
        ),
        ("postgres://me:hunter2", "this is a URL: set DB_HOST to its host"),
        ("host=db password=hunter2", ""),
        ("db:5432", "set DB_HOST=db and DB_PORT=5432"),
        ("[::1]:5432", "set DB_HOST=::1 and DB_PORT=5432"),
        ("h1,h2", ""),
        ("h1:5432,h2:5432", ""),
        ("me:hunter2@db", ""),
        ("db/metrics", ""),
        ("\"localhost\"", "the quotes are part of the value: remove them"),
        ("'localhost'", "the quotes are part of the value: remove them"),
        ("$DB", "variables are not expanded here"),
        ("5432", ""),
        ("[db]", ""),
        ("a b", ""),
    ];
    for (host, remedy) in cases {
        let line = wrong_database(("DB_HOST", host));
        let expected =
            ": expected the name or IP address of one host, or the directory of the database's socket";
        assert!(line.starts_with("DB_HOST=") && line.contains(expected), "{line}");
        assert!(line.contains(remedy), "{line}");
        assert!(!line.contains("hunter2") && !line.contains("ter2"), "{line}");
    }
}

#[test]
fn parts_of_a_connection_in_the_wrong_variable_are_named() {
    let line = wrong_database(("DB_PORT", "tcp://10.0.0.7:5432"));
    assert!(line.contains("set `enableServiceLinks: false`"), "{line}");
    let line = wrong_database(("DB_NAME", "postgres://me:hunter2@db/metrics"));
    assert!(
        line.contains("the name of the database only") && !line.contains("hunter2"),
        "{line}"
    );
    let line = wrong_database(("DB_USER", "me:hunter2"));
    assert!(
        line.contains("DB_PASSWORD to the password") && !line.contains("hunter2"),
        "{line}"
    );
    for quoted in ["'host_metrics'", "\"host_metrics\""] {
        let line = wrong_database(("DB_TABLE", quoted));
        assert!(line.contains("the quotes are part of the value"), "{line}");
    }
}

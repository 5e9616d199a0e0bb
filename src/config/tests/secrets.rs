//! Secrets; no message shows one.

use super::*;

#[test]
fn a_secret_can_come_from_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("password");
    let name = path.to_str().unwrap();
    for (contents, secret) in [
        ("secret", "secret"),
        (" se cret\n", " se cret"),
        ("secret\r\n", "secret"),
    ] {
        fs::write(&path, contents).unwrap();
        let config = consumed(&[("DB_PASSWORD_FILE", name)]);
        assert_eq!(config.database.password.unwrap().reveal(), secret);
    }
    let both = [("DB_PASSWORD_FILE", name), ("DB_PASSWORD", "other")];
    assert_eq!(
        wrong(consume(&variables(&DATABASE, &both))),
        ["DB_PASSWORD and DB_PASSWORD_FILE are both set: unset one of them"]
    );
    for (contents, expected) in [
        (b"".as_slice(), "the file is empty"),
        (b"\xffsecret", "the file is not UTF-8"),
    ] {
        fs::write(&path, contents).unwrap();
        let lines = wrong(consume(&variables(&DATABASE, &[("DB_PASSWORD_FILE", name)])));
        assert!(
            lines[0].starts_with(&format!("DB_PASSWORD_FILE={path:?}: {expected}")),
            "{lines:?}"
        );
        assert!(!lines[0].contains("secret"));
    }
    fs::write(&path, "me").unwrap();
    let config = produced(&[
        ("KAFKA_SECURITY_PROTOCOL", "SASL_PLAINTEXT"),
        ("KAFKA_SASL_MECHANISM", "PLAIN"),
        ("KAFKA_SASL_USERNAME_FILE", name),
        ("KAFKA_SASL_PASSWORD_FILE", name),
    ]);
    assert_eq!(config.kafka.security.sasl.unwrap().username.reveal(), "me");
}

#[test]
fn a_file_that_every_user_can_read_causes_a_warning_with_its_variable() {
    use std::os::unix::fs::PermissionsExt;

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("secret");
    fs::write(&path, "never shown").unwrap();
    let name = path.to_str().unwrap();
    let kafka = [
        "KAFKA_SSL_KEY_FILE",
        "KAFKA_SASL_USERNAME_FILE",
        "KAFKA_SASL_PASSWORD_FILE",
    ];
    let all = Variables::from_pairs(
        [&kafka[..], &["DB_PASSWORD_FILE"]]
            .concat()
            .into_iter()
            .map(|variable| (variable, name)),
    );
    for (mode, is_exposed) in [
        (0o600, false),
        (0o440, false),
        (0o666, true),
        (0o444, true),
        (0o604, true),
    ] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        for (servers, variables) in [
            ((true, false), &kafka[..]),
            ((false, true), &["DB_PASSWORD_FILE"]),
        ] {
            let (kafka, database) = servers;
            let lines = exposed_secrets(&all, Servers { kafka, database });
            let expected: Vec<String> = variables
                .iter()
                .filter(|_| is_exposed)
                .map(|variable| {
                    format!(
                        "{variable}={path:?}: every user of this machine can read the file (mode {mode:04o}); `chmod \
                         o-r` prevents that"
                    )
                })
                .collect();
            assert_eq!(lines, expected, "{mode:o}");
        }
    }
    let none = [("KAFKA_SSL_KEY_FILE", "/nowhere/key.pem")];
    assert_eq!(
        exposed_secrets(&Variables::from_pairs(none), Servers::BOTH),
        [""; 0]
    );
    assert_eq!(
        exposed_secrets(&Variables::from_pairs([]), Servers::BOTH),
        [""; 0]
    );
}

#[test]
fn a_secret_in_place_of_its_file_is_not_shown() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    for (name, is_kafka) in [
        ("DB_PASSWORD_FILE", false),
        ("KAFKA_SASL_PASSWORD_FILE", true),
        ("KAFKA_SASL_USERNAME_FILE", true),
    ] {
        for (value, is_shown) in [
            ("hunter2", false),
            ("/hunter2", false),
            (missing.to_str().unwrap(), true),
        ] {
            let result = match is_kafka {
                true => consume(&variables(
                    &DATABASE,
                    &[("KAFKA_SECURITY_PROTOCOL", "x"), (name, value)],
                )),
                false => consume(&variables(&DATABASE, &[(name, value)])),
            };
            let lines = wrong(result);
            let line = lines.last().unwrap();
            assert!(line.starts_with(name) && line.contains("No such file"), "{line}");
            assert_eq!(line.contains(value), is_shown, "{line}");
        }
    }
}

#[test]
fn a_known_secret_is_hidden_in_every_variable() {
    let secret = ("DB_PASSWORD", "hunter2!");
    for (name, value) in [
        ("DB_PORT", "hunter2!"),
        ("DB_TABLE", "a.b.hunter2!"),
        ("DB_SSLROOTCERT", "/x/hunter2!"),
    ] {
        let lines = wrong(consume(&variables(&DATABASE, &[secret, (name, value)])));
        assert!(
            lines[0].contains("***") && !lines[0].contains("hunter2"),
            "{lines:?}"
        );
    }
}

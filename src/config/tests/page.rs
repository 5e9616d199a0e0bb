//! The PAGE_* variables.

use super::*;

fn paged(others: &[(&str, &str)]) -> Result<PageConfig, WrongVariables> {
    page(&variables(&DATABASE[1..], others))
}

#[test]
fn the_page_has_defaults_and_needs_no_kafka() {
    let config = paged(&[]).unwrap();
    assert_eq!(config.addr, "127.0.0.1:9480".parse().unwrap());
    assert_eq!(config.options.title, "Status");
    assert!(!config.options.shows_addresses);
    assert!(config.logins.is_empty());

    let config = paged(&[
        ("PAGE_ADDR", "[::]:80"),
        ("PAGE_TITLE", "Our status"),
        ("PAGE_SHOW_ADDRESSES", "yes"),
    ]);
    let config = config.unwrap();
    assert_eq!(config.addr, "[::]:80".parse().unwrap());
    assert_eq!(config.options.title, "Our status");
    assert!(config.options.shows_addresses);
}

#[test]
fn wrong_values_are_reported_together() {
    let lines = wrong(paged(&[
        ("PAGE_ADDR", "localhost:9480"),
        ("PAGE_TITLE", " two\nlines"),
        ("PAGE_SHOW_ADDRESSES", "true"),
        ("PAGE_AUTH_FILE", "/nowhere"),
    ]));
    let starts = [
        "PAGE_ADDR=\"localhost:9480\": expected an IP address and a port, e.g. 127.0.0.1:9480; write 127.0.0.1:9480",
        "PAGE_TITLE=\" two\\nlines\": expected one line",
        "PAGE_SHOW_ADDRESSES=\"true\": expected yes or no",
        "PAGE_AUTH_FILE: cannot read the file",
    ];
    assert_eq!(lines.len(), starts.len(), "{lines:#?}");
    for (line, start) in lines.iter().zip(starts) {
        assert!(line.starts_with(start), "{line}");
    }
}

#[test]
fn logins_come_from_a_file_and_no_message_shows_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("logins");
    let name = path.to_str().unwrap();
    fs::write(&path, "ann:open sesame\r\n\nbob:b:c\n").unwrap();
    let config = paged(&[("PAGE_AUTH_FILE", name)]).unwrap();
    let logins: Vec<_> = config.logins.iter().map(Secret::reveal).collect();
    assert_eq!(logins, ["ann:open sesame", "bob:b:c"]);
    for wrong_line in ["hunter2", ":hunter2", "hunter2:"] {
        fs::write(&path, format!("ann:b\n{wrong_line}\n")).unwrap();
        let lines = wrong(paged(&[("PAGE_AUTH_FILE", name)]));
        assert_eq!(
            lines,
            ["PAGE_AUTH_FILE: expected a file with user:password on each line"]
        );
    }
}

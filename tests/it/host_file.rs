//! The host file: what a line means, and the exact text of every error.

use std::time::Duration;

use host_metrics::check::target::{IpFamily, Method, StatusSet, Target};
use host_metrics::produce::host_file::{parse, target};
use proptest::prelude::*;

fn hosts(text: &str) -> Vec<Target> {
    parse("hosts", text.as_bytes())
        .unwrap_or_else(|error| panic!("{error}"))
        .targets
}

fn warnings(text: &str) -> Vec<String> {
    parse("hosts", text.as_bytes())
        .unwrap_or_else(|error| panic!("{error}"))
        .warnings
}

fn host(line: &str) -> Target {
    let [host]: [Target; 1] = hosts(line).try_into().unwrap();
    host
}

fn error(text: impl AsRef<[u8]>) -> String {
    match parse("hosts", text.as_ref()) {
        Ok(hosts) => panic!(
            "no error in {:?}: {hosts:?}",
            String::from_utf8_lossy(text.as_ref())
        ),
        Err(error) => error.to_string(),
    }
}

/// The first line of the error, which must be the only one.
fn what(text: impl AsRef<[u8]>) -> String {
    let error = error(text);
    assert_eq!(error.lines().count(), 3, "not one error:\n{error}");
    error.lines().next().unwrap().to_owned()
}

#[test]
fn the_documented_example_is_understood() {
    let hosts = hosts(
        "# a comment: the first character that is not a blank is a '#'; blank lines are fine\n\
         \x20  # every 5 minutes, as in the original\n\
         https://google.com 5\n\
         \n\
         # a bare domain is https://example.com/\n\
         example.com 30s\n\
         http://10.0.0.7:8080/health 1m (status: (ok|warn))\n\
         https://shop.example/ 10s timeout=3s status=200-299,301 Add to basket\n",
    );
    let seen: Vec<_> = hosts
        .iter()
        .map(|host| (host.address.as_str(), host.url.as_str(), host.interval.as_secs()))
        .collect();
    assert_eq!(
        seen,
        [
            ("https://google.com", "https://google.com/", 300),
            ("example.com", "https://example.com/", 30),
            ("http://10.0.0.7:8080/health", "http://10.0.0.7:8080/health", 60),
            ("https://shop.example/", "https://shop.example/", 10),
        ]
    );
    assert!(hosts[2].regex.as_ref().unwrap().is_match("now status: warn now"));
    assert_eq!(hosts[3].timeout, Some(Duration::from_secs(3)));
    assert_eq!(hosts[3].status, Some(StatusSet(vec![200..=299, 301..=301])));
    assert_eq!(hosts[3].regex.as_ref().unwrap().as_str(), "Add to basket");
}

#[test]
fn an_address_is_a_url_or_a_bare_domain_or_ip_with_or_without_a_port() {
    let cases = [
        ("https://example.com", "https://example.com/"),
        ("HTTP://Example.COM:80/A?b=c", "http://example.com/A?b=c"),
        ("https://example.com/a/@b", "https://example.com/a/@b"),
        (
            "https://example.com/a?next=http://x/",
            "https://example.com/a?next=http://x/",
        ),
        ("https://example.com/a#b", "https://example.com/a"),
        (r"https://example.com/?a=\d", r"https://example.com/?a=\d"),
        ("http://example.com:/", "http://example.com/"),
        ("example.com", "https://example.com/"),
        ("example.com:8443", "https://example.com:8443/"),
        (
            "example.com/status?next=http://x/",
            "https://example.com/status?next=http://x/",
        ),
        ("localhost", "https://localhost/"),
        ("localhost:8080", "https://localhost:8080/"),
        ("10.0.0.7", "https://10.0.0.7/"),
        ("10.0.0.7:81", "https://10.0.0.7:81/"),
        ("[::1]", "https://[::1]/"),
        ("[2001:db8::1]:8443", "https://[2001:db8::1]:8443/"),
        ("http://[::1]:8080/x", "http://[::1]:8080/x"),
        ("my_service.internal.", "https://my_service.internal./"),
        ("http://-foo.test", "http://-foo.test/"),
        ("https://bücher.example/ä", "https://xn--bcher-kva.example/%C3%A4"),
        ("пример.испытание", "https://xn--e1afmkfd.xn--80akhbyknj4f/"),
    ];
    for (address, url) in cases {
        let host = host(&format!("{address} 5"));
        assert_eq!((host.address.as_str(), host.url.as_str()), (address, url));
    }
}

#[test]
fn an_invalid_address_is_reported_at_its_place() {
    let long = format!("https://example.com/{}", "a".repeat(2_048));
    let cases = [
        ("://x", "hosts:1:1: expected http:// or https://, not `://`"),
        (
            "ht!tp://x",
            "hosts:1:1: expected http:// or https://, not `ht!tp://`",
        ),
        (
            "ftp://example.com/",
            "hosts:1:1: expected http:// or https://, not `ftp://`",
        ),
        (
            "file:///etc/passwd",
            "hosts:1:1: expected http:// or https://, not `file://`",
        ),
        ("https://", "hosts:1:1: `https://` is not an address: empty host"),
        (
            "http:example.com",
            "hosts:1:1: `http:example.com` is not an address: invalid port number",
        ),
        (
            "https://exa$mple.com/",
            "hosts:1:1: `https://exa$mple.com/` is not an address: `exa$mple.com` is not a valid host name",
        ),
        (
            "a..b",
            "hosts:1:1: `a..b` is not an address: `a..b` is not a valid host name",
        ),
        (
            "foo-.test",
            "hosts:1:1: `foo-.test` is not an address: `foo-.test`: a certificate cannot contain this name",
        ),
        (
            "https://-foo.test:8443/x",
            "hosts:1:1: `https://-foo.test:8443/x` is not an address: `-foo.test`: a certificate cannot contain this name",
        ),
        (
            "a.b-.test",
            "hosts:1:1: `a.b-.test` is not an address: `a.b-.test`: a certificate cannot contain this name",
        ),
        (
            "/health",
            "hosts:1:1: `/health` is not an address: it has no host",
        ),
        ("?x", "hosts:1:1: `?x` is not an address"),
        (
            "http:///example.com",
            "hosts:1:1: `http:///example.com` is not an address: it has no host",
        ),
        (
            "http:/example.com",
            "hosts:1:1: `http:/example.com` is not an address: the port after the `:` is missing",
        ),
        (
            "example.com:",
            "hosts:1:1: `example.com:` is not an address: the port after the `:` is missing",
        ),
        (
            "http:\\\\example.com",
            "hosts:1:6: there is a backslash in the address",
        ),
        (
            "https://a.com\\b",
            "hosts:1:14: there is a backslash in the address",
        ),
        ("5", "hosts:1:1: `5` is not an address: it is a number"),
        ("10.1", "hosts:1:1: `10.1` is not an address: it is a number"),
        (
            "example.com:99999",
            "hosts:1:1: `example.com:99999` is not an address: invalid port number",
        ),
        (
            "example.com:0",
            "hosts:1:1: `example.com:0` is not an address: 0 is not a valid port",
        ),
        (
            "256.1.1.1",
            "hosts:1:1: `256.1.1.1` is not an address: invalid IPv4 address",
        ),
        ("::1", "hosts:1:1: put an IPv6 address in brackets: `[::1]`"),
        (
            "[::g]",
            "hosts:1:1: `[::g]` is not an address: invalid IPv6 address",
        ),
        (
            "exam\u{a0}ple.com",
            "hosts:1:5: there is a control character or an unusual space",
        ),
        (
            "exam\u{1b}ple.com",
            "hosts:1:5: there is a control character or an unusual space",
        ),
        (
            &long,
            "hosts:1:1: the address is 2068 bytes long; the limit is 2048",
        ),
    ];
    for (address, expected) in cases {
        let what = what(format!("{address} 5"));
        assert!(what.starts_with(expected), "{address}\n{what}");
    }
    // The longest address that is allowed.
    host(&format!("{} 5", &long[..2_048]));
}

#[test]
fn credentials_in_an_address_are_an_error_that_does_not_repeat_them() {
    let cases = [
        ("https://user:secret@example.com/ 5", 9),
        ("user:secret@example.com 5", 1),
        ("https://secret@example.com/ 5", 9),
        ("https://user:sec/ret@example.com/ 5", 9),
        (r"https://user:sec\ret@example.com/ 5", 9),
        (r"https://user\:secret@example.com/ 5", 9),
        (r"https:\\user:secret@example.com/ 5", 1),
        ("ftp://user:secret@example.com/ 5", 7),
        ("https://user:secret@example.com/ 5x", 9),
        ("5 https://user:secret@example.com/", 1),
        ("example.com 5 status=oh https://user:secret@example.com/", 22),
    ];
    for (line, column) in cases {
        let error = error(line);
        assert!(error.starts_with(&format!("hosts:1:{column}: ")), "{error}");
        assert!(error.contains("***"), "{error}");
        assert!(!error.contains("sec") && !error.contains("ret@"), "{error}");
    }
    assert_eq!(
        error("  https://user:secret@example.com/ 5x"),
        "hosts:1:11: remove the credentials from the address (`https://***@example.com/`): every record would contain them\n    \
         \x20 https://***@example.com/ 5x\n    \
         \x20         ^\n\
         hosts:1:36: `5x` is not a valid FREQUENCY: expected a whole number of minutes, or one with s, m, h or d, e.g. `5` or `30s`\n    \
         \x20 https://***@example.com/ 5x\n    \
         \x20                          ^"
    );
}

#[test]
fn a_frequency_is_in_minutes_or_has_a_unit() {
    let cases = [
        ("5", 300),
        ("1s", 1),
        ("90s", 90),
        ("2h", 7_200),
        ("366d", 366 * 86_400),
        ("527040", 366 * 86_400),
    ];
    for (frequency, seconds) in cases {
        assert_eq!(
            host(&format!("example.com {frequency}")).interval,
            Duration::from_secs(seconds)
        );
    }
}

#[test]
fn an_invalid_frequency_is_reported_at_its_place() {
    let expected = "expected a whole number of minutes, or one with s, m, h or d, e.g. `5` or `30s`";
    for frequency in [
        "-5",
        "5x",
        "5.5",
        "1m30s",
        "fast",
        "timeout=3s",
        "5S",
        "٥",
        "500ms",
    ] {
        assert_eq!(
            what(format!("example.com {frequency}")),
            format!("hosts:1:13: `{frequency}` is not a valid FREQUENCY: {expected}")
        );
    }
    for frequency in [
        "0",
        "0s",
        "367d",
        "527041",
        "99999999999999999999999",
        "18446744073709551616d",
    ] {
        assert_eq!(
            what(format!("example.com {frequency}")),
            format!("hosts:1:13: the FREQUENCY `{frequency}` is out of range: expected 1s to 366d")
        );
    }
    for line in ["example.com", "example.com \t "] {
        assert_eq!(
            what(line),
            format!("hosts:1:12: FREQUENCY is missing: {expected}")
        );
    }
}

#[test]
fn a_lone_unit_is_a_slip_and_not_a_regex() {
    assert_eq!(
        error("https://example.com 5 s"),
        "hosts:1:23: `s` is separated from its number; write `5s` without a space; to use it as a REGEX, write `(s)`\n    \
         https://example.com 5 s\n    \
         \x20                     ^"
    );
    for unit in ["s", "m", "h", "d"] {
        assert!(what(format!("example.com 5 {unit}")).contains(&format!("write `5{unit}` without a space")));
        assert!(what(format!("example.com 5 {unit} more text")).contains("is separated from its number"));
        assert!(what(format!("example.com 5m timeout=3s {unit}")).contains("as in `5s`"));
        let regex = host(&format!("example.com 5 ({unit})")).regex.unwrap();
        assert_eq!(regex.as_str(), format!("({unit})"));
    }
    for line in ["example.com 5 timeout=3s d e", "example.com 5m d e"] {
        assert_eq!(host(line).regex.unwrap().as_str(), "d e");
    }
}

#[test]
fn an_address_with_two_protocols_is_refused() {
    for (line, expected) in [
        (
            "https://https://example.com/ 5",
            "hosts:1:1: `https://https://example.com/` is not an address: `https` is a protocol, not a host",
        ),
        (
            "http://HTTPS://example.com/ 5",
            "`https` is a protocol, not a host; write `https://` once",
        ),
        ("https//example.com 5", "`https` is a protocol, not a host"),
        ("https://http/example.com 5", "`http` is a protocol, not a host"),
    ] {
        assert!(what(line).contains(expected), "{}", what(line));
    }
}

#[test]
fn a_line_that_is_probably_a_mistake_causes_a_warning_with_its_place() {
    for (line, expected) in [
        (
            "example.com 5 # main page",
            "hosts:1:15: `# main page` is part of the REGEX; write a comment on a line of its own",
        ),
        (
            "example.com 5 timeout=3s ## main",
            "hosts:1:26: `## main` is part of the REGEX",
        ),
        (
            "example.com 5 #main",
            "hosts:1:15: `#main` is part of the REGEX; write a comment on a line of its own",
        ),
        (
            "example.com 5 // main",
            "hosts:1:15: `// main` is part of the REGEX",
        ),
        (
            "example.com 5 Welcome  # main",
            "hosts:1:24: `# main` is part of the REGEX",
        ),
        (
            "example.com 5 \"quoted\"",
            "hosts:1:15: the quotes around `\"quoted\"` are part of the REGEX",
        ),
        ("example.com 5 'a b'", "the quotes around `'a b'`"),
        ("example.com 5 “a”", "the quotes around `“a”`"),
        ("example.com 5 /health/", "the slashes around `/health/`"),
        (
            "example.com 5 Add to basket timeout=3s",
            "hosts:1:29: `timeout=3s` is part of the REGEX; write options before it",
        ),
    ] {
        let warnings = warnings(&format!("\n{line}\n"));
        assert_eq!(warnings.len(), 1, "{line}: {warnings:?}");
        let at_second_line = expected.replacen("hosts:1:", "hosts:2:", 1);
        assert!(warnings[0].contains(&at_second_line), "{warnings:?}");
    }
    for regex in [
        "Add to basket",
        "\"status\":\"ok\"",
        "(# main)",
        "Issue#5",
        "status: ok",
        "status page",
        "<a href=\"/\">",
        "/a/b/c",
        "since 2019",
        "secondary",
        "timeouts",
        "price name=x",
    ] {
        assert_eq!(warnings(&format!("example.com 5 {regex}\n")), [""; 0], "{regex}");
    }
    let many: String = (0..150).map(|n| format!("h{n}.example 5 'x'\n")).collect();
    let warnings = warnings(&many);
    assert_eq!(
        (warnings.len(), warnings[100].as_str()),
        (101, "and 50 more lines like these")
    );
}

#[test]
fn options_are_understood_in_any_order() {
    let host = host(
        "example.com 1m ip=6 tls=insecure follow=0\tmethod=HEAD  topic=a.b_c-1 timeout=500ms status=404",
    );
    assert_eq!(host.ip_family, Some(IpFamily::V6));
    assert!(host.tls_insecure);
    assert_eq!(host.follow, 0);
    assert_eq!(host.method, Method::Head);
    assert_eq!(host.topic.as_deref(), Some("a.b_c-1"));
    assert_eq!(host.timeout, Some(Duration::from_millis(500)));
    assert_eq!(host.status, Some(StatusSet(vec![404..=404])));

    let plain = hosts("example.com 1m method=GET ip=4").remove(0);
    assert_eq!((plain.method, plain.ip_family), (Method::Get, Some(IpFamily::V4)));
    assert_eq!(
        (plain.follow, plain.tls_insecure, plain.timeout),
        (10, false, None)
    );
}

#[test]
fn a_word_that_looks_like_an_option_is_an_error_that_shows_how_to_write_it_as_a_regex() {
    let cases = [
        (
            "status=ok",
            20,
            "`status=ok`: expected codes and ranges, e.g. `200-299,301`",
        ),
        (
            "status=",
            20,
            "`status=`: expected codes and ranges, e.g. `200-299,301`",
        ),
        (
            "status=300-200",
            20,
            "`status=300-200`: expected codes and ranges, e.g. `200-299,301`",
        ),
        (
            "status=200,",
            20,
            "`status=200,`: expected codes and ranges, e.g. `200-299,301`",
        ),
        (
            "status=20",
            20,
            "`status=20`: expected codes and ranges, e.g. `200-299,301`",
        ),
        (
            "status=099",
            20,
            "`status=099`: expected codes and ranges, e.g. `200-299,301`",
        ),
        (
            "status=2000",
            20,
            "`status=2000`: expected codes and ranges, e.g. `200-299,301`",
        ),
        (
            "status=2é0",
            20,
            "`status=2é0`: expected codes and ranges, e.g. `200-299,301`",
        ),
        (
            "timeout=3",
            21,
            "`timeout=3`: expected a time above 0, e.g. `3s` or `500ms`",
        ),
        (
            "timeout=0s",
            21,
            "`timeout=0s`: expected a time above 0, e.g. `3s` or `500ms`",
        ),
        (
            "timeout=99999999999d",
            21,
            "`timeout=99999999999d`: expected a time above 0, e.g. `3s` or `500ms`",
        ),
        (
            "method=PUSH",
            20,
            "`method=PUSH`: expected `GET`, `HEAD`, `POST`, `PUT`, `PATCH`, `DELETE` or `OPTIONS`",
        ),
        ("follow=-1", 20, "`follow=-1`: expected a number from 0 to 100"),
        ("follow=101", 20, "`follow=101`: expected a number from 0 to 100"),
        ("follow=+1", 20, "`follow=+1`: expected a number from 0 to 100"),
        (
            "topic=a/b",
            19,
            "`topic=a/b`: expected at most 249 letters, digits, `.`, `_` and `-`",
        ),
        (
            "topic=..",
            19,
            "`topic=..`: expected at most 249 letters, digits, `.`, `_` and `-`",
        ),
        ("ip=5", 16, "`ip=5`: expected `4` or `6`"),
        (
            "tls=secure",
            17,
            "`tls=secure`: expected `insecure` or `required`",
        ),
        (
            "class=big",
            13,
            "`class` is not an option; the options are timeout, status, method, follow, topic, ip, tls, header, body, auth, cert, plain-auth, proxy, slow, cert-days, json, name and group",
        ),
        (
            "Status=200",
            13,
            "`Status` is not an option; the options are timeout, status, method, follow, topic, ip, tls, header, body, auth, cert, plain-auth, proxy, slow, cert-days, json, name and group",
        ),
    ];
    for (word, column, expected) in cases {
        // `example.com 5 ` is two columns wider than the columns above count.
        let column = column + 2;
        assert_eq!(
            what(format!("example.com 5 {word}")),
            format!("hosts:1:{column}: {expected}; to use it as a REGEX, write `({word})`")
        );
        let regex = host(&format!("example.com 5 ({word})")).regex.unwrap();
        assert_eq!(regex.as_str(), format!("({word})"));
    }
    assert_eq!(
        what("example.com 5 ip=4 timeout=3s ip=6"),
        "hosts:1:31: `ip` is given twice; to use it as a REGEX, write `(ip=6)`"
    );
}

#[test]
fn the_regex_is_the_rest_of_the_line_verbatim() {
    let cases = [
        ("Add to basket", "Add to basket"),
        ("  two  blanks\tand a tab \t", "two  blanks\tand a tab"),
        ("# no comment", "# no comment"),
        ("a # b", "a # b"),
        ("price status=200 timeout=x", "price status=200 timeout=x"),
        ("=x", "=x"),
        ("(?i)grüße", "(?i)grüße"),
        ("\"quoted\"", "\"quoted\""),
        ("status=200 ip=4 ok", "ok"),
    ];
    for (text, regex) in cases {
        assert_eq!(
            host(&format!("example.com 5 {text}")).regex.unwrap().as_str(),
            regex
        );
    }
    assert!(host("example.com 5 status=200").regex.is_none());
}

#[test]
fn the_error_of_a_broken_regex_points_to_its_place() {
    assert_eq!(
        error("example.com 5 ok (unclosed group"),
        "hosts:1:18: the REGEX is not valid: unclosed group\n    \
         example.com 5 ok (unclosed group\n    \
         \x20                ^"
    );
    let cases = [
        ("a)", "hosts:1:16: the REGEX is not valid: unopened group"),
        (
            "[a",
            "hosts:1:15: the REGEX is not valid: unclosed character class",
        ),
        (
            "äö*+**(?<",
            "hosts:1:24: the REGEX is not valid: unclosed capture group name",
        ),
        (
            "a{5,2}",
            "hosts:1:16: the REGEX is not valid: invalid repetition count range, the start must be <= the end",
        ),
        (
            r"\p{Klingon}",
            "hosts:1:15: the REGEX is not valid: Unicode property not found",
        ),
        (
            r"(a)\1",
            "hosts:1:18: the REGEX is not valid: backreferences are not supported",
        ),
        (
            "(?=a)",
            "hosts:1:15: the REGEX is not valid: look-around, including look-ahead and look-behind, is not supported",
        ),
        (
            r"\w{1000}{1000}",
            "hosts:1:15: the REGEX is not valid: it takes more than 4194304 bytes when compiled",
        ),
    ];
    for (regex, expected) in cases {
        let what = what(format!("example.com 5 {regex}"));
        assert!(what.starts_with(expected), "{what}");
    }
    let long = format!("example.com 5 {}", "a".repeat(20_000));
    assert_eq!(
        what(&long),
        "hosts:1:15: the REGEX is 20000 bytes long; the limit is 16384"
    );
}

#[test]
fn all_regexes_of_a_file_together_have_a_bound_and_equal_ones_count_once() {
    let hosts = |regex: &dyn Fn(usize) -> String| -> String {
        let lines = (0..200).map(|number| format!("h{number}.example 5 {}\n", regex(number)));
        lines.collect()
    };
    let parse_of = |hosts: &str| parse("hosts", hosts.as_bytes());
    assert_eq!(
        parse_of(&hosts(&|_| r"\w{3,60}".into())).unwrap().targets.len(),
        200
    );
    assert_eq!(
        parse_of(&hosts(&|number| format!(r"\d{{2}} items {number}")))
            .unwrap()
            .targets
            .len(),
        200
    );
    let told = parse_of(&hosts(&|number| format!(r"\w{{3,60}}{number}")))
        .unwrap_err()
        .to_string();
    let first = told.lines().next().unwrap();
    let what = "the compiled regexes of the file, up to this one, take more than 64 MiB; use the same REGEX on several lines";
    assert!(first.contains(what), "{first}");
    // Each line beyond the bound is an error, and no line before it.
    let lines = told.lines().filter(|line| line.starts_with("hosts:")).count();
    assert!((100..199).contains(&lines), "{lines}");
}

#[test]
fn head_cannot_have_a_regex() {
    assert_eq!(
        what("example.com 5 method=HEAD ok"),
        "hosts:1:27: method=HEAD has no response body to search for the REGEX; remove one of the two"
    );
}

#[test]
fn the_same_address_twice_names_both_lines() {
    assert_eq!(
        error("# first\nexample.com 5\nhttps://example.com 5\n\n example.com 30s ok\n"),
        "hosts:5:2: line 2 has the same address; remove one of the two lines\n    \
         \x20example.com 30s ok\n    \
         \x20^"
    );
}

#[test]
fn a_file_without_a_host_is_an_error() {
    for text in [
        "",
        "\n\n",
        "# only\n  # comments\n",
        " \t\r\n",
        "\u{feff}",
        "\u{feff}# x",
    ] {
        assert!(
            what(text).starts_with("hosts:1:1: the file has no hosts; write one per line: ADDRESS FREQUENCY"),
            "{text:?}"
        );
    }
}

#[test]
fn line_ends_blanks_around_a_line_and_a_byte_order_mark_do_not_count() {
    let hosts =
        hosts("\u{feff}example.com 5\r\n\t https://a.example \t 1m  ok \t\r\n\r\n  # c\r\nb.example 1h");
    let lines: Vec<_> = hosts.iter().map(ToString::to_string).collect();
    assert_eq!(
        lines,
        ["example.com 5m", "https://a.example 1m ok", "b.example 1h"]
    );
    assert_eq!(
        what("\u{feff}example.com 5x\r\n").split(' ').next(),
        Some("hosts:1:13:")
    );
}

#[test]
fn invalid_utf_8_is_reported_with_its_line_and_column() {
    assert_eq!(
        error(b"example.com 5\nhttps://\xc3\xa4.example 5 gr\xfc\xdfe\n# comments \xe4 too"),
        "hosts:2:23: not UTF-8; save the file as UTF-8\n    \
         https://ä.example 5 gr\u{fffd}\u{fffd}e\n    \
         \x20                     ^\n\
         hosts:3:12: not UTF-8; save the file as UTF-8\n    \
         # comments \u{fffd} too\n    \
         \x20          ^"
    );
    for utf_16 in [b"\xff\xfee\0x\0".as_slice(), b"\xfe\xff\0e\0x"] {
        assert_eq!(what(utf_16), "hosts:1:1: the file is UTF-16; save it as UTF-8");
    }
}

#[test]
fn all_errors_of_a_file_are_reported_together_in_the_order_of_lines_and_columns() {
    let error = error("ftp://a 5x ip=7 foo=1 (\nexample.com 5\nb\n");
    let places: Vec<_> = error
        .lines()
        .filter(|line| line.starts_with("hosts:"))
        .map(|line| line.splitn(4, ':').take(3).collect::<Vec<_>>().join(":"))
        .collect();
    assert_eq!(
        places,
        [
            "hosts:1:1",
            "hosts:1:9",
            "hosts:1:15",
            "hosts:1:17",
            "hosts:1:23",
            "hosts:3:2"
        ]
    );
}

#[test]
fn of_very_many_errors_the_first_hundred_are_shown_and_the_rest_counted() {
    let error = error("x\n".repeat(1_000));
    assert_eq!(error.lines().count(), 301);
    assert!(error.ends_with("\nand 1899 more errors"));
}

#[test]
fn tabs_are_kept_so_that_the_caret_stands_below_its_character() {
    assert_eq!(
        error("\texample.com\t5x"),
        "hosts:1:14: `5x` is not a valid FREQUENCY: expected a whole number of minutes, or one with s, m, h or d, \
         e.g. `5` or `30s`\n    \t\
         example.com\t5x\n    \t\
         \x20          \t^"
    );
}

#[test]
fn a_very_long_line_is_cut_around_the_caret() {
    let error = error(format!(
        "https://example.com/{} 5x {}",
        "a".repeat(1_000),
        "b".repeat(1_000)
    ));
    let lines: Vec<_> = error.lines().collect();
    assert!(lines[0].starts_with("hosts:1:1022: "));
    assert_eq!(
        lines[1],
        format!("    …{} 5x {}…", "a".repeat(59), "b".repeat(57))
    );
    assert_eq!(lines[2], format!("    {}^", " ".repeat(61)));
}

#[test]
fn control_characters_do_not_reach_the_terminal() {
    let error = error("example.com 5 \u{1b}[31m(\u{7}\u{9b}");
    assert!(
        !error.contains(|c: char| c.is_control() && c != '\n'),
        "{error:?}"
    );
}

#[test]
fn a_file_of_megabytes_is_read_or_refused_like_any_other() {
    let many: String = (0..50_000)
        .map(|number| format!("host-{number}.example.com 5m status=200\n"))
        .collect();
    assert_eq!(hosts(&many).len(), 50_000);

    // One line, one word, one word many times, only spaces: each takes linear time.
    for piece in ["a", "a=b ", "https://a:b@c ", "@", " ", "# ", "(", "5 "] {
        let line = piece.repeat(2_000_000 / piece.len());
        let error = error(&line);
        assert!(error.len() < 100_000, "{piece:?}");
    }
}

#[test]
fn the_check_command_builds_its_target_of_the_same_parts() {
    let options = ["status=404".to_owned(), "timeout=2s".to_owned()];
    let target_of = |regex| target("example.com", &options, regex).unwrap();
    let checked = target_of(Some("status=ok s"));
    assert_eq!(checked.url.as_str(), "https://example.com/");
    assert_eq!(checked.status, Some(StatusSet(vec![404..=404])));
    assert_eq!(checked.timeout(Duration::from_secs(10)), Duration::from_secs(2));
    assert_eq!(checked.regex.unwrap().as_str(), "status=ok s");
    assert!(target_of(None).regex.is_none());

    let error = target("https://x/a b", &[], None).unwrap_err().to_string();
    assert!(
        error.starts_with("ADDRESS:12: there is a space or a tab in the address; write a space as %20\n"),
        "{error}"
    );
    let options = ["status".to_owned(), "ip=5".to_owned(), "method=HEAD".to_owned()];
    let error = target("https://u:secret@x/", &options, Some("a b("))
        .unwrap_err()
        .to_string();
    let firsts: Vec<_> = error.lines().step_by(3).collect();
    assert_eq!(
        firsts,
        [
            "ADDRESS:9: remove the credentials from the address (`https://***@x/`): every record would contain them",
            "OPTION:1: expected NAME=VALUE; the options are timeout, status, method, follow, topic, ip, tls, header, body, auth, cert, plain-auth, proxy, slow, cert-days, json, name and group",
            "OPTION:4: `ip=5`: expected `4` or `6`",
            "REGEX:4: the REGEX is not valid: unclosed group",
        ]
    );
    assert!(!error.contains("secret"));
    assert!(target("", &[], None).is_err());
    assert!(target("x", &["method=HEAD".to_owned()], Some("a")).is_err());
}

fn words() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        Just("https://example.com/".to_owned()),
        Just("https://u:p@h/".to_owned()),
        Just("5".to_owned()),
        Just("30s".to_owned()),
        Just("status=200-299,404".to_owned()),
        Just("timeout=3s".to_owned()),
        Just("method=HEAD".to_owned()),
        Just("#".to_owned()),
        Just("\t".to_owned()),
        Just("\r".to_owned()),
        Just("\n".to_owned()),
        Just("\u{feff}".to_owned()),
        "[a-z]{1,3}=[0-9a-z,-]{0,4}",
        "[a-z0-9.:/@\\[\\]?#\\\\-]{0,12}",
        "\\PC{0,6}",
        ".{0,6}",
    ];
    prop::collection::vec(word, 0..12).prop_map(|words| words.join(" "))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse("hosts", &bytes);
    }

    #[test]
    fn no_words_make_it_panic_and_every_error_has_its_line_and_caret(text in words()) {
        if let Err(error) = parse("hosts", text.as_bytes()) {
            let error = error.to_string();
            let lines: Vec<_> = error.lines().collect();
            prop_assert_eq!(lines.len() % 3, 0, "{}", error);
            for fault in lines.chunks(3) {
                prop_assert!(fault[0].starts_with("hosts:"));
                let column = fault[2].chars().count();
                prop_assert!(fault[2].ends_with('^') && column <= fault[1].chars().count() + 1, "{}", error);
            }
        }
        let _ = target(&text, std::slice::from_ref(&text), Some(&text));
    }

    #[test]
    fn a_printed_target_parses_back_to_itself(
        address in "(https?://)?[a-z]{1,8}\\.[a-z]{2,3}(:[1-9][0-9]{0,3})?(/[a-z@?=&]{0,8})?",
        seconds in 1_u64..=366 * 86_400,
        timeout in prop::option::of(1_u64..10_000_000),
        status in prop::option::of(prop::collection::vec((100_u16..=999, 0_u16..100), 1..4)),
        head in any::<bool>(),
        follow in 0_u32..=100,
        topic in prop::option::of("[a-zA-Z0-9._-]{3,9}"),
        family in prop::option::of(any::<bool>()),
        tls in 0..3,
        regex in prop::option::of("\\([a-zA-Z#= \t.]{1,12}\\)"),
    ) {
        let mut written = host(&format!("{address} {seconds}s"));
        written.timeout = timeout.map(Duration::from_millis);
        written.status = status.map(|codes| StatusSet(
            codes.into_iter().map(|(start, more)| start..=(start + more).min(999)).collect()
        ));
        written.method = if head { Method::Head } else { Method::Get };
        written.follow = follow;
        written.topic = topic;
        written.ip_family = family.map(|v4| if v4 { IpFamily::V4 } else { IpFamily::V6 });
        written.tls_insecure = tls == 1;
        written.tls_required = tls == 2;
        if let (Some(regex), false) = (regex, head) {
            written.regex = host(&format!("a.example 1 {regex}")).regex;
        }
        let read = host(&written.to_string());
        prop_assert_eq!(format!("{read:?}"), format!("{written:?}"));
    }
}

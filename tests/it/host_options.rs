//! The options of the host file that say what a request contains and how its answer is judged, and profiles.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use host_metrics::check::target::{HeaderValue, Method, Proxy, Target};
use host_metrics::produce::host_file::{Files, Hosts, OPTION_NAMES, parse_with, read, target_with};

/// A folder with a host file, the bodies that it names, and secrets.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.secret("shop", "me:hunter2\n");
        folder.secret("key", "hunter3");
        folder
    }

    fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.0.path().join(name), contents).unwrap();
    }

    fn secret(&self, name: &str, contents: impl AsRef<[u8]>) {
        self.write(name, contents);
        let private = fs::Permissions::from_mode(0o600);
        fs::set_permissions(self.0.path().join(name), private).unwrap();
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn parse(&self, text: &str) -> Result<Hosts, String> {
        let files = Files::new(Some(self.path()), Some(self.path()));
        parse_with("hosts", text.as_bytes(), &files).map_err(|error| error.to_string())
    }

    fn hosts(&self, text: &str) -> Vec<Target> {
        self.parse(text).unwrap_or_else(|error| panic!("{error}")).targets
    }

    fn host(&self, line: &str) -> Target {
        let [host]: [Target; 1] = self.hosts(line).try_into().unwrap();
        host
    }

    /// The first line of each error.
    fn errors(&self, text: &str) -> Vec<String> {
        let error = self.parse(text).map(|hosts| hosts.targets).unwrap_err();
        assert!(!error.contains("hunter"), "{error}");
        error.lines().step_by(3).map(str::to_owned).collect()
    }

    fn warnings(&self, text: &str) -> Vec<String> {
        self.parse(text)
            .unwrap_or_else(|error| panic!("{error}"))
            .warnings
    }
}

#[test]
fn every_option_is_understood_and_printed_as_it_is_read() {
    let folder = Folder::new();
    let authority = crate::site::Authority::new("clients");
    let (certificate, key) = authority.leaf_pem(&["me"]);
    folder.secret("me.crt", certificate);
    folder.secret("me.key", key);
    folder.write("body.json", r#"{"a":1}"#);
    let host = folder.host(
        "https://a.example/#1 30s method=POST header=\"Accept: a/b; c=\\\"d\\\\e\\\"\" header=X-Empty:1 \
         header=\"X-Key: Token @key\" body=@body.json auth=@shop cert=@me proxy=http://[::1]:3128 slow=800ms \
         cert-days=14 json=/data/status:ok json=\"/a~1b:x y\" name=\"Shop front\" group=Shops ! \"id\":\\d+",
    );
    assert_eq!(host.url.as_str(), "https://a.example/");
    assert_eq!(host.method, Method::Post);
    let names: Vec<_> = host.headers.iter().map(|header| header.name.as_str()).collect();
    assert_eq!(names, ["Accept", "X-Empty", "X-Key"]);
    assert!(matches!(&host.headers[0].value, HeaderValue::Plain(text) if text == r#"a/b; c="d\e""#));
    assert!(
        matches!(&host.headers[2].value, HeaderValue::Secret(prefix, secret)
        if prefix == "Token " && secret.value().header_value() == "hunter3")
    );
    assert_eq!(host.body.as_ref().unwrap().bytes[..], *br#"{"a":1}"#);
    assert_eq!(
        host.auth.as_ref().unwrap().value().header_value(),
        "Basic bWU6aHVudGVyMg=="
    );
    assert_eq!(host.cert.as_ref().unwrap().name(), "me");
    assert_eq!(
        host.proxy,
        Some(Proxy {
            host: "::1".into(),
            port: 3128
        })
    );
    assert_eq!(host.slow, Some(Duration::from_millis(800)));
    assert_eq!(host.cert_days, Some(14));
    assert_eq!(host.json[1].expected, "x y");
    assert_eq!(host.name.as_deref(), Some("Shop front"));
    assert_eq!(host.group.as_deref(), Some("Shops"));
    assert!(host.regex_absent);
    assert_eq!(host.regex.as_ref().unwrap().as_str(), "\"id\":\\d+");

    let written = host.to_string();
    let again = folder.host(&written);
    assert_eq!(format!("{again:?}"), format!("{host:?}"));
    assert!(!format!("{written}{host:?}").contains("hunter"));

    let plain =
        folder.host("http://a.example/ 30s plain-auth=yes auth=@shop method=PUT body=\"@ \\\"x\\\" \\\\\"");
    assert!(plain.plain_auth && plain.body.as_ref().unwrap().file.is_none());
    assert_eq!(plain.body.as_ref().unwrap().bytes[..], *b"@ \"x\" \\");
    assert_eq!(
        format!("{:?}", folder.host(&plain.to_string())),
        format!("{plain:?}")
    );
    // The others are in `host_file`.
    for name in &OPTION_NAMES[7..] {
        let option = format!(" {name}=");
        assert!(
            [&written, &plain.to_string()]
                .iter()
                .any(|line| line.contains(&option)),
            "{name}"
        );
    }
}

#[test]
fn a_fragment_makes_two_hosts_of_one_url() {
    let hosts =
        Folder::new().hosts("https://x.example/#stock 1m in stock\nhttps://x.example/#price 1m EUR\n");
    let seen: Vec<_> = hosts
        .iter()
        .map(|host| (host.address.as_str(), host.url.as_str()))
        .collect();
    assert_eq!(
        seen,
        [
            ("https://x.example/#stock", "https://x.example/"),
            ("https://x.example/#price", "https://x.example/")
        ]
    );
}

#[test]
fn profiles_give_options_to_hosts_in_any_order_and_an_option_beside_them_wins() {
    let folder = Folder::new();
    let hosts = folder.hosts(
        "https://a.example/ 30s @shop timeout=2s @slow header=\"x-b: own\" json=/b:own \"id\":\\d+\n\
         \t@shop method=POST header=\"X-A: shop\" header=\"X-B: shop\" auth=@shop slow=1s timeout=9s json=/a:1 json=/b:2\r\n\
         @slow slow=5s\n\
         https://b.example/ 30s @slow @shop\n",
    );
    let [a, b] = &hosts[..] else { panic!("{hosts:?}") };
    assert_eq!(
        (a.method, a.timeout, a.slow),
        (
            Method::Post,
            Some(Duration::from_secs(2)),
            Some(Duration::from_secs(5))
        )
    );
    assert!(a.auth.is_some());
    let headers: Vec<_> = a
        .headers
        .iter()
        .map(|header| format!("{}={:?}", header.name, header.value))
        .collect();
    assert_eq!(headers, ["X-A=Plain(\"shop\")", "x-b=Plain(\"own\")"]);
    let rules: Vec<_> = a.json.iter().map(ToString::to_string).collect();
    assert_eq!(rules, ["/a:1", "/b:own"]);
    assert_eq!(a.regex.as_ref().unwrap().as_str(), "\"id\":\\d+");
    // Of two profiles, the later one wins.
    assert_eq!(b.slow, Some(Duration::from_secs(1)));

    let lines = "@p auth=@shop\n@q header=\"Authorization: @key\"\na.example 5 @p header=\"authorization: @key\"\nb.example 5 @q auth=@shop\n";
    let hosts = folder.hosts(lines);
    assert_eq!((hosts[0].auth.is_some(), hosts[0].headers.len()), (false, 1));
    assert_eq!((hosts[1].auth.is_some(), hosts[1].headers.len()), (true, 0));
}

#[test]
fn all_mistakes_in_profiles_are_told_at_their_places() {
    let folder = Folder::new();
    let errors = folder.errors(
        "@a slow=1s @a\n\
         @a slow=2s\n\
         @b slow=fast follow=1 follow=2 nothing=1 text\n\
         @c\n\
         @/x slow=1s\n\
         @ slow=1s\n\
         a.example 5 @a @a @d @b ok\n\
         b.example 5 @head ok\n\
         @head method=HEAD auth=@nothing\n",
    );
    assert_eq!(
        errors,
        [
            "hosts:1:12: a profile cannot use a profile; name both on the host's line",
            "hosts:2:1: line 1 defines `@a` too; remove one of the two",
            "hosts:3:9: `slow=fast`: expected a time above 0, e.g. `800ms`",
            "hosts:3:23: `follow` is given twice",
            &format!("hosts:3:32: `nothing` is not an option; the options are {OPTIONS}"),
            "hosts:3:42: expected option=value; a profile has no FREQUENCY and no REGEX",
            "hosts:4:1: the profile has no options",
            "hosts:5:1: expected the name of a profile: letters, digits, `.`, `_` and `-` after the `@`",
            "hosts:6:1: expected the name of a profile: letters, digits, `.`, `_` and `-` after the `@`",
            "hosts:7:16: `@a` is given twice",
            "hosts:7:19: there is no profile `@d`; the profiles are @a, @b, @c, @head; to use it as a REGEX, write `(@d)`",
            "hosts:8:19: method=HEAD has no response body to search for the REGEX; remove one of the two",
            &format!(
                "hosts:9:24: the secret @nothing: {:?} cannot be read: No such file or directory (os error 2)",
                folder.path().join("nothing")
            ),
        ]
    );
}

const OPTIONS: &str = "timeout, status, method, follow, topic, ip, tls, header, body, auth, cert, plain-auth, proxy, slow, \
                       cert-days, json, name and group";

#[test]
fn without_profiles_an_at_sign_begins_a_regex() {
    let host = Folder::new().host("a.example 5 @media print");
    assert_eq!(host.regex.unwrap().as_str(), "@media print");
}

#[test]
fn quotes_stand_around_values_only_and_have_to_end() {
    let folder = Folder::new();
    let cases = [
        (
            r#"name="Shop"#,
            "hosts:1:20: the quotes that begin here do not end",
        ),
        (
            r#"name="Shop\" x"#,
            "hosts:1:20: the quotes that begin here do not end",
        ),
        (r#"name=""#, "hosts:1:20: the quotes that begin here do not end"),
        (
            r#"name="Shop"x"#,
            "hosts:1:26: expected a space after the closing quote",
        ),
        (
            r#"name="a\d""#,
            r#"hosts:1:22: within quotes, write `\\` for a backslash and `\"` for a quote"#,
        ),
        (
            r#"name="""#,
            "hosts:1:20: `name=\"\"`: expected 1 to 100 characters, in double quotes if there are spaces in it; \
                        to use it as a REGEX, write `(name=\"\")`",
        ),
    ];
    for (option, expected) in cases {
        let errors = folder.errors(&format!("a.example 15m {option}"));
        // A value in quotes is never meant as a REGEX.
        let expected = expected.split("; to use").next().unwrap();
        assert_eq!(errors, [expected], "{option}");
    }
    let host = folder.host(r#"a.example 15m name="a\\\"b" "quoted" text"#);
    assert_eq!(host.name.as_deref(), Some(r#"a\"b"#));
    assert_eq!(host.regex.unwrap().as_str(), r#""quoted" text"#);
    assert_eq!(
        folder.host(r#"a.example 15m timeout="3s""#).timeout,
        Some(Duration::from_secs(3))
    );
}

#[test]
fn a_header_has_a_name_and_a_printable_value_and_is_not_the_clients() {
    let folder = Folder::new();
    let cases = [
        (
            "header=X",
            "there is no `:` in the header; write header=\"NAME: VALUE\" with the quotes",
        ),
        (
            "header=X: y",
            "the header ends at the first space; write header=\"NAME: VALUE\" with the quotes",
        ),
        (
            "header=X:\"y z\"",
            "the header ends at the first space; write header=\"NAME: VALUE\" with the quotes",
        ),
        (
            "header=\": y\"",
            "`` is not a header's name; write header=\"NAME: VALUE\" with the quotes",
        ),
        (
            "header=\"X Y: z\"",
            "`X Y` is not a header's name; write header=\"NAME: VALUE\" with the quotes",
        ),
        (
            "header=\"X: a\rb\"",
            "the value of X has characters that are not printable ASCII",
        ),
        (
            "header=\"X: a\0b\"",
            "the value of X has characters that are not printable ASCII",
        ),
        (
            "header=\"X: gr\u{fc}n\"",
            "the value of X has characters that are not printable ASCII",
        ),
        (
            "header=\"content-length: 5\"",
            "the client sets the header content-length itself; remove it",
        ),
        (
            "header=\"Connection: close\"",
            "the client sets the header Connection itself; remove it",
        ),
        (
            "header=\"Transfer-Encoding: chunked\"",
            "the client sets the header Transfer-Encoding itself; remove it",
        ),
        (
            "header=\"X: @../key\"",
            "expected `@NAME` with the name of a file in SECRETS_DIR",
        ),
        (
            "header=\"X: Bearer @\"",
            "expected `@NAME` with the name of a file in SECRETS_DIR",
        ),
    ];
    for (option, expected) in cases {
        let errors = folder.errors(&format!("https://a.example/ 15m {option}"));
        assert_eq!(errors, [format!("hosts:1:31: {expected}")], "{option:?}");
    }
    assert_eq!(
        folder.errors("https://a.example/ 15m header=\"X: a\" header=\"x: b\" json=/a:1 json=/a:2"),
        [
            "hosts:1:38: `header` for `x` is given twice",
            "hosts:1:62: `json` for `/a` is given twice; to use it as a REGEX, write `(json=/a:2)`"
        ]
    );
    assert!(
        folder
            .parse("https://a.example/ 15m header=\"Host: b.example\"")
            .is_ok()
    );
    let many = " header=X-0:1".repeat(101);
    let errors = folder.errors(&format!("https://a.example/ 15m{many} ok"));
    assert!(
        errors
            .last()
            .unwrap()
            .ends_with("the line has more than 100 options"),
        "{errors:?}"
    );
}

#[test]
fn a_body_from_a_file_is_a_regular_file_of_at_most_1_mib() {
    let folder = Folder::new();
    folder.write("large", vec![b'x'; (1 << 20) + 1]);
    folder.write("full", vec![b'x'; 1 << 20]);
    fs::create_dir(folder.path().join("folder")).unwrap();
    let fifo = std::process::Command::new("mkfifo")
        .arg(folder.path().join("fifo"))
        .status()
        .unwrap();
    assert!(fifo.success());
    for (file, why) in [
        ("missing", "No such file or directory (os error 2)"),
        ("folder", "it is not a regular file"),
        ("fifo", "it is not a regular file"),
        ("large", "it is longer than 1048576 bytes"),
    ] {
        let errors = folder.errors(&format!("a.example 5 method=POST body=@{file}"));
        let path = folder.path().join(file);
        assert_eq!(errors, [format!("hosts:1:30: {path:?} cannot be read: {why}")]);
    }
    let host = folder.host("a.example 5 method=POST body=@full");
    assert_eq!(host.body.unwrap().bytes.len(), 1 << 20);
    // The path is relative to the host file.
    let path = folder.path().join("hosts");
    fs::write(&path, "a.example 5 method=POST body=@full\n").unwrap();
    assert_eq!(read(&path, None).unwrap().targets.len(), 1);
}

#[test]
fn a_secret_that_cannot_be_used_is_an_error_of_its_line_that_does_not_show_it() {
    let folder = Folder::new();
    folder.secret("empty", "\n");
    folder.secret("lines", "hunter4\nhunter5\n");
    folder.secret("token", "hunter6");
    folder.secret("long", "hunter7".repeat(2_000));
    fs::create_dir(folder.path().join("folder")).unwrap();
    let authority = crate::site::Authority::new("clients");
    let (certificate, key) = authority.leaf_pem(&["me"]);
    folder.secret("other.crt", &certificate);
    folder.secret("other.key", authority.leaf_pem(&["you"]).1);
    folder.secret("broken.crt", "-----BEGIN");
    folder.secret("broken.key", &key);
    folder.secret("lone.crt", &certificate);
    folder.secret("keyless.crt", &certificate);
    folder.secret("keyless.key", "hunter8");
    let path = |name: &str| format!("{:?}", folder.path().join(name));
    for (option, column, why) in [
        (
            "auth=hunter9",
            24,
            "expected `@NAME` with the name of a file in SECRETS_DIR".into(),
        ),
        (
            "auth=@../shop",
            24,
            "expected `@NAME` with the name of a file in SECRETS_DIR".into(),
        ),
        ("auth=@empty", 24, "the secret @empty: the file is empty".into()),
        (
            "auth=@lines",
            24,
            "the secret @lines: expected one line without control characters in the file".into(),
        ),
        (
            "auth=@token",
            24,
            "the secret @token: expected `user:password` or `Bearer TOKEN` in the file".into(),
        ),
        (
            "auth=@long",
            24,
            format!(
                "the secret @long: {} cannot be read: it is longer than 8192 bytes",
                path("long")
            ),
        ),
        (
            "auth=@folder",
            24,
            format!(
                "the secret @folder: {} cannot be read: it is not a regular file",
                path("folder")
            ),
        ),
        (
            "cert=@other",
            24,
            "the secret @other: the key (.key) does not belong to the certificate (.crt)".into(),
        ),
        (
            "cert=@broken",
            24,
            "the secret @broken: the file holds no certificate (.crt)".into(),
        ),
        (
            "cert=@keyless",
            24,
            "the secret @keyless: the file holds no private key (.key)".into(),
        ),
        (
            "cert=@lone",
            24,
            format!(
                "the secret @lone: {} cannot be read: No such file or directory (os error 2)",
                path("lone.key")
            ),
        ),
    ] {
        let errors = folder.errors(&format!("https://a.example/ {option}").replace(" ", " 5 "));
        assert_eq!(errors, [format!("hosts:1:{}: {why}", column + 3)], "{option}");
    }
    let files = Files::new(None, None);
    let error = parse_with("hosts", b"a.example 5 auth=@shop", &files)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("set SECRETS_DIR to the directory with the files of secrets"),
        "{error}"
    );
}

#[test]
fn options_that_contradict_each_other_or_the_address_are_errors() {
    let folder = Folder::new();
    let over_http =
        "a secret is not sent over http, where others can read it; use https or, to allow it, plain-auth=yes";
    for (line, expected) in [
        (
            "http://a.example 5 auth=@shop",
            format!("hosts:1:20: {over_http}"),
        ),
        (
            "http://a.example 5 header=\"X: @key\"",
            format!("hosts:1:20: {over_http}"),
        ),
        (
            "@p auth=@shop\nhttp://a.example 5 @p",
            format!("hosts:2:20: {over_http}"),
        ),
        (
            "a.example 5 auth=@shop header=\"authorization: x\"",
            "hosts:1:13: auth= and header= both set Authorization; remove one of the two".into(),
        ),
        (
            "a.example 5 body=x",
            "hosts:1:13: a request with a body needs method=POST, PUT, PATCH, DELETE or OPTIONS".into(),
        ),
        (
            "a.example 5 body=x method=GET",
            "hosts:1:13: a request with a body needs method=POST, PUT, PATCH, DELETE or OPTIONS".into(),
        ),
        (
            "a.example 5 json=/a:b method=HEAD",
            "hosts:1:13: method=HEAD has no response body for json=; remove one of the two".into(),
        ),
        (
            "a.example 5 method=HEAD ! ok",
            "hosts:1:27: method=HEAD has no response body to search for the REGEX; remove one of the two"
                .into(),
        ),
    ] {
        assert_eq!(folder.errors(line), [expected], "{line}");
    }
}

#[test]
fn wrong_values_are_told_with_what_was_expected() {
    let folder = Folder::new();
    let long = format!("name={}", "x".repeat(101));
    for (option, expected) in [
        ("slow=0s", "a time above 0, e.g. `800ms`"),
        ("cert-days=0", "a number of days from 1 to 3650"),
        ("cert-days=+1", "a number of days from 1 to 3650"),
        ("plain-auth=no", "`yes`"),
        (
            "json=status:ok",
            "/POINTER:VALUE with a pointer of RFC 6901, e.g. `/data/status:ok`",
        ),
        (
            "json=/status",
            "/POINTER:VALUE with a pointer of RFC 6901, e.g. `/data/status:ok`",
        ),
        (
            &long,
            "1 to 100 characters, in double quotes if there are spaces in it",
        ),
        ("proxy=host:3128", "`http://HOST:PORT`"),
        ("proxy=https://host:3128", "`http://HOST:PORT`"),
        ("proxy=http://me:hunter2@host:3128", "`http://HOST:PORT`"),
        ("proxy=http://host:3128/x", "`http://HOST:PORT`"),
    ] {
        let errors = folder.errors(&format!("a.example 5 {option}"));
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(
            errors[0].contains(&format!(": expected {expected}")),
            "{errors:?}"
        );
    }
}

#[test]
fn the_host_file_of_the_comparison_is_valid() {
    let folder = Folder::new();
    let (certificate, key) = crate::site::Authority::new("clients").leaf_pem(&["me"]);
    folder.secret("partner.crt", certificate);
    folder.secret("partner.key", key);
    folder.secret("api", "Bearer x");
    let hosts = folder
        .parse(include_str!("../../docs/compared/producer_config"))
        .unwrap();
    assert_eq!((hosts.targets.len(), hosts.warnings), (20, Vec::new()));
}

#[test]
fn secrets_in_the_file_and_files_that_everybody_can_read_are_warned_of() {
    let folder = Folder::new();
    let in_address = |address: &str| folder.warnings(&format!("{address} 5"));
    for address in [
        "https://a.example/?token=hunter",
        "https://a.example/x?a=b&api_key=hunter#x",
        "https://a.example/?X-Amz-Signature=hunter",
        "https://a.example/hook?x=hunterAB12cd34EF56gh78",
    ] {
        let [warning]: [String; 1] = in_address(address).try_into().unwrap();
        assert!(
            warning.contains("looks like a secret") && !warning.contains("hunter"),
            "{warning}"
        );
    }
    assert_eq!(
        in_address("https://a.example/x?a=b&api_key=hunter"),
        [
            "hosts:1:25: the value of `api_key` looks like a secret, and the address is in every record, row and page; if the \
          site accepts it in a header, write header=\"NAME: @FILE\" with a file in SECRETS_DIR"
        ]
    );
    for address in [
        "https://a.example/?q=monkey&page=2",
        "https://a.example/?token=",
        "https://a.example/#?token=x",
    ] {
        assert!(in_address(address).is_empty(), "{address}");
    }
    let [warning]: [String; 1] = folder
        .warnings("a.example 5 header=\"Authorization: Bearer hunter\"")
        .try_into()
        .unwrap();
    assert!(
        warning.starts_with("hosts:1:13: the value of `Authorization` looks like a secret")
            && !warning.contains("hunter"),
        "{warning}"
    );
    assert!(
        folder
            .warnings("a.example 5 header=\"Authorization: Bearer @key\"")
            .is_empty()
    );

    let lines = "@x tls=insecure\na.example 5 tls=insecure auth=@shop\nb.example 5 header=\"X: @key\" @x\nc.example 5 @x\nd.example 5 \
                 header=X:y tls=insecure";
    let warnings = folder.warnings(lines);
    let places: Vec<_> = warnings
        .iter()
        .filter_map(|warning| warning.split_once(" with tls=insecure, whoever"))
        .collect();
    assert_eq!(
        places.iter().map(|(place, _)| *place).collect::<Vec<_>>(),
        ["hosts:2:13:", "hosts:3:30:"],
        "{warnings:?}"
    );

    folder.write("open", "hunter");
    fs::set_permissions(folder.path().join("open"), fs::Permissions::from_mode(0o644)).unwrap();
    let file = folder.path().join("hosts");
    fs::write(&file, "a.example 5 header=\"X: @open\" header=\"Y: @key\"").unwrap();
    let warnings = read(&file, Some(folder.path())).unwrap().warnings;
    assert_eq!(
        warnings,
        [format!(
            "every user of this machine can read the secret {:?} (mode 0644); `chmod o-r` prevents that",
            folder.path().join("open")
        )]
    );
}

#[test]
fn the_check_command_takes_the_same_options_without_quotes_for_spaces() {
    let folder = Folder::new();
    let files = Files::new(Some(folder.path()), Some(folder.path()));
    let options = [
        "header=X-Key: Token @key",
        "name=Shop front",
        "method=POST",
        "body=\"a b\"",
    ]
    .map(str::to_owned);
    let target = target_with("https://a.example/", &options, Some("! error page"), &files).unwrap();
    assert_eq!(target.name.as_deref(), Some("Shop front"));
    assert!(matches!(&target.headers[0].value, HeaderValue::Secret(prefix, _) if prefix == "Token "));
    assert_eq!(target.body.unwrap().bytes[..], *b"a b");
    assert!(target.regex_absent);
    assert_eq!(target.regex.unwrap().as_str(), "error page");
    let error = target_with("http://a.example/", &["auth=@shop".to_owned()], None, &files).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("OPTION:1: a secret is not sent over http"),
        "{error}"
    );
}

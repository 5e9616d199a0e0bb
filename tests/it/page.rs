//! The server of the status page, as browsers, caches and many idle clients see it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use flate2::read::GzDecoder;
use host_metrics::config::Secret;
use host_metrics::http::server::{Limits, Server};
use host_metrics::page::render;
use host_metrics::page::server::{LIMITS, PublishedFiles};
use host_metrics::page::snapshot::{Host, Place, Snapshot};
use host_metrics::page::view::Options;

const PATIENCE: Duration = Duration::from_secs(60);

/// A page with one host.
fn shelf(logins: &[&str]) -> PublishedFiles {
    let logins: Vec<Secret> = logins
        .iter()
        .map(|login| Secret::new((*login).to_owned()))
        .collect();
    let shelf = PublishedFiles::new(&logins);
    put(&shelf, "Web shop");
    shelf
}

fn put(shelf: &PublishedFiles, name: &str) {
    let host = Host {
        address: "https://shop.example/".to_owned(),
        name: Some(name.to_owned()),
        is_down: Some(false),
        places: vec![Place::default()],
        ..Host::default()
    };
    let options = Options {
        title: "Status".to_owned(),
        shows_addresses: false,
    };
    let snapshot = Snapshot {
        hosts: vec![host],
        ..Snapshot::default()
    };
    shelf.put(render(&snapshot, &options, 0));
    shelf.set_ready(Ok(()));
}

fn start(shelf: &PublishedFiles) -> Server {
    Server::start(
        "page",
        "PAGE_ADDR",
        (Ipv4Addr::LOCALHOST, 0).into(),
        LIMITS,
        shelf.clone().service(),
    )
    .unwrap()
}

struct Answer {
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn status(&self) -> &str {
        &self.head[9..12]
    }

    fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines
            .into_iter()
            .find(|(found, _)| *found == name)
            .map(|(_, value)| value)
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

fn ask(address: SocketAddr, request: &str, headers: &str) -> Answer {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "{request} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{headers}\r\n"
    )
    .unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .unwrap();
    Answer {
        head: String::from_utf8(answer[..end].to_vec()).unwrap(),
        body: answer[end + 4..].to_vec(),
    }
}

#[test]
fn every_file_comes_with_its_type_its_tag_and_a_policy() {
    let server = start(&shelf(&[]));
    for (path, content_type) in [
        ("/", "text/html; charset=utf-8"),
        ("/index.html?x", "text/html; charset=utf-8"),
        ("/host/Web%20shop/", "text/html; charset=utf-8"),
        ("/style.css", "text/css; charset=utf-8"),
        ("/refresh.js", "text/javascript; charset=utf-8"),
        ("/badge/Web%20shop.svg", "image/svg+xml"),
        ("/badge/Web%20shop.json", "application/json"),
        ("/status.json", "application/json"),
        ("/feed.atom", "application/atom+xml; charset=utf-8"),
    ] {
        let answer = ask(server.address(), &format!("GET {path}"), "");
        assert_eq!(
            (answer.status(), answer.header("content-type")),
            ("200", Some(content_type)),
            "{path}"
        );
        let tag = answer.header("etag").unwrap();
        let policy = answer.header("content-security-policy").unwrap();
        assert!(
            policy.starts_with("default-src 'none'; ") && policy.contains("frame-ancestors 'none'"),
            "{policy}"
        );
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(answer.header("cache-control"), Some("no-cache"));

        for (header, status) in [
            (tag.to_owned(), "304"),
            (format!("\"x\", {}", tag.trim_start_matches("W/")), "304"),
            ("*".to_owned(), "304"),
            ("\"x\"".to_owned(), "200"),
        ] {
            let again = ask(
                server.address(),
                &format!("GET {path}"),
                &format!("If-None-Match: {header}\r\n"),
            );
            assert_eq!(again.status(), status, "{path} {header}");
            assert_eq!(again.body.is_empty(), status == "304", "{path} {header}");
            assert_eq!(again.header("etag"), Some(tag));
        }
        let head = ask(server.address(), &format!("HEAD {path}"), "");
        assert_eq!((head.status(), head.body.len()), ("200", 0));
        assert_eq!(
            head.header("content-length"),
            Some(&*answer.body.len().to_string())
        );

        let gzipped = ask(
            server.address(),
            &format!("GET {path}"),
            "Accept-Encoding: br, gzip;q=0.8\r\n",
        );
        assert_eq!(gzipped.header("content-encoding"), Some("gzip"));
        assert_eq!(gzipped.header("vary"), Some("Accept-Encoding"));
        let mut plain = Vec::new();
        GzDecoder::new(&gzipped.body[..]).read_to_end(&mut plain).unwrap();
        assert_eq!(plain, answer.body, "{path}");
        for refused in ["Accept-Encoding: gzip;q=0\r\n", "Accept-Encoding: br\r\n"] {
            let plain = ask(server.address(), &format!("GET {path}"), refused);
            assert_eq!(plain.header("content-encoding"), None, "{refused}");
        }
    }
}

#[test]
fn other_paths_and_methods_are_refused() {
    let server = start(&shelf(&[]));
    let get = |request: &str| ask(server.address(), request, "");
    for path in [
        "/nothing",
        "/host/Web%20shop/nothing",
        "/%2e%2e/etc/passwd",
        "/..%2f..%2fetc/passwd",
        "/%ff",
        "/host/",
    ] {
        assert_eq!(get(&format!("GET {path}")).status(), "404", "{path}");
    }
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        let answer = get(&format!("{method} /"));
        assert_eq!(
            (answer.status(), answer.header("allow")),
            ("405", Some("GET, HEAD"))
        );
    }
    let answer = get("GET /host/Web%20shop");
    assert_eq!(
        (answer.status(), answer.header("location")),
        ("308", Some("Web%20shop/"))
    );
    assert_eq!(get("GET /incidents").header("location"), Some("incidents/"));
}

#[test]
fn a_new_page_replaces_the_old_one_and_before_the_first_there_is_none() {
    let shelf = PublishedFiles::new(&[]);
    let server = start(&shelf);
    let get = |path: &str| ask(server.address(), &format!("GET {path}"), "");
    assert_eq!(get("/").status(), "503");
    assert_eq!(
        (
            get("/healthz").status().to_owned(),
            get("/readyz").status().to_owned()
        ),
        ("200".into(), "503".into())
    );
    put(&shelf, "One");
    assert_eq!(get("/readyz").text(), "ready\n");
    assert!(get("/").text().contains("One is not checked."));
    put(&shelf, "Two");
    assert!(get("/").text().contains("Two is not checked."));
    assert_eq!(get("/host/One/").status(), "404");
    shelf.set_ready(Err("waiting".into()));
    assert_eq!(
        (get("/readyz").status().to_owned(), get("/").status().to_owned()),
        ("503".into(), "200".into())
    );
}

#[test]
fn with_logins_only_their_users_read_the_page_and_probes_need_none() {
    let server = start(&shelf(&["ann:open sesame", "bob:b:c"]));
    let with = |login: &str| {
        let header = format!(
            "Authorization: Basic {}\r\n",
            openssl::base64::encode_block(login.as_bytes())
        );
        ask(server.address(), "GET /status.json", &header)
    };
    for good in ["ann:open sesame", "bob:b:c"] {
        assert_eq!(with(good).status(), "200", "{good}");
    }
    for bad in ["ann:open sesam", "ann:", "bob:open sesame", "", "Ann:open sesame"] {
        let answer = with(bad);
        assert_eq!(answer.status(), "401", "{bad}");
        assert_eq!(
            answer.header("www-authenticate"),
            Some("Basic realm=\"status\", charset=\"UTF-8\"")
        );
        assert!(!answer.text().contains("shop"));
    }
    assert_eq!(ask(server.address(), "GET /", "").status(), "401");
    assert_eq!(ask(server.address(), "GET /nothing", "").status(), "401");
    for probe in ["/healthz", "/readyz"] {
        assert_eq!(ask(server.address(), &format!("GET {probe}"), "").status(), "200");
    }
}

#[test]
fn a_thousand_idle_connections_stay_open_and_others_are_answered() {
    let server = start(&shelf(&[]));
    let mut idle: Vec<TcpStream> = (0..1_000)
        .map(|_| TcpStream::connect(server.address()).unwrap())
        .collect();
    for _ in 0..200 {
        assert_eq!(ask(server.address(), "GET /", "").status(), "200");
    }
    // Each of them can still ask, and ask again.
    for stream in idle.iter_mut().step_by(100) {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        for _ in 0..2 {
            write!(stream, "GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
            let mut answer = Vec::new();
            while !answer.ends_with(b"alive\n") {
                let mut part = [0; 512];
                let count = stream.read(&mut part).unwrap();
                assert!(count > 0, "{}", String::from_utf8_lossy(&answer));
                answer.extend_from_slice(&part[..count]);
            }
        }
    }
}

#[test]
fn connections_are_closed_that_are_idle_too_long_or_too_many() {
    let limits = Limits {
        connections: 3,
        idle_for: Some(Duration::from_millis(300)),
        ..LIMITS
    };
    let server = Server::start(
        "page",
        "PAGE_ADDR",
        (Ipv4Addr::LOCALHOST, 0).into(),
        limits,
        shelf(&[]).service(),
    )
    .unwrap();
    let open = || {
        let stream = TcpStream::connect(server.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let is_closed = |mut stream: TcpStream| match stream.read_to_end(&mut Vec::new()) {
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    };
    let streams: Vec<TcpStream> = (0..6).map(|_| open()).collect();
    assert_eq!(ask(server.address(), "GET /", "").status(), "200");
    assert!(streams.into_iter().all(is_closed));
    // In the middle of a head, too.
    let mut half = open();
    half.write_all(b"GET / HTTP/1.1\r\nHo").unwrap();
    assert!(is_closed(half));
}

//! Scripted web sites on loopback. The path decides what happens, and every request is counted.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use host_metrics::shutdown::Shutdown;

use crate::scratch::now;

/// What a path does, and what its record contains.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    pub path: &'static str,
    /// The rest of the line in the host file, after the address.
    pub options: &'static str,
    script: Script,
    pub outcome: &'static str,
    pub status_code: Option<i64>,
    pub regex_matched: Option<bool>,
    pub redirects: Option<i64>,
    /// The seconds before the headers come.
    pub at_least_seconds: f64,
}

#[derive(Clone, Copy, Debug)]
enum Script {
    /// The status line with more headers, and the body.
    Respond(&'static str, &'static str),
    RespondAfter(Duration, &'static str, &'static str),
    /// Headers that announce more than is sent.
    CutBody,
    /// Closes the connection without sending a byte.
    Nothing,
    /// Never answers.
    Silence,
}

use Script::{CutBody, Nothing, Respond, RespondAfter, Silence};

const fn page(path: &'static str, options: &'static str, script: Script, outcome: &'static str) -> Page {
    Page {
        path,
        options,
        script,
        outcome,
        status_code: None,
        regex_matched: None,
        redirects: None,
        at_least_seconds: 0.0,
    }
}

const fn answered(mut page: Page, status_code: i64, regex_matched: Option<bool>, redirects: i64) -> Page {
    page.status_code = Some(status_code);
    page.regex_matched = regex_matched;
    page.redirects = Some(redirects);
    page
}

/// A dozen pages. All but the silent one answer in time.
pub const PAGES: [Page; 12] = [
    answered(page("/ok", "", Respond("200 OK", "fine"), "ok"), 200, None, 0),
    answered(
        page("/created", "status=201", Respond("201 Created", ""), "ok"),
        201,
        None,
        0,
    ),
    answered(
        page("/missing", "", Respond("404 Not Found", "?"), "bad_status"),
        404,
        None,
        0,
    ),
    answered(
        page("/broken", "(fine)", Respond("500 Oops", "fine"), "bad_status"),
        500,
        Some(true),
        0,
    ),
    answered(
        page(
            "/lines",
            r"two\s+three # not a comment",
            Respond("200 OK", "one\ntwo\n  three # not a comment\n"),
            "ok",
        ),
        200,
        Some(true),
        0,
    ),
    answered(
        page(
            "/other",
            "(expected text)",
            Respond("200 OK", "something else"),
            "regex_mismatch",
        ),
        200,
        Some(false),
        0,
    ),
    answered(
        page("/moved", "", Respond("302 Found\r\nLocation: /ok", ""), "ok"),
        200,
        None,
        1,
    ),
    answered(
        page(
            "/stays",
            "follow=0 status=302",
            Respond("302 Found\r\nLocation: /ok", ""),
            "ok",
        ),
        302,
        None,
        0,
    ),
    Page {
        at_least_seconds: 0.3,
        ..answered(
            page(
                "/slow",
                "",
                RespondAfter(Duration::from_millis(300), "200 OK", "late"),
                "ok",
            ),
            200,
            None,
            0,
        )
    },
    answered(
        page("/cut", "(whatever)", CutBody, "connection_closed"),
        200,
        None,
        0,
    ),
    page("/nothing", "", Nothing, "connection_closed"),
    page("/silent", "timeout=500ms", Silence, "response_timeout"),
];

pub struct Site {
    address: SocketAddr,
    requests: Arc<Mutex<BTreeMap<String, u64>>>,
}

impl Site {
    /// Serves until the test process ends.
    pub fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let site = Self {
            address: listener.local_addr().unwrap(),
            requests: Arc::default(),
        };
        let requests = Arc::clone(&site.requests);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, requests) = (stream.unwrap(), Arc::clone(&requests));
                // The client may give up, as intended.
                thread::spawn(move || serve(stream, &requests).ok());
            }
        });
        site
    }

    pub fn address_of(&self, page: &Page) -> String {
        format!("http://{}{}", self.address, page.path)
    }

    /// How often the path was requested.
    pub fn requests(&self, path: &str) -> u64 {
        self.requests
            .lock()
            .unwrap()
            .get(path)
            .copied()
            .unwrap_or_default()
    }

    /// All pages as a host file.
    pub fn host_file(&self, frequency: &str) -> String {
        PAGES
            .iter()
            .map(|page| format!("{} {frequency} {}\n", self.address_of(page), page.options))
            .collect()
    }
}

fn serve(mut stream: TcpStream, requests: &Mutex<BTreeMap<String, u64>>) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            count => request.extend_from_slice(&buffer[..count]),
        }
    }
    let text = String::from_utf8_lossy(&request);
    let path = text.split(' ').nth(1).unwrap_or_default();
    *requests.lock().unwrap().entry(path.to_owned()).or_default() += 1;
    let page = PAGES
        .iter()
        .find(|page| page.path == path)
        .expect("only scripted paths are asked for");
    let (status, body) = match page.script {
        Respond(status, body) => (status, body),
        RespondAfter(delay, status, body) => {
            // No other thread uses this handle, so the wait is a pause.
            Shutdown::new().wait_until(now() + delay);
            (status, body)
        }
        CutBody => {
            return stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nConnection: close\r\n\r\nhalf a");
        }
        Nothing => return Ok(()),
        Silence => return stream.read(&mut buffer).map(drop),
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

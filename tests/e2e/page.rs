//! The status page of a pipeline that really ran, over HTTP and in a real browser.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use host_metrics::commands::demo::postgres::{ThrowAwayPostgres, free_port};
use host_metrics::commands::init;
use host_metrics::config;
use host_metrics::sample::{Sample, Timestamp, encode};
use serde_json::Value;

use crate::agent::{Agent, Variables, run, tail};
use crate::browser::{Browser, axe};
use crate::case::{Case, SOON, wait_for_count_within};
use crate::database::{Database, server};
use crate::faults::Proxy;
use crate::scratch::{self, wait_for};
use crate::site::Site;

/// What a name and an error may try.
const HOSTILE: &str = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>";

/// Has to be broken within a word on a narrow screen.
const LONG: &str = "Donaudampfschifffahrtsgesellschaftskapitänsmützenfabrik 日本語のとても長いサイト名";

fn now_micros() -> i64 {
    #[expect(clippy::disallowed_methods, reason = "the page is about now")]
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(now.as_micros()).unwrap()
}

/// A site of the last 90 days, checked every few hours, later every hour, from one to three places.
struct Past {
    address: &'static str,
    name: &'static str,
    group: Option<&'static str>,
    first_day: i64,
    places: &'static [&'static str],
    /// The outcome of the check so many hours ago at a place.
    outcome: fn(i64, usize) -> &'static str,
    base_seconds: f64,
}

const PAST: [Past; 7] = [
    Past {
        address: "https://shop.example/",
        name: "Web shop",
        group: Some("Shop"),
        first_day: 90,
        places: &["fra", "nyc"],
        outcome: |hour, _| match hour {
            530..534 => "connect_timeout",
            1_210..1_212 => "bad_status",
            _ => "ok",
        },
        base_seconds: 0.12,
    },
    Past {
        address: "https://pay.example/",
        name: "Payments",
        group: Some("Shop"),
        first_day: 90,
        places: &["fra", "nyc", "sin"],
        outcome: |hour, place| match (hour, place) {
            (0..2, 0) => "tls_cert_expired",
            (300..302, _) => "dns_timeout",
            _ => "ok",
        },
        base_seconds: 0.21,
    },
    Past {
        address: "https://search.example/",
        name: "Search",
        group: Some("Shop"),
        first_day: 90,
        places: &["fra"],
        outcome: |hour, _| match hour {
            0..3 => "response_timeout",
            190..215 => "connect_refused",
            700..760 => "missed",
            _ => "ok",
        },
        base_seconds: 0.34,
    },
    Past {
        address: "https://api.example/v1/health",
        name: "Public API",
        group: Some("Platform"),
        first_day: 62,
        places: &["fra", "nyc"],
        outcome: |hour, _| {
            if (880..884).contains(&hour) {
                "regex_mismatch"
            } else {
                "ok"
            }
        },
        base_seconds: 0.06,
    },
    Past {
        address: "https://docs.example/",
        name: "Documentation",
        group: Some("Platform"),
        first_day: 90,
        places: &["fra"],
        outcome: |_, _| "ok",
        base_seconds: 0.04,
    },
    Past {
        address: "https://hostile.example/",
        name: HOSTILE,
        group: None,
        first_day: 20,
        places: &["fra"],
        outcome: |hour, _| if hour == 100 { "bad_status" } else { "ok" },
        base_seconds: 0.09,
    },
    Past {
        address: "https://long.example/",
        name: LONG,
        group: None,
        first_day: 3,
        places: &["fra"],
        outcome: |_, _| "ok",
        base_seconds: 0.09,
    },
];

/// Their records, as `produce` writes them.
fn history() -> Vec<Vec<u8>> {
    let mut rng = fastrand::Rng::with_seed(15);
    let (now, hour) = (now_micros(), 3_600_000_000);
    let mut values = Vec::new();
    for past in &PAST {
        for ago in (0..past.first_day * 24)
            .rev()
            .filter(|ago| *ago < 72 || ago % 4 == 0)
        {
            for (index, place) in past.places.iter().enumerate() {
                let outcome = (past.outcome)(ago, index);
                let answered = matches!(outcome, "ok" | "bad_status" | "regex_mismatch");
                let day = (ago % 24) as f64 / 24.0 * std::f64::consts::TAU;
                let mut part = |share: f64| {
                    (past.base_seconds * share * (1.0 + 0.3 * day.sin() + 0.4 * rng.f64())).into()
                };
                let (dns, connect, tls, ttfb) = (part(0.08), part(0.2), part(0.27), part(0.45));
                let sum = |parts: [Option<f64>; 4]| parts.into_iter().flatten().sum::<f64>();
                let sample = Sample {
                    address: past.address.into(),
                    is_valid: outcome == "ok",
                    outcome: Some(outcome.into()),
                    error: (outcome != "ok").then(|| {
                        if past.name == HOSTILE {
                            HOSTILE.to_owned()
                        } else {
                            format!("{} at 10.0.0.7:443", outcome.replace('_', " "))
                        }
                        .into()
                    }),
                    scheduled_at: Timestamp::from_unix_micros(
                        now - ago * hour - 60_000_000 + index as i64 * 1_000_000,
                    ),
                    interval_seconds: Some(if ago < 72 { 3_600.0 } else { 4.0 * 3_600.0 }),
                    latency: answered.then(|| sum([dns, connect, tls, ttfb])),
                    dns_seconds: dns.filter(|_| answered),
                    connect_seconds: connect.filter(|_| answered),
                    tls_seconds: tls.filter(|_| answered),
                    ttfb_seconds: ttfb.filter(|_| answered),
                    cert_expires_at: Timestamp::from_unix_micros(now + 47 * 24 * hour),
                    name: Some(past.name.into()),
                    group: past.group.map(Into::into),
                    agent: Some((*place).into()),
                    ..Sample::default()
                };
                let mut value = Vec::new();
                encode(&sample, &mut value);
                values.push(value);
            }
        }
    }
    values
}

/// A pipeline that ran: the records of [`history`], and those of a `produce` that checks two pages of a site.
struct Ran {
    case: Case,
    _consume: Agent,
}

impl Ran {
    fn new(name: &'static str) -> Self {
        let mut case = Case::new(name, 1);
        let values = history();
        let count = i64::try_from(values.len()).unwrap();
        case.kafka
            .write(name, values.into_iter().map(|value| (0, None, Some(value))));
        let consume = Agent::start(
            &["consume"],
            &case.variables().with("STATE", "on").with("DB_BATCH_SIZE", 5_000),
        );
        let site = Site::start();
        let path = scratch::directory("hosts").join("hosts");
        let lines: Vec<String> = site.host_file("1s").lines().take(2).map(str::to_owned).collect();
        fs::write(&path, lines.join("\n")).unwrap();
        let arguments = ["produce", "--once", "-c", path.to_str().unwrap()];
        let (status, said) = run(&arguments, &case.variables().with("AGENT_NAME", "fra"));
        assert_eq!(status, 0, "{said}");
        wait_for_count_within(2 * SOON, &mut case.db, "host_metrics", count + 2, &[&consume]);
        let db = &mut case.db;
        wait_for(
            2 * SOON,
            "the state has all of it",
            || {
                let due = "SELECT coalesce(sum(due_365d), 0)::text FROM host_metrics_windows WHERE is_host";
                (db.one(due) == (count + 2).to_string()).then_some(())
            },
            || tail(&consume.stderr()),
        );
        Self {
            case,
            _consume: consume,
        }
    }
}

/// A running `page`.
struct Page {
    agent: Agent,
    port: u16,
}

impl Page {
    fn start(variables: &Variables) -> Self {
        let port = free_port().unwrap();
        let variables = variables.clone().with("PAGE_ADDR", format!("127.0.0.1:{port}"));
        let page = Self {
            agent: Agent::start(&["page"], &variables),
            port,
        };
        page.agent.wait_for_stderr("page at http://", SOON);
        page
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}/{path}", self.port)
    }

    /// The head and the body.
    fn get(&self, path: &str, headers: &str) -> (String, String) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{headers}\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    /// Waits until the page at this path says that.
    fn wait_for(&self, path: &str, text: &str) {
        wait_for(
            2 * SOON,
            &format!("{path} says {text:?}"),
            || self.get(path, "").1.contains(text).then_some(()),
            || format!("{}\n{}", self.get(path, "").1, tail(&self.agent.stderr())),
        );
    }
}

/// The variables of a user that `init --reader` has made. Users belong to the server, so each test has its own.
fn reader(case: &Case) -> Variables {
    let name = format!("reader \"of\" {}", case.db.name);
    let (status, said) = run(&["init", "--reader", &name], &case.variables());
    assert_eq!(status, 0, "{said}");
    case.variables().with("DB_USER", name)
}

#[test]
fn the_page_shows_what_the_pipeline_stored_to_a_user_who_can_read_only_that() {
    let mut ran = Ran::new("page");
    let variables = reader(&ran.case);
    let user = format!("reader \"of\" {}", ran.case.db.name);
    let may = |db: &mut Database| {
        db.many(&format!(
            "SELECT c.relname || ' ' || p FROM pg_class c, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE']) p \
             WHERE c.relname LIKE 'host_metrics%' AND c.relkind IN ('r', 'p', 'v') \
                 AND has_table_privilege('{}', c.oid, p) ORDER BY 1",
            user.replace('\'', "''")
        ))
    };
    let all = [
        "host_metrics_hosts_version SELECT",
        "host_metrics_incidents SELECT",
        "host_metrics_rollups SELECT",
        "host_metrics_series SELECT",
        "host_metrics_windows SELECT",
    ];
    assert_eq!(may(&mut ran.case.db), all);
    // A second time nothing changes.
    let (status, said) = run(&["init", "--reader", &user], &ran.case.variables());
    assert_eq!(status, 0, "{said}");
    assert_eq!(may(&mut ran.case.db), all);

    let page = Page::start(&variables);
    page.wait_for("/", "1 of 7 sites is down: Search.");
    let (head, body) = page.get("/", "");
    assert!(
        head.contains("content-security-policy: default-src 'none';"),
        "{head}"
    );
    for part in [
        "<h2>Shop</h2>",
        "<h2>Platform</h2>",
        "<h2>Other sites</h2>",
        "Down from fra; up from nyc, sin.",
    ] {
        assert!(body.contains(part), "{part}: {body}");
    }
    assert!(
        !body.contains("127.0.0.1"),
        "hosts without a name are not shown: {body}"
    );

    // The same figures as the views.
    let document: Value = serde_json::from_str(&page.get("/status.json", "").1).unwrap();
    let hosts = document["hosts"].as_array().unwrap();
    let names: Vec<_> = hosts.iter().map(|host| host["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "Documentation",
            "Public API",
            "Payments",
            "Search",
            "Web shop",
            HOSTILE,
            LONG
        ]
        .map(|name| name.trim())
    );
    for host in hosts {
        for window in ["24h", "7d", "30d", "90d"] {
            let said = &host["uptime"][window];
            let share = said["verdict_share"].as_f64();
            assert!(share.is_some_and(|share| (0.0..=1.0).contains(&share)), "{said}");
            let said = format!("{} {} {}", said["valid"], said["checks"], said["not_made"]);
            let plain = ran.case.db.one(&format!(
                "SELECT concat_ws(' ', valid_{window}, due_{window} - missed_{window}, missed_{window}) FROM host_metrics_uptime \
                 JOIN (SELECT DISTINCT address, name FROM host_metrics_series) s USING (address) WHERE agent IS NULL AND name = '{}'",
                host["name"].as_str().unwrap().replace('\'', "''")
            ));
            assert_eq!(said, plain, "{} {window}", host["name"]);
        }
    }
    let incidents = document["incidents"].as_array().unwrap();
    let stored = ran
        .case
        .db
        .count("host_metrics_incidents WHERE address NOT LIKE 'http://127%'");
    assert_eq!(i64::try_from(incidents.len()), Ok(stored));

    // As files for another server; the same but for the time.
    let directory = scratch::directory("out").join("new");
    let (status, said) = run(&["page", "--out", directory.to_str().unwrap()], &variables);
    assert_eq!(status, 0, "{said}");
    for path in [
        "index.html",
        "host/Web shop/index.html",
        "badge/Search.svg",
        "feed.atom",
        "style.css",
    ] {
        assert!(directory.join(path).exists(), "{path}");
    }
    let written = fs::read_to_string(directory.join("index.html")).unwrap();
    assert!(written.contains("1 of 7 sites is down: Search."), "{written}");
    page.agent.stop();
}

#[test]
fn while_the_database_is_away_the_last_page_stays_with_its_age() {
    let server = ThrowAwayPostgres::start().unwrap();
    let proxy = Proxy::start(server.port());
    let page = Page::start(&Variables::new().database(&server).with("DB_PORT", proxy.port));
    // Nothing is there yet, not even a table.
    let (head, _) = page.get("/", "");
    assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
    page.wait_for("/readyz", "run `host-metrics init`");
    assert!(page.get("/healthz", "").0.starts_with("HTTP/1.1 200 "));
    let port = server.port().to_string();
    let pairs = [
        ("DB_HOST", server.host()),
        ("DB_PORT", &port),
        ("DB_USER", server.superuser()),
        ("DB_NAME", server.database()),
    ];
    init::make_tables(
        &config::status(&config::Variables::from_pairs(pairs))
            .unwrap()
            .database,
    )
    .unwrap();
    page.wait_for("/", "No site is shown.");
    page.wait_for("/readyz", "ready");
    server.stop_immediately().unwrap();
    page.wait_for("/readyz", "waiting for Postgres");
    page.wait_for("/", "The database cannot be reached at the moment.");
    assert!(page.get("/", "").1.contains("No site is shown."));
    server.start_again().unwrap();
    wait_for(
        SOON,
        "the page is new again",
        || (!page.get("/", "").1.contains("cannot be reached at the moment")).then_some(()),
        || tail(&page.agent.stderr()),
    );
    // A database that hangs does not delay a stop.
    proxy.is_deaf.store(true, Ordering::SeqCst);
    page.wait_for("/readyz", "no answer within");
    page.agent.stop();
}

fn pictures() -> PathBuf {
    match std::env::var_os("PICTURES") {
        Some(directory) => directory.into(),
        None => scratch::directory("pictures"),
    }
}

#[test]
fn a_browser_shows_the_page_at_every_width_and_in_both_schemes() {
    let ran = Ran::new("page-in-a-browser");
    let variables = reader(&ran.case);
    let page = Page::start(&variables.with("PAGE_TITLE", "Example status"));
    page.wait_for("/", "1 of 7 sites is down: Search.");
    let browser = Browser::start();
    let (axe, pictures) = (axe(), pictures());
    fs::create_dir_all(&pictures).unwrap();
    let paths = [
        ("overview", ""),
        ("host", "host/Web%20shop/"),
        ("incidents", "incidents/"),
    ];
    let mut grounds = Vec::new();
    for (width, height) in [(320, 720), (800, 1_000), (2_560, 1_440), (3_840, 2_160)] {
        for scheme in ["light", "dark"] {
            browser.show_as(width, height, scheme);
            for (name, path) in paths {
                browser.open(&page.url(path));
                // No text and no picture is wider than the view.
                let widest = browser.value("document.documentElement.scrollWidth");
                assert_eq!(widest, width, "{name}");
                if path.is_empty() {
                    let columns = browser
                        .text("getComputedStyle(document.querySelector('.hosts')).gridTemplateColumns");
                    let expected = match width {
                        ..1_600 => 1,
                        1_600..3_200 => 2,
                        _ => 3,
                    };
                    assert_eq!(columns.split(' ').count(), expected, "{width}: {columns}");
                    grounds.push(browser.text("getComputedStyle(document.body).backgroundColor"));
                    let heading = browser.text("document.querySelector('h1').textContent");
                    assert_eq!(heading.trim(), "1 of 7 sites is down: Search.");
                }
                browser.value(&axe);
                let found = browser.value(
                    "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']}).then(found => found.violations.map(\
                     violation => violation.id + ': ' + violation.nodes.map(node => node.html + ' ' + node.failureSummary).join('; ')))",
                );
                assert_eq!(found, serde_json::json!([]), "{name} at {width} px, {scheme}");
                fs::write(
                    pictures.join(format!("{name}-{width}-{scheme}.png")),
                    browser.picture(),
                )
                .unwrap();
            }
        }
    }
    grounds.sort();
    grounds.dedup();
    assert_eq!(grounds.len(), 2, "a light and a dark ground: {grounds:?}");

    // On paper the ground is white, nothing is there that can only be clicked, and no site is torn apart.
    browser.open(&page.url(""));
    browser.show_printed();
    let style = |what: &str| browser.text(&format!("getComputedStyle(document.querySelector({what}"));
    assert_eq!(style("'body')).backgroundColor"), "rgb(255, 255, 255)");
    assert_eq!(style("'body')).color"), "rgb(24, 32, 43)");
    assert_eq!(style("'header nav')).display"), "none");
    assert_eq!(style("'.hosts > li')).breakInside"), "avoid");
    fs::write(pictures.join("overview-printed.png"), browser.picture()).unwrap();

    browser.show_as(800, 1_000, "light");
    browser.open(&page.url(""));
    // A hostile name is text, and nothing ran.
    let names = browser.value("[...document.querySelectorAll('.hosts h3')].map(name => name.textContent)");
    assert!(names.as_array().unwrap().contains(&HOSTILE.into()), "{names}");
    assert_eq!(browser.value("document.querySelectorAll('img').length"), 0);
    // By keyboard: the first stop leads to the content.
    browser.press("\u{e004}");
    assert_eq!(browser.text("document.activeElement.className"), "skip");
    browser.press("\u{e007}");
    assert_eq!(browser.text("document.activeElement.id"), "main");

    // All the way: every stop is reached in its order, and the focus is seen.
    browser.open(&page.url("host/Search/"));
    // A renewal would replace the elements.
    browser.value("void (window.renew = async () => {})");
    let stops = browser.value(
        "(window.stops = [...document.querySelectorAll('a, summary, [tabindex=\"0\"]')].filter(stop => stop.checkVisibility())).length",
    );
    assert!(stops.as_u64() > Some(10), "{stops}");
    for stop in 0..stops.as_u64().unwrap() {
        browser.press("\u{e004}");
        let outline = browser.text(&format!(
            "document.activeElement === stops[{stop}] ? getComputedStyle(stops[{stop}]).outlineStyle : document.activeElement.outerHTML"
        ));
        assert_eq!(outline, "solid", "stop {stop}");
    }
    browser.open(&page.url(""));

    // The script renews the page in place, and the mark is still there afterwards.
    browser.value("void (document.body.dataset.mark = 'here')");
    browser.value("document.getElementById('main').firstElementChild.textContent = 'old'");
    browser.value("renew()");
    assert_eq!(browser.text("document.body.dataset.mark"), "here");
    assert!(
        browser
            .text("document.querySelector('h1').textContent")
            .contains("sites is down")
    );

    for with_scripts in [true, false] {
        browser.allow_scripts(with_scripts);
        browser.open(&page.url(""));
        browser.click("a[href='host/Search/']");
        assert_eq!(browser.text("document.querySelector('h1').textContent"), "Search");
        let is_shown = "document.querySelector('#hours .scroll').checkVisibility()";
        assert_eq!(browser.value(is_shown), false);
        browser.click("#hours summary");
        assert_eq!(
            browser.value(is_shown),
            true,
            "the figures open without a script too"
        );
        assert_eq!(
            browser.value("document.querySelectorAll('#hours tbody tr').length"),
            48
        );
        browser.click("header nav a:last-child");
        assert!(browser.text("document.title").starts_with("Incidents – "));
        browser.click(".months a[aria-current], .months a");
        assert!(
            browser
                .text("document.querySelector('h1').textContent")
                .starts_with("Incidents of ")
        );
        let refresh = "document.querySelector('meta[http-equiv=refresh]') !== null";
        assert_eq!(browser.value(refresh), !with_scripts);
    }
    assert_eq!(browser.complaints(), Vec::<String>::new());
    drop(browser);
    page.agent.stop();
    // The case's server outlives the page.
    assert!(server().port() > 0);
}

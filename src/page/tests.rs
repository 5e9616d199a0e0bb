//! The whole page, made from snapshots with hostile texts in them.

use std::collections::BTreeSet;

use serde_json::Value;

use super::snapshot::{Bucket, Counts, DAY, HOUR, Host, Incident, Place, SECOND};
use super::*;

/// 28 Nov 2026, 16:20:10
const NOW: i64 = 1_795_882_810 * SECOND;

/// What a name, an error or a place may do to a page that does not escape it.
const HOSTILE: [&str; 6] = [
    "<script>alert(1)</script>",
    "\" onmouseover=\"alert(1)",
    "'--><img src=x onerror=alert(1)>]]>",
    "javascript:alert(1)//\u{202e}\u{0}\u{1b}[2J\u{7}\n",
    "../../../../etc/passwd",
    "{{7*7}}${7*7}&lt;%",
];

fn options(shows_addresses: bool) -> Options {
    Options {
        title: "<b>Our & status</b>".to_owned(),
        shows_addresses,
    }
}

/// A host with all that a host can have.
fn host(address: &str, name: Option<&str>, group: Option<&str>, is_valid: bool) -> Host {
    let place = |agent: &str, is_valid| Place {
        agent: agent.to_owned(),
        is_valid: Some(is_valid),
        since: Some(NOW - HOUR),
        last_check_at: Some(NOW - 20 * SECOND),
        interval_seconds: Some(30.0),
        outcome: Some(if is_valid { "ok" } else { "connect_refused" }.to_owned()),
        error: (!is_valid).then(|| "connection refused by 10.0.0.7:8080".to_owned()),
        certificate: Some((NOW + 62 * DAY, NOW - 20 * SECOND)),
    };
    let bucket = |starts_at: i64, counts| Bucket {
        starts_at,
        counts,
        p50: Some(0.08),
        p95: Some(0.25),
        phases: [0.005, 0.02, 0.03, 0.025, 0.001],
    };
    let counts = Counts {
        valid: 43_158,
        failed: 22,
        not_made: 21,
        slow: 0,
    };
    let today = NOW.div_euclid(DAY) * DAY;
    let this_hour = NOW.div_euclid(HOUR) * HOUR;
    Host {
        address: address.to_owned(),
        name: name.map(str::to_owned),
        group: group.map(str::to_owned),
        is_down: Some(!is_valid),
        since: Some(NOW - HOUR),
        places: vec![place("fra", is_valid), place("nyc", true)],
        windows: [counts; 4],
        verdict_uptimes: [Some(1.0), Some(0.999), None, None],
        hours: (0..40)
            .map(|hour| bucket(this_hour - (39 - hour) * HOUR, counts))
            .collect(),
        days: (0..60)
            .map(|day| bucket(today - (59 - day) * DAY, counts))
            .collect(),
    }
}

fn incident(address: &str, number: i64, started_at: i64, ended_at: Option<i64>) -> Incident {
    Incident {
        address: address.to_owned(),
        number,
        started_at,
        ended_at,
        checks: 12,
        outcome: "connect_refused".to_owned(),
        places: vec!["fra".to_owned()],
        last_error: Some("connection refused by 10.0.0.7:8080".to_owned()),
    }
}

fn snapshot() -> Snapshot {
    let (shop, api, inner) = (
        "https://shop.example/",
        "https://api.example/v1?x=1",
        "http://10.0.0.7:8080/",
    );
    Snapshot {
        taken_at: NOW,
        hosts: vec![
            host(shop, Some("Shop front"), Some("Shops"), true),
            host(api, Some("API"), None, false),
            host(inner, None, None, true),
        ],
        incidents: vec![
            incident(api, 2, NOW - HOUR, None),
            incident(shop, 1, NOW - 40 * DAY, Some(NOW - 40 * DAY + 720 * SECOND)),
            incident(inner, 1, NOW - 41 * DAY, Some(NOW - 40 * DAY)),
        ],
        has_more_incidents: false,
    }
}

fn text<'a>(files: &'a Files, path: &str) -> &'a str {
    let file = files
        .get(path)
        .unwrap_or_else(|| panic!("{path} is not among {:?}", files.keys()));
    std::str::from_utf8(&file.body).unwrap()
}

#[track_caller]
fn assert_says(files: &Files, path: &str, parts: &[&str]) {
    let text = text(files, path);
    for part in parts {
        assert!(text.contains(part), "{part} is not in {path}: {text}");
    }
}

#[test]
fn the_files_are_those_of_the_hosts_that_are_shown() {
    let files = render(&snapshot(), &options(false), NOW);
    let paths: Vec<&str> = files.keys().map(String::as_str).collect();
    assert_eq!(
        paths,
        [
            "badge/API.json",
            "badge/API.svg",
            "badge/Shop front.json",
            "badge/Shop front.svg",
            "feed.atom",
            "host/API/index.html",
            "host/Shop front/index.html",
            "icon.svg",
            "incidents/2026-10/index.html",
            "incidents/2026-11/index.html",
            "incidents/index.html",
            "index.html",
            "refresh.js",
            "status.json",
            "style.css"
        ]
    );
    let files = render(&snapshot(), &options(true), NOW);
    assert!(
        files
            .keys()
            .any(|path| path.starts_with("host/http-10-0-0-7-8080-")),
        "{:?}",
        files.keys()
    );
}

#[test]
fn the_overview_says_how_all_sites_are() {
    let files = render(&snapshot(), &options(false), NOW);
    assert_says(
        &files,
        "index.html",
        &[
            "<title>1 of 2 sites is down: API. – &lt;b&gt;Our &amp; status&lt;/b&gt;</title>",
            "<h2>Shops</h2>",
            "<h2>Other sites</h2>",
            r#"<a href="host/Shop%20front/">Shop front</a>"#,
            "<strong>99.94 %</strong> <span>of 43,180 checks, 21 not made</span>",
            ": the connection was refused. Down since <time",
            "Down from fra; up from nyc.",
            "Median response time 80\u{a0}ms.",
            r#"aria-label="90 days: 60 partly down, 30 not checked""#,
            "has been down for 1 h",
            "As of <time datetime=\"2026-11-28T16:20:10Z\">28 Nov 2026, 16:20</time>. All times are UTC.",
        ],
    );
}

#[test]
fn the_overview_warns_of_a_certificate_that_expires_soon() {
    let said = |left: i64| {
        let mut snapshot = snapshot();
        for place in &mut snapshot.hosts[0].places {
            place.certificate = Some((NOW + left, NOW));
        }
        let files = render(&snapshot, &options(false), NOW);
        let (_, after) = text(&files, "index.html")
            .split_once("certificate ")
            .unwrap_or_default();
        after.split('.').next().unwrap_or_default().to_owned()
    };
    assert_eq!(said(13 * DAY), "expires in 13 d");
    assert_eq!(said(-SECOND), "has expired");
    assert_eq!(said(15 * DAY), "");
}

#[test]
fn the_page_of_a_host_has_its_figures_and_its_incidents() {
    let files = render(&snapshot(), &options(true), NOW);
    assert_says(
        &files,
        "host/API/index.html",
        &[
            "https://api.example/v1?x=1",
            "Response time by hour: median between 80 ms and 80 ms, 95th percentile between 250 ms and 250 ms.",
            "Mean time of each phase by day, stacked; TLS takes the longest.",
            r#"<th scope="row">28 Nov 2026, 16:00</th><td>partly down</td><td class="number">43,180</td>"#,
            "in 62 d.",
            "of 43,180 checks, 21 not made</span><span>up 99.90 % of the time</span>",
            "connection refused by 10.0.0.7:8080",
            "The connection was refused; 12 checks failed, seen from fra.",
            "still down",
        ],
    );
}

#[test]
fn incidents_stand_by_month() {
    let files = render(&snapshot(), &options(false), NOW);
    assert_says(
        &files,
        "incidents/index.html",
        &["November 2026", "../incidents/2026-10/", "API"],
    );
    assert_says(
        &files,
        "incidents/2026-10/index.html",
        &["Incidents of October 2026", "was down for 12 min"],
    );
    assert!(!text(&files, "incidents/2026-10/index.html").contains("has been down"));
}

#[test]
fn hidden_addresses_are_in_no_file() {
    for (path, file) in render(&snapshot(), &options(false), NOW) {
        let text = String::from_utf8(file.body.to_vec()).unwrap();
        for address in ["shop.example", "api.example", "10.0.0.7", "10-0-0-7", "v1?x"] {
            assert!(
                !text.contains(address) && !path.contains(address),
                "{address} in {path}: {text}"
            );
        }
    }
}

#[test]
fn an_old_snapshot_is_told_to_be_old() {
    let fresh = render(&snapshot(), &options(false), NOW + 25 * SECOND);
    assert!(!text(&fresh, "index.html").contains("figures are"));
    let old = render(&snapshot(), &options(false), NOW + 312 * SECOND);
    assert_says(
        &old,
        "index.html",
        &["These figures are 5 min 12 s old.", "1 of 2 sites is down"],
    );
    assert_says(
        &old,
        "host/API/index.html",
        &["These figures are 5 min 12 s old."],
    );
    let document: Value = serde_json::from_str(text(&old, "status.json")).unwrap();
    assert_eq!(document["age_seconds"], 312);
}

#[test]
fn an_empty_page_says_why() {
    let mut snapshot = Snapshot::default();
    let files = render(&snapshot, &options(false), NOW);
    assert_says(
        &files,
        "index.html",
        &["No site is shown.", "No record has arrived yet."],
    );
    assert_says(&files, "incidents/index.html", &["No incidents."]);
    snapshot.hosts = vec![host("https://a.example/", None, None, true)];
    let files = render(&snapshot, &options(false), NOW);
    assert_says(&files, "index.html", &["none has a name"]);
}

#[test]
fn hostile_texts_stay_texts() {
    let hosts = HOSTILE.iter().enumerate().map(|(index, text)| {
        let mut host = host(
            &format!("https://a.example/{text}{index}"),
            Some(text),
            Some(text),
            false,
        );
        for place in &mut host.places {
            place.agent = (*text).to_owned();
            place.error = Some((*text).to_owned());
            place.outcome = Some((*text).to_owned());
        }
        host
    });
    let mut snapshot = Snapshot {
        taken_at: NOW,
        hosts: hosts.collect(),
        ..Snapshot::default()
    };
    for (number, host) in (1..).zip(&snapshot.hosts) {
        let text = host.name.clone().unwrap();
        snapshot.incidents.push(Incident {
            places: vec![text.clone()],
            outcome: text.clone(),
            last_error: Some(text),
            ..incident(&host.address, number, NOW - HOUR, None)
        });
    }
    for shows_addresses in [false, true] {
        for (path, file) in render(&snapshot, &options(shows_addresses), NOW) {
            assert!(!path.contains("..") && !path.starts_with('/'), "{path}");
            let text = std::str::from_utf8(&file.body).unwrap();
            if ["style.css", "refresh.js"].contains(&path.as_str()) {
                continue;
            }
            for control in ['\0', '\u{1b}', '\u{7}', '\u{202e}'] {
                assert!(!text.contains(control), "{control:?} in {path}");
            }
            if path.ends_with(".json") {
                serde_json::from_str::<Value>(text).unwrap();
                continue;
            }
            // Nothing but our own elements and attributes.
            let (mut elements, mut attributes) = (BTreeSet::new(), BTreeSet::new());
            for tag in tags(text) {
                elements.insert(tag.0);
                attributes.extend(tag.1);
            }
            assert!(
                !elements.contains("img") || path.starts_with("host/"),
                "{path}: {elements:?}"
            );
            for attribute in attributes {
                assert!(
                    !attribute.starts_with("on") && attribute != "style",
                    "{attribute} in {path}"
                );
            }
            let scripts = text.matches("<script").count();
            assert_eq!(scripts, usize::from(path.ends_with(".html")), "{path}: {text}");
        }
    }
}

/// The name and the names of the attributes of each tag that opens; quotes are respected, as a browser does.
fn tags(text: &str) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('<') {
        rest = &rest[at + 1..];
        let mut in_quotes = false;
        let end = rest.find(|char| {
            in_quotes ^= char == '"';
            char == '>' && !in_quotes
        });
        let (tag, after) = rest.split_at(end.expect("every tag ends"));
        rest = after;
        if tag.starts_with(char::is_alphabetic) {
            let unquoted: String = tag.split('"').step_by(2).collect::<Vec<_>>().join(" ");
            let mut words = unquoted
                .split_whitespace()
                .map(|word| word.trim_end_matches(['=', '/']).to_owned());
            found.push((words.next().unwrap_or_default(), words.collect()));
        }
    }
    found
}

#[test]
fn every_link_leads_to_a_file_and_every_anchor_exists() {
    let files = render(&snapshot(), &options(true), NOW);
    let mut links = 0;
    for (path, file) in files
        .iter()
        .filter(|(path, _)| path.ends_with(".html") || path.ends_with(".atom"))
    {
        let text = std::str::from_utf8(&file.body).unwrap();
        let attributes = text.split(['"']).collect::<Vec<_>>();
        let values = attributes
            .windows(2)
            .filter(|pair| pair[0].ends_with("href=") || pair[0].ends_with("src="));
        for link in values.map(|pair| pair[1]) {
            let base =
                url::Url::parse(&format!("http://h/{}", view::encoded(path).replace("%2F", "/"))).unwrap();
            let url = base.join(link).unwrap();
            let target = percent_encoding::percent_decode_str(url.path())
                .decode_utf8()
                .unwrap();
            let target = format!(
                "{}{}",
                &target[1..],
                if target.ends_with('/') { "index.html" } else { "" }
            );
            let there = files
                .get(&target)
                .unwrap_or_else(|| panic!("{link} in {path} leads to {target}"));
            if let Some(anchor) = url.fragment() {
                let there = std::str::from_utf8(&there.body).unwrap();
                assert!(
                    there.contains(&format!("id=\"{anchor}\"")),
                    "#{anchor} of {path} is not in {target}"
                );
            }
            links += 1;
        }
    }
    assert!(links > 50, "{links}");
}

#[test]
fn status_json_keeps_to_its_schema() {
    let schema: Value = serde_json::from_str(include_str!("../../schema/page.v1.json")).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    for snapshot in [snapshot(), Snapshot::default()] {
        for shows_addresses in [false, true] {
            let files = render(&snapshot, &options(shows_addresses), NOW);
            let document: Value = serde_json::from_str(text(&files, "status.json")).unwrap();
            let errors: Vec<_> = validator
                .iter_errors(&document)
                .map(|error| error.to_string())
                .collect();
            assert!(errors.is_empty(), "{errors:#?}\n{document:#}");
        }
    }
}

#[test]
fn a_badge_shows_the_state_and_the_uptime_of_thirty_days() {
    let files = render(&snapshot(), &options(false), NOW);
    assert_says(
        &files,
        "badge/API.svg",
        &["aria-label=\"API: down, 99.94 %\"", "#bf2424"],
    );
    let badge: Value = serde_json::from_str(text(&files, "badge/Shop front.json")).unwrap();
    assert_eq!(badge["schemaVersion"], 1);
    assert_eq!(
        (&badge["label"], &badge["message"]),
        (&"Shop front".into(), &"up, 99.94 %".into())
    );
    assert_eq!(badge["isError"], false);
}

#[test]
fn the_feed_has_an_entry_for_each_incident_whose_identity_stays() {
    let ids = |snapshot: &Snapshot, now| {
        let files = render(snapshot, &options(false), now);
        let feed = text(&files, "feed.atom").to_owned();
        let ids = feed.split("<id>").skip(1).map(|rest| rest[..45].to_owned());
        ids.collect::<Vec<_>>()
    };
    let mut snapshot = snapshot();
    let before = ids(&snapshot, NOW);
    assert_eq!(
        before.len(),
        1 + 2,
        "the feed's own, and those of the shown hosts: {before:?}"
    );
    assert_eq!(before.iter().collect::<BTreeSet<_>>().len(), before.len());
    snapshot.incidents[0].ended_at = Some(NOW);
    assert_eq!(ids(&snapshot, NOW + DAY), before);
    let files = render(&snapshot, &options(false), NOW);
    assert_says(
        &files,
        "feed.atom",
        &[
            "<title>API was down for 1 h</title>",
            "<updated>2026-11-28T16:20:10Z</updated>",
            "The connection was refused; 12 checks failed, seen from fra. connection refused by …</summary>",
        ],
    );
}

/// The variables of the style sheet in the light and the dark scheme.
fn colors() -> [Vec<(String, [f64; 3])>; 2] {
    let css = include_str!("style.css");
    let (light, rest) = css
        .split_once("@media screen and (prefers-color-scheme: dark)")
        .unwrap();
    let (dark, _) = rest.split_once("\n}\n").unwrap();
    [light, dark].map(|scheme| {
        let lines = scheme
            .lines()
            .filter_map(|line| line.trim().strip_prefix("--")?.split_once(": #"));
        lines
            .map(|(name, value)| {
                let part = |at: usize| f64::from(u8::from_str_radix(&value[at..at + 2], 16).unwrap()) / 255.0;
                (name.to_owned(), [part(0), part(2), part(4)])
            })
            .collect()
    })
}

/// WCAG 2.2, "relative luminance" and "contrast ratio".
fn contrast(one: [f64; 3], other: [f64; 3]) -> f64 {
    let luminance = |color: [f64; 3]| {
        let [red, green, blue] = color.map(|part| match part {
            ..=0.04045 => part / 12.92,
            part => ((part + 0.055) / 1.055).powf(2.4),
        });
        0.2126 * red + 0.7152 * green + 0.0722 * blue
    };
    let (one, other) = (luminance(one), luminance(other));
    (one.max(other) + 0.05) / (one.min(other) + 0.05)
}

#[test]
fn the_colors_have_enough_contrast_in_both_schemes() {
    for (scheme, colors) in ["light", "dark"].into_iter().zip(colors()) {
        let color = |name: &str| colors.iter().find(|(known, _)| known == name).unwrap().1;
        let check = |names: &[&str], on: &str, least: f64| {
            for name in names {
                let ratio = contrast(color(name), color(on));
                assert!(
                    ratio >= least,
                    "{scheme}: {name} on {on} has {ratio:.2}, and needs {least}"
                );
            }
        };
        for ground in ["ground", "surface"] {
            check(
                &["text", "muted", "link", "up", "slow", "partly", "down", "none"],
                ground,
                4.5,
            );
            check(&["hatch", "bar", "p50", "p95"], ground, 3.0);
        }
        check(&["text"], "banner", 4.5);
        // Neighbours in a stack can be told apart without their hue, and the darkest or lightest from the ground.
        for (phase, next) in [
            ("phase0", "phase1"),
            ("phase2", "phase1"),
            ("phase2", "phase3"),
            ("phase4", "phase3"),
        ] {
            check(&[phase], next, 3.0);
        }
        check(&["phase0", "phase2", "phase4"], "surface", 3.0);
    }
}

//! `status.json`: what the page says, for programs. `schema/page.v1.json` describes it.
//!
//! Pure.

use serde::Serialize;

use crate::page::snapshot::{Counts, WINDOWS};
use crate::page::view::View;
use crate::page::words::machine_time;
use crate::terminal::plain_json;

/// The most incidents in the document.
const NEWEST: usize = 100;

#[derive(Serialize)]
struct Document<'a> {
    v: u8,
    title: &'a str,
    at: String,
    age_seconds: i64,
    state: &'static str,
    sentence: String,
    hosts: Vec<HostDocument<'a>>,
    incidents: Vec<IncidentDocument<'a>>,
}

#[derive(Serialize)]
struct HostDocument<'a> {
    key: &'a str,
    name: &'a str,
    group: Option<&'a str>,
    address: Option<&'a str>,
    state: &'static str,
    since: Option<String>,
    last_check_at: Option<String>,
    last_outcome: Option<&'a str>,
    certificate_expires_at: Option<String>,
    uptime: serde_json::Map<String, serde_json::Value>,
    places: Vec<PlaceDocument<'a>>,
}

#[derive(Serialize)]
struct PlaceDocument<'a> {
    place: &'a str,
    state: &'static str,
    last_check_at: Option<String>,
    last_outcome: Option<&'a str>,
    error: Option<String>,
}

#[derive(Serialize)]
struct IncidentDocument<'a> {
    key: &'a str,
    number: i64,
    started_at: String,
    ended_at: Option<String>,
    outcome: &'a str,
    failed_checks: i64,
    places: &'a [String],
    error: Option<String>,
}

#[derive(Serialize)]
struct Uptime {
    share: Option<f64>,
    verdict_share: Option<f64>,
    checks: i64,
    valid: i64,
    not_made: i64,
}

fn uptime(counts: Counts, verdict_share: Option<f64>) -> Uptime {
    let checks = counts.checks();
    Uptime {
        share: (checks > 0).then(|| counts.valid as f64 / checks as f64),
        verdict_share,
        checks,
        valid: counts.valid,
        not_made: counts.not_made,
    }
}

#[expect(clippy::too_many_lines, reason = "a line for each field")]
pub fn render(view: &View<'_>) -> String {
    let now = view.snapshot.taken_at;
    let time = |micros: Option<i64>| micros.map(machine_time);
    let hosts = view.hosts.iter().map(|shown| {
        let host = shown.host;
        let uptime = WINDOWS
            .iter()
            .zip(host.windows)
            .zip(host.verdict_uptimes)
            .filter_map(|(((name, _), counts), verdict)| {
                Some((
                    (*name).to_owned(),
                    serde_json::to_value(uptime(counts, verdict)).ok()?,
                ))
            });
        HostDocument {
            key: &shown.key,
            name: &shown.name,
            group: shown.group.as_deref(),
            address: view.options.shows_addresses.then_some(&host.address),
            state: shown.state.word(),
            since: time(host.since),
            last_check_at: time(host.last_check_at()),
            last_outcome: host.last_check().and_then(|place| place.outcome.as_deref()),
            certificate_expires_at: time(host.certificate_expires_at()),
            uptime: uptime.collect(),
            places: host
                .places
                .iter()
                .map(|place| PlaceDocument {
                    place: &place.agent,
                    state: place.state(now).word(),
                    last_check_at: time(place.last_check_at),
                    last_outcome: place.outcome.as_deref(),
                    error: place
                        .error
                        .as_deref()
                        .map(|error| view.error(error, &host.address)),
                })
                .collect(),
        }
    });
    let incidents = view
        .incidents()
        .take(NEWEST)
        .map(|(shown, incident)| IncidentDocument {
            key: &shown.key,
            number: incident.number,
            started_at: machine_time(incident.started_at),
            ended_at: time(incident.ended_at),
            outcome: &incident.outcome,
            failed_checks: incident.checks,
            places: &incident.places,
            error: incident
                .last_error
                .as_deref()
                .map(|error| view.error(error, &incident.address)),
        });
    text(&Document {
        v: 1,
        title: &view.options.title,
        at: machine_time(now),
        age_seconds: view.age.unwrap_or(0) / crate::page::snapshot::SECOND,
        state: view.state().word(),
        sentence: view.sentence(),
        hosts: hosts.collect(),
        incidents: incidents.collect(),
    })
}

/// One line of JSON, without characters that a terminal obeys.
pub fn text(document: &impl Serialize) -> String {
    let text = serde_json::to_string(document).expect("numbers, texts and lists have a JSON form");
    format!("{}\n", plain_json(&text))
}

//! The incidents as an Atom feed (RFC 4287), which is XML from the same templates.
//!
//! Pure. The feed does not know its own address, so its links are relative, which RFC 4287 allows.

use maud::{PreEscaped, html};

use crate::page::html::incidents;
use crate::page::snapshot::Incident;
use crate::page::view::View;
use crate::page::words;
use crate::tables::buckets::series_id;

/// The most incidents in the feed. Readers ask far more often than that many begin.
const NEWEST: usize = 50;

pub fn render(view: &View<'_>) -> String {
    let now = view.snapshot.taken_at;
    let newest: Vec<_> = view.incidents().take(NEWEST).collect();
    let changed = |incident: &Incident| incident.ended_at.unwrap_or(incident.started_at);
    let updated = newest
        .iter()
        .map(|(_, incident)| changed(incident))
        .max()
        .unwrap_or(now);
    html! {
        (PreEscaped("<?xml version=\"1.0\" encoding=\"utf-8\"?>\n"))
        feed xmlns="http://www.w3.org/2005/Atom" {
            id { (urn("feed", 0)) }
            title { (view.options.title) }
            updated { (words::machine_time(updated)) }
            author { name { "host-metrics" } }
            link rel="self" type="application/atom+xml" href="feed.atom" {}
            link rel="alternate" type="text/html" href="./" {}
            @for (shown, incident) in newest {
                entry {
                    id { (urn(&incident.address, incident.number)) }
                    title { (shown.name) " " (incidents::summary(incident, now)) }
                    published { (words::machine_time(incident.started_at)) }
                    updated { (words::machine_time(changed(incident))) }
                    link rel="alternate" type="text/html"
                        href={ "incidents/" (words::month_key(incident.started_at)) "/#" (incidents::anchor(incident)) } {}
                    summary {
                        (words::outcome(&incident.outcome)) "; "
                        (words::counted(incident.checks, "check")) " failed"
                        @if let Some(places) = incidents::places(incident) { ", seen from " (places) }
                        "."
                        @if let Some(error) = &incident.last_error { " " (view.error(error, &incident.address)) }
                    }
                }
            }
        }
    }
    .into_string()
}

/// An identifier that never changes: a UUID of version 8 (RFC 9562), made of hashes of both.
fn urn(address: &str, number: i64) -> String {
    let (high, low) = (
        series_id(address, "incident"),
        series_id(address, &number.to_string()),
    );
    let (high, low) = (high.cast_unsigned(), low.cast_unsigned());
    format!(
        "urn:uuid:{:08x}-{:04x}-8{:03x}-{:04x}-{:012x}",
        high >> 32,
        high >> 16 & 0xffff,
        high & 0xfff,
        0x8000 | low >> 48 & 0x3fff,
        low & 0xffff_ffff_ffff
    )
}

//! The incidents: as a list on any page, and all of them by month.

use maud::{Markup, html};

use crate::page::html::{Page, mark, moment};
use crate::page::snapshot::{Incident, State};
use crate::page::view::{Shown, View, encoded};
use crate::page::words;
use crate::tables::buckets::series_id;

type Pair<'v, 'a> = (&'v Shown<'a>, &'a Incident);

/// A list, the newest first. `level` is that of its headings.
pub fn list(view: &View<'_>, incidents: &[Pair<'_, '_>], root: &str, level: u8) -> Markup {
    html! {
        ol.incidents {
            @for (shown, incident) in incidents {
                li id=(anchor(incident)) {
                    @let name = html! { a href={ (root) "host/" (encoded(&shown.key)) "/" } { (shown.name) } " " (summary(incident, view.snapshot.taken_at)) };
                    @let state = if incident.ended_at.is_some() { State::Up } else { State::Down };
                    @if level == 2 { h2 { (mark(state)) " " (name) } } @else { h3 { (mark(state)) " " (name) } }
                    p.when {
                        (moment(incident.started_at)) " – "
                        @match incident.ended_at {
                            Some(at) => (moment(at)),
                            None => strong { "still down" },
                        }
                    }
                    p {
                        (words::outcome(&incident.outcome))
                        "; " (words::counted(incident.checks, "check")) " failed"
                        @if let Some(places) = places(incident) { ", seen from " (places) }
                        "."
                    }
                    @if let Some(error) = &incident.last_error {
                        p.error { (view.error(error, &incident.address)) }
                    }
                }
            }
        }
    }
}

/// `was down for 12 min`
pub fn summary(incident: &Incident, now: i64) -> String {
    let lasted = |until: i64| words::duration(until.saturating_sub(incident.started_at));
    match incident.ended_at {
        Some(at) => format!("was down for {}", lasted(at)),
        None => format!("has been down for {}", lasted(now)),
    }
}

/// The places that saw it; `None` if none of them has a name.
pub fn places(incident: &Incident) -> Option<String> {
    let names: Vec<String> = incident.places.iter().map(|place| words::place(place)).collect();
    let is_unnamed = incident.places.iter().all(String::is_empty);
    (!is_unnamed).then(|| words::list(&names.iter().map(String::as_str).collect::<Vec<_>>(), 10))
}

/// Identifies an incident within its page.
pub fn anchor(incident: &Incident) -> String {
    format!(
        "i{:08x}-{}",
        series_id(&incident.address, "") as u32,
        incident.number
    )
}

/// The page of all months, which shows the newest one, and the page of each month: the path and the text of each.
pub fn render(view: &View<'_>) -> Vec<(String, String)> {
    let months = view.months();
    let links = |root: &str, current: &str| {
        html! {
            @if !months.is_empty() {
                nav.months aria-label="Months" {
                    ul {
                        @for (key, incidents) in &months {
                            li {
                                a href={ (root) "incidents/" (key) "/" } aria-current=[(key == current).then_some("page")] {
                                    (words::month(incidents[0].1.started_at))
                                }
                                " " span.count { (words::counted(incidents.len() as i64, "incident")) }
                            }
                        }
                    }
                }
            }
        }
    };
    let newest = months.first().map(|(_, incidents)| {
        html! {
            h2 { (words::month(incidents[0].1.started_at)) }
            (list(view, incidents, "../", 3))
        }
    });
    let all = Page {
        title: "Incidents",
        root: "../",
        place: "Incidents",
        main: html! {
            h1 { "Incidents" }
            @match newest {
                Some(newest) => { (links("../", "")) (newest) },
                None => p { "No incidents." },
            }
            @if view.snapshot.has_more_incidents {
                p { "Only the newest incidents are shown." }
            }
        },
    };
    let mut pages = vec![("incidents/index.html".to_owned(), all.render(view))];
    for (key, incidents) in &months {
        let title = format!("Incidents of {}", words::month(incidents[0].1.started_at));
        let page = Page {
            title: &title,
            root: "../../",
            place: "Incidents",
            main: html! {
                h1 { (title) }
                (links("../../", key))
                (list(view, incidents, "../../", 2))
            },
        };
        pages.push((format!("incidents/{key}/index.html"), page.render(view)));
    }
    pages
}

//! The first page: the state of all sites, and the last 90 days of each.

use maud::{Markup, html};

use crate::page::html::{Page, badge, chart, host, incidents, mark, moment};
use crate::page::snapshot::{DAY, DAYS_SHOWN, State, slots};
use crate::page::view::{Shown, View, encoded};
use crate::page::words;

/// How many incidents are shown below the hosts.
const NEWEST: usize = 5;

pub fn render(view: &View<'_>) -> String {
    let sentence = view.sentence();
    let newest: Vec<_> = view.incidents().take(NEWEST).collect();
    let has_one_group = view.groups().count() == 1;
    let main = html! {
        h1 .sentence.(view.state().word()) { (mark(view.state())) " " (sentence) }
        @for more in view.more_sentences() {
            p.more { (more) }
        }
        @if view.hosts.is_empty() {
            p { (why_empty(view)) }
        }
        (chart::hatch())
        @for (group, hosts) in view.groups() {
            section {
                @match group {
                    Some(group) => h2 { (group) },
                    None if has_one_group => h2.unseen { "Sites" },
                    None => h2 { "Other sites" },
                }
                ul.hosts { @for shown in hosts { li { (row(view, shown)) } } }
            }
        }
        section {
            h2 { "Last incidents" }
            @if newest.is_empty() {
                p { "No incidents." }
            } @else {
                (incidents::list(view, &newest, "", 3))
                p { a href="incidents/" { "All incidents by month" } }
            }
        }
    };
    let page = Page {
        title: &sentence,
        root: "",
        place: "Overview",
        main,
    };
    page.render(view)
}

fn why_empty(view: &View<'_>) -> &'static str {
    if view.snapshot.hosts.is_empty() {
        "No record has arrived yet. A site appears here seconds after its first check."
    } else {
        "Sites are checked, but none has a name. Give each site that should appear here a name in the host file \
         (name=\"Web shop\"), or set PAGE_SHOW_ADDRESSES=yes."
    }
}

/// A host in the list.
fn row(view: &View<'_>, shown: &Shown<'_>) -> Markup {
    let (host, now) = (shown.host, view.snapshot.taken_at);
    html! {
        div.head {
            h3 { a href={ "host/" (encoded(&shown.key)) "/" } { (shown.name) } }
            (badge(shown.state))
        }
        @if let Some(address) = &shown.address {
            p.address { (address) }
        }
        (chart::days(&slots(&host.days, DAY, DAYS_SHOWN, now)))
        div.ends aria-hidden="true" { span { "90 days ago" } span { "today" } }
        (host::uptime(host))
        p.last {
            (last_check(shown))
            @if let Some(seconds) = host.lately(now) { " Median response time " (words::latency(seconds).replace(' ', "\u{a0}")) "." }
            (host::differing(shown, now))
            (host::expiring(host, now))
        }
    }
}

/// The last outcome in words, and since when the host is down.
fn last_check(shown: &Shown<'_>) -> Markup {
    let Some((place, at)) = shown
        .host
        .last_check()
        .and_then(|place| place.last_check_at.map(|at| (place, at)))
    else {
        return html! { "Not checked yet." };
    };
    let known = if place.is_valid == Some(true) {
        "ok"
    } else {
        "unknown"
    };
    let outcome = words::outcome(place.outcome.as_deref().unwrap_or(known));
    html! {
        "Last check " (moment(at)) ": " (words::in_a_sentence(&outcome)) "."
        @if let (State::Down, Some(since)) = (shown.state, shown.host.since) { " Down since " (moment(since)) "." }
    }
}

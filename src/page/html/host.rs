//! The page of one host.

use maud::{Markup, html};

use crate::page::html::{Page, badge, chart, incidents, mark, moment};
use crate::page::snapshot::{DAY, DAYS_SHOWN, HOUR, HOURS_SHOWN, Host, State, WINDOWS, slots};
use crate::page::view::{Shown, View, encoded};
use crate::page::words;

/// How many incidents of one host its page shows; the pages of the months have all.
const NEWEST: usize = 20;

/// A certificate that expires earlier is worth a warning.
const SOON: i64 = 14 * DAY;

const ROOT: &str = "../../";

#[expect(clippy::too_many_lines, reason = "the whole page in the order of its parts")]
pub fn render(view: &View<'_>, shown: &Shown<'_>) -> String {
    let (host, now) = (shown.host, view.snapshot.taken_at);
    let hours = slots(&host.hours, HOUR, HOURS_SHOWN, now);
    let days = slots(&host.days, DAY, DAYS_SHOWN, now);
    let of_host = view.incidents().filter(|(other, _)| std::ptr::eq(*other, shown));
    let newest: Vec<_> = of_host.take(NEWEST + 1).collect();
    let (hour_ends, day_ends) = (["48 hours ago", "now"], ["90 days ago", "today"]);
    let main = html! {
        p.group { a href=(ROOT) { "All sites" } @if let Some(group) = &shown.group { " / " (group) } }
        h1 { (shown.name) }
        @if let Some(address) = &shown.address { p.address { (address) } }
        p.now {
            (badge(shown.state))
            @if let (Some(since), true) = (host.since, shown.state != State::NotChecked) { " since " (moment(since)) }
        }
        (chart::hatch())
        section {
            h2 { "Uptime" }
            (chart::days(&days))
            div.ends aria-hidden="true" { span { (day_ends[0]) } span { (day_ends[1]) } }
            (uptime(host))
        }
        section {
            h2 { "Last 48 hours" }
            (chart::response_time(&hours, "hour", hour_ends))
            (chart::phases(&hours, "hour", hour_ends))
            (chart::table(&hours, "hours", "hour", words::date_and_time))
        }
        section {
            h2 { "Last 90 days" }
            (chart::response_time(&days, "day", day_ends))
            (chart::phases(&days, "day", day_ends))
            (chart::table(&days, "days", "day", words::date))
        }
        section {
            h2 { "Certificate" }
            p { (certificate(host, now)) }
        }
        section {
            h2 { "Places" }
            (places(view, shown))
        }
        section {
            h2 { "Incidents" }
            @if newest.is_empty() {
                p { "No incidents." }
            } @else {
                (incidents::list(view, &newest[..newest.len().min(NEWEST)], ROOT, 3))
                @if newest.len() > NEWEST { p { "Earlier incidents are among " a href={ (ROOT) "incidents/" } { "all incidents" } "." } }
            }
        }
        section {
            h2 { "Badge" }
            @let badge = format!("{ROOT}badge/{}.svg", encoded(&shown.key));
            p { a href=(badge) { img src=(badge) alt=(format!("Badge: {} is {}", shown.name, words::state(shown.state))) height="20"; } }
        }
    };
    let page = Page {
        title: &format!("{} is {}", shown.name, words::state(shown.state)),
        root: ROOT,
        place: "",
        main,
    };
    page.render(view)
}

/// The share of valid checks in each window. With several places the checks can differ, so the share of time without an incident
/// is shown as well.
pub fn uptime(host: &Host) -> Markup {
    let has_places = host.places.len() > 1;
    html! {
        dl.uptime {
            @for (((_, name), counts), verdict) in WINDOWS.iter().zip(host.windows).zip(host.verdict_uptimes) {
                div {
                    dt { (match *name { "24 hours" => "24 hours", "168 hours" => "7 days", "720 hours" => "30 days", _ => "90 days" }) }
                    dd {
                        @if let Some(share) = words::share(counts) { strong { (share) } " " }
                        span { (words::of_checks(counts)) }
                        @if let (true, Some(verdict)) = (has_places, verdict) {
                            span { "up " (words::share_of_time(verdict)) " of the time" }
                        }
                    }
                }
            }
        }
    }
}

/// Which places see the host up and which see it down, if they differ.
pub fn differing(shown: &Shown<'_>, now: i64) -> Markup {
    let states = shown.host.places.iter().map(|place| (place, place.state(now)));
    let fresh: Vec<_> = states.filter(|(_, state)| *state != State::NotChecked).collect();
    let names = |wanted| -> Vec<String> {
        let places = fresh.iter().filter(|(_, state)| *state == wanted);
        places.map(|(place, _)| words::place(&place.agent)).collect()
    };
    let (up, down) = (names(State::Up), names(State::Down));
    let joined = |names: &[String]| words::list(&names.iter().map(String::as_str).collect::<Vec<_>>(), 5);
    html! {
        @if !up.is_empty() && !down.is_empty() {
            " " span.differing { "Down from " (joined(&down)) "; up from " (joined(&up)) "." }
        }
    }
}

/// A warning about a certificate that has to be renewed.
pub fn expiring(host: &Host, now: i64) -> Markup {
    let left = host.certificate_expires_at().map(|at| at.saturating_sub(now));
    html! {
        @match left {
            Some(..0) => { " " span.differing { "The certificate has expired." } }
            Some(left @ ..SOON) => { " " span.differing { "The certificate expires in " (words::duration(left)) "." } }
            _ => {}
        }
    }
}

fn certificate(host: &Host, now: i64) -> Markup {
    let Some(at) = host.certificate_expires_at() else {
        return html! { "No certificate was seen." };
    };
    let left = at.saturating_sub(now);
    html! {
        @if left < 0 {
            (mark(State::Down)) " Expired " (moment(at)) ", " (words::duration(-left)) " ago."
        } @else {
            (mark(if left < SOON { State::Partly } else { State::Up }))
            " Expires " (moment(at)) ", in " (words::duration(left)) "."
        }
    }
}

fn places(view: &View<'_>, shown: &Shown<'_>) -> Markup {
    let now = view.snapshot.taken_at;
    html! {
        div.scroll role="region" aria-label="Places" tabindex="0" {
            table {
                thead { tr { @for head in ["Place", "State", "Last check", "Outcome", "Error"] { th scope="col" { (head) } } } }
                tbody {
                    @for place in &shown.host.places {
                        tr {
                            th scope="row" { (words::place(&place.agent)) }
                            td { (badge(place.state(now))) }
                            td { @if let Some(at) = place.last_check_at { (moment(at)) } @else { "–" } }
                            td { @if let Some(outcome) = &place.outcome { (words::outcome(outcome)) } @else { "–" } }
                            td { @if let Some(error) = &place.error { (view.error(error, &shown.host.address)) } @else { "–" } }
                        }
                    }
                }
            }
        }
    }
}

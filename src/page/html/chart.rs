//! The pictures: the bar of days, the response time, and its phases, as SVG.
//!
//! Each has a text alternative, and a table beside it has its figures. The pictures stretch to the width of the page, so
//! their labels are outside of them. States differ in their shape, lines in their dashes, and phases in their order and lightness.

use std::fmt::Write as _;

use maud::{Markup, html};

use crate::page::snapshot::{Bucket, Counts, PHASES, State};
use crate::page::words;

type Slots<'a> = [(i64, Option<&'a Bucket>)];

/// The height of a day in the bar, and its width with the gap.
const BAR_HEIGHT: usize = 32;
const STEP: usize = 4;

fn state_of(slot: Option<&Bucket>) -> State {
    State::of(slot.map(|bucket| bucket.counts).unwrap_or_default())
}

/// A stroke for a day: full, cut at the top, half, an exclamation mark; what is not checked is hatched.
fn stroke(state: State) -> &'static str {
    match state {
        State::Up | State::NotChecked => "v32",
        State::Slow => "m0 9v23",
        State::Partly => "m0 16v16",
        State::Down => "v21m0 5v6",
    }
}

/// The bar of days. The days that were up are one path, and so are those without a check. Each other day has a tooltip; the
/// table has the same for readers without a mouse.
pub fn days(slots: &Slots<'_>) -> Markup {
    let (mut up, mut not_checked, mut others) = (String::new(), String::new(), Vec::new());
    for (index, (starts_at, slot)) in slots.iter().enumerate() {
        let state = state_of(*slot);
        let path = format!("M{} 0{}", index * STEP + STEP / 2, stroke(state));
        match state {
            State::Up => up += &path,
            State::NotChecked => not_checked += &path,
            _ => {
                let counts = slot.map(|bucket| bucket.counts).unwrap_or_default();
                others.push((state, path, words::of_a_day(*starts_at, state, counts)));
            }
        }
    }
    let (width, spoken) = (slots.len() * STEP, spoken(slots));
    html! {
        svg.days viewBox={ "0 0 " (width) " " (BAR_HEIGHT) } preserveAspectRatio="none" role="img" aria-label=(spoken) {
            @if !up.is_empty() { path class=(State::Up.word()) d=(up) {} }
            @if !not_checked.is_empty() { path stroke="url(#hatch)" d=(not_checked) {} }
            @for (state, path, said) in others {
                path class=(state.word()) d=(path) { title { (said) } }
            }
        }
    }
}

/// The pattern for hatching the bars of a page.
pub fn hatch() -> Markup {
    html! {
        svg.unseen aria-hidden="true" focusable="false" {
            defs {
                pattern id="hatch" width="4" height="4" patternUnits="userSpaceOnUse" {
                    path.hatch d="M-1 1l2-2M0 4l4-4M3 5l2-2" {}
                }
            }
        }
    }
}

/// A single stroke, for the legend.
pub fn sample(state: State) -> Markup {
    html! {
        svg.sample viewBox="0 0 8 32" aria-hidden="true" focusable="false" {
            @match state {
                // Drawn without the pattern, because not every page has it.
                State::NotChecked => path.hatch d="M1 8l6-6M1 14l6-6M1 20l6-6M1 26l6-6M1 32l6-6" {},
                state => path class=(state.word()) d={ "M4 0" (stroke(state)) } {},
            }
        }
    }
}

/// `90 days: 85 up, 1 partly down, 4 not checked`
fn spoken(slots: &Slots<'_>) -> String {
    let count = |state| slots.iter().filter(|(_, slot)| state_of(*slot) == state).count();
    let counts = State::ALL.into_iter().map(|state| (state, count(state)));
    let counts: Vec<_> = counts
        .filter(|(_, count)| *count > 0)
        .map(|(state, count)| format!("{count} {}", words::state(state)))
        .collect();
    format!("{} days: {}", slots.len(), counts.join(", "))
}

/// The upper end of a scale from 0: 1, 2 or 5 times a power of ten, and not below `most`.
fn scale_end(most: f64) -> f64 {
    let power = 10_f64.powf(most.max(1e-4).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0];
    let fits = steps
        .into_iter()
        .map(|step| step * power)
        .find(|end| *end >= most);
    fits.unwrap_or(10.0 * power)
}

/// The median as a line and the 95th percentile as a dashed one.
pub fn response_time(slots: &Slots<'_>, unit: &str, ends: [&str; 2]) -> Markup {
    let all = |get: fn(&Bucket) -> Option<f64>| slots.iter().filter_map(move |(_, slot)| get((*slot)?));
    let end = scale_end(all(|bucket| bucket.p95).fold(0.0, f64::max));
    let line = |get: fn(&Bucket) -> Option<f64>| {
        let mut path = String::new();
        let mut is_drawing = false;
        for (index, (_, slot)) in slots.iter().enumerate() {
            let Some(seconds) = slot.and_then(get) else {
                is_drawing = false;
                continue;
            };
            let y = 100.0 - seconds / end * 100.0;
            // `h.8` draws the first point of a line as a dash. A point without neighbours, such as the first one of a new site,
            // would be invisible.
            let _ = match is_drawing {
                true => write!(path, "L{index}.5 {y:.1}"),
                false => write!(path, "M{index}.1 {y:.1}h.8"),
            };
            is_drawing = true;
        }
        path
    };
    let range = |get: fn(&Bucket) -> Option<f64>| {
        let (low, high) = (
            all(get).fold(f64::INFINITY, f64::min),
            all(get).fold(0.0, f64::max),
        );
        format!("between {} and {}", words::latency(low), words::latency(high))
    };
    if all(|bucket| bucket.p50).next().is_none() {
        return without_figures("Response time");
    }
    let spoken = format!(
        "Response time by {unit}: median {}, 95th percentile {}. The table has the figures.",
        range(|bucket| bucket.p50),
        range(|bucket| bucket.p95)
    );
    let key = html! {
        span { svg.key viewBox="0 0 24 8" aria-hidden="true" focusable="false" { path.p50 d="M1 4h22" {} } " median" }
        span { svg.key viewBox="0 0 24 8" aria-hidden="true" focusable="false" { path.p95 d="M1 4h22" {} } " 95th percentile" }
    };
    let picture = html! {
        path.p95 d=(line(|bucket| bucket.p95)) {}
        path.p50 d=(line(|bucket| bucket.p50)) {}
    };
    framed("Response time", &spoken, end, slots.len(), picture, ends, key)
}

/// The mean of each phase, one upon another.
pub fn phases(slots: &Slots<'_>, unit: &str, ends: [&str; 2]) -> Markup {
    let sum = |bucket: &Bucket| bucket.phases.iter().sum::<f64>();
    let end = scale_end(
        slots
            .iter()
            .filter_map(|(_, slot)| slot.map(sum))
            .fold(0.0, f64::max),
    );
    let mut paths = PHASES.map(|_| String::new());
    for (index, (_, slot)) in slots.iter().enumerate() {
        let Some(bucket) = slot else { continue };
        let mut below = 0.0;
        for (path, seconds) in paths.iter_mut().zip(bucket.phases) {
            let height = seconds / end * 100.0;
            if height >= 0.05 {
                let _ = write!(
                    path,
                    "M{}.1 {:.1}h.8v{height:.1}h-.8z",
                    index,
                    100.0 - below - height
                );
            }
            below += height;
        }
    }
    let totals = |phase: usize| {
        slots
            .iter()
            .filter_map(|(_, slot)| slot.map(|bucket| bucket.phases[phase]))
            .sum::<f64>()
    };
    let longest = (0..PHASES.len()).max_by(|a, b| totals(*a).total_cmp(&totals(*b)));
    let Some(longest) = longest.filter(|phase| totals(*phase) > 0.0) else {
        return without_figures("Phases of a check");
    };
    let spoken = format!(
        "Mean time of each phase by {unit}, stacked; {} takes the longest. The table has the figures.",
        PHASES[longest]
    );
    let key = html! {
        // From the top of the stack to its bottom, as the picture shows it.
        @for (phase, name) in PHASES.iter().enumerate().rev() {
            span { svg.key viewBox="0 0 24 8" aria-hidden="true" focusable="false" { path class={ "phase" (phase) } d="M0 0h24v8H0z" {} } " " (name) }
        }
    };
    let picture = html! {
        @for (phase, path) in paths.iter().enumerate() {
            path class={ "phase" (phase) } d=(path) {}
        }
    };
    framed("Phases of a check", &spoken, end, slots.len(), picture, ends, key)
}

fn without_figures(title: &str) -> Markup {
    html! {
        figure {
            figcaption { strong { (title) } }
            p { "No answer came in this time." }
        }
    }
}

/// A picture with a scale from 0 to `end` seconds at its left, and the first and last time below it.
fn framed(
    title: &str,
    spoken: &str,
    end: f64,
    slots: usize,
    picture: Markup,
    ends: [&str; 2],
    key: Markup,
) -> Markup {
    html! {
        figure {
            figcaption { strong { (title) } span.keys { (key) } }
            div.plot {
                div.scale aria-hidden="true" {
                    span { (words::latency(end)) }
                    span { (words::latency(end / 2.0)) }
                    span { "0" }
                }
                svg.chart viewBox={ "0 0 " (slots) " 100" } preserveAspectRatio="none" role="img" aria-label=(spoken) {
                    path.grid d={ "M0 0H" (slots) "M0 50H" (slots) "M0 100H" (slots) } {}
                    (picture)
                }
                div.ends aria-hidden="true" { span { (ends[0]) } span { (ends[1]) } }
            }
        }
    }
}

/// The figures of all pictures over these slots, the newest first.
pub fn table(slots: &Slots<'_>, id: &str, unit: &str, time: fn(i64) -> String) -> Markup {
    let title = format!("Figures by {unit}");
    let seconds = |seconds: Option<f64>| seconds.map_or_else(|| "–".to_owned(), words::latency);
    html! {
        details id=(id) {
            summary { (title) }
            div.scroll role="region" aria-label=(title) tabindex="0" {
                table {
                    thead {
                        tr {
                            th scope="col" { (unit[..1].to_uppercase()) (&unit[1..]) }
                            th scope="col" { "State" }
                            @for head in ["Checks", "Failed", "Not made", "Median", "95 %"].iter().chain(&PHASES) {
                                th.number scope="col" { (head) }
                            }
                        }
                    }
                    tbody {
                        @for (starts_at, slot) in slots.iter().rev() {
                            @let Counts { failed, not_made, .. } = slot.map(|bucket| bucket.counts).unwrap_or_default();
                            tr {
                                th scope="row" { (time(*starts_at)) }
                                td { (words::state(state_of(*slot))) }
                                td.number { (words::number(slot.map_or(0, |bucket| bucket.counts.checks()))) }
                                td.number { (words::number(failed)) }
                                td.number { (words::number(not_made)) }
                                td.number { (seconds(slot.and_then(|bucket| bucket.p50))) }
                                td.number { (seconds(slot.and_then(|bucket| bucket.p95))) }
                                @for phase in 0..PHASES.len() {
                                    td.number { (seconds(slot.map(|bucket| bucket.phases[phase]).filter(|seconds| *seconds > 0.0))) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_ends_at_a_round_number() {
        for (most, end) in [
            (0.0, 0.0001),
            (0.09, 0.1),
            (0.1, 0.1),
            (0.11, 0.2),
            (0.3, 0.5),
            (0.7, 1.0),
            (31.0, 50.0),
        ] {
            assert!(
                (scale_end(most) / end - 1.0).abs() < 1e-9,
                "{most}: {}",
                scale_end(most)
            );
        }
    }

    #[test]
    fn every_day_is_a_stroke_whose_shape_tells_its_state() {
        let bucket = |valid, failed| Bucket {
            counts: Counts {
                valid,
                failed,
                ..Counts::default()
            },
            ..Bucket::default()
        };
        let (up, partly, down) = (bucket(9, 0), bucket(9, 1), bucket(1, 9));
        let slots = [
            (0, None),
            (1, Some(&up)),
            (2, Some(&partly)),
            (3, Some(&down)),
            (4, Some(&up)),
        ];
        let text = days(&slots).into_string();
        assert!(
            text.contains(r#"aria-label="5 days: 2 up, 1 partly down, 1 down, 1 not checked""#),
            "{text}"
        );
        for path in [
            r#"stroke="url(#hatch)" d="M2 0v32""#,
            r#"class="up" d="M6 0v32M18 0v32""#,
            r#"class="partly" d="M10 0m0 16v16"><title>1 Jan 1970: partly down, 1 of 10 checks failed</title>"#,
            r#"class="down" d="M14 0v21m0 5v6"><title>1 Jan 1970: down, 9 of 10 checks failed</title>"#,
        ] {
            assert!(text.contains(path), "{path} in {text}");
        }
        let strokes: std::collections::HashSet<_> = State::ALL.map(stroke).into_iter().collect();
        assert_eq!(strokes.len(), 4, "all but the hatched one differ");
    }

    #[test]
    fn a_line_has_a_gap_where_no_check_had_an_answer() {
        let bucket = |p50| Bucket {
            p50,
            p95: p50,
            ..Bucket::default()
        };
        let (one, none) = (bucket(Some(0.1)), bucket(None));
        let slots = [
            (0, Some(&one)),
            (1, Some(&one)),
            (2, Some(&none)),
            (3, None),
            (4, Some(&one)),
        ];
        let text = response_time(&slots, "hour", ["then", "now"]).into_string();
        assert!(
            text.contains(r#"class="p50" d="M0.1 0.0h.8L1.5 0.0M4.1 0.0h.8""#),
            "{text}"
        );
        assert!(text.contains("median between 100 ms and 100 ms"), "{text}");
        for empty in [response_time, phases].map(|draw| draw(&[(0, None)], "hour", ["", ""]).into_string()) {
            assert!(
                empty.contains("No answer came") && !empty.contains("svg"),
                "{empty}"
            );
        }
    }
}

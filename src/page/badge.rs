//! The badge of a host: as a picture, and as JSON for shields.io (its "endpoint" badge).
//!
//! Pure.

use maud::html;
use serde_json::json;

use crate::page::snapshot::State;
use crate::page::view::Shown;
use crate::page::words;

/// The colours of the style sheet's light scheme. White text is readable on them.
fn color(state: State) -> &'static str {
    match state {
        State::Up => "#1a7340",
        State::Slow => "#7a5f00",
        State::Partly => "#a14f00",
        State::Down => "#bf2424",
        State::NotChecked => "#5a6472",
    }
}

fn message(shown: &Shown<'_>) -> String {
    let month = shown.host.windows[2];
    match (shown.state, words::share(month)) {
        (State::NotChecked, _) | (_, None) => words::state(shown.state).to_owned(),
        (state, Some(share)) => format!("{}, {share}", words::state(state)),
    }
}

/// An SVG file. Screen readers read its words too.
pub fn svg(shown: &Shown<'_>) -> String {
    const PADDING: usize = 6;
    let (label, message) = (&shown.name, message(shown));
    let (left, right) = (text_width(label), text_width(&message));
    let (middle, width) = (left + 2 * PADDING, left + right + 4 * PADDING);
    let spoken = format!("{label}: {message}");
    html! {
        svg xmlns="http://www.w3.org/2000/svg" width=(width) height="20" viewBox={ "0 0 " (width) " 20" } role="img" aria-label=(spoken) {
            title { (spoken) }
            path fill="#39424e" d={ "M3 0H" (middle) "V20H3A3 3 0 0 1 0 17V3A3 3 0 0 1 3 0Z" } {}
            path fill=(color(shown.state)) d={ "M" (middle) " 0H" (width - 3) "A3 3 0 0 1 " (width) " 3V17A3 3 0 0 1 " (width - 3) " 20H" (middle) "Z" } {}
            g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" aria-hidden="true" {
                text x=(PADDING) y="14" textLength=(left) lengthAdjust="spacingAndGlyphs" { (label) }
                text x=(middle + PADDING) y="14" textLength=(right) lengthAdjust="spacingAndGlyphs" { (message) }
            }
        }
    }
    .into_string()
}

/// The approximate width of a text. `textLength` then gives the text exactly this width.
fn text_width(text: &str) -> usize {
    let width = |char: char| match char {
        'i' | 'j' | 'l' | 't' | 'f' | 'r' | 'I' | '.' | ',' | ' ' | ':' | '\'' => 4,
        'm' | 'w' | 'M' | 'W' | '%' | '@' => 10,
        char if char.is_ascii() => 7,
        _ => 11,
    };
    text.chars().map(width).sum::<usize>().max(1)
}

/// <https://shields.io/badges/endpoint-badge>
pub fn json(shown: &Shown<'_>) -> String {
    crate::page::json::text(&json!({
        "schemaVersion": 1,
        "label": shown.name,
        "message": message(shown),
        "color": color(shown.state),
        "isError": shown.state == State::Down,
    }))
}

/// The icon of the page, for the tab of a browser.
pub fn icon(state: State) -> String {
    html! {
        svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16" {
            style { ".disc{fill:" (color(state)) "}.line,.open{fill:none;stroke:#fff;stroke-width:2;stroke-linecap:round}.open{stroke:" (color(state)) ";stroke-dasharray:3 2}" }
            (crate::page::html::shape(state))
        }
    }
    .into_string()
}

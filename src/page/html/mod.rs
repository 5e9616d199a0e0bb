//! The pages as HTML: the frame that all of them share, and the marks for states.
//!
//! Pure. maud escapes every text. There are no inline styles and scripts, which the Content-Security-Policy forbids.

pub mod chart;
pub mod host;
pub mod incidents;
pub mod overview;

use maud::{DOCTYPE, Markup, html};

use crate::page::snapshot::State;
use crate::page::view::View;
use crate::page::words;

/// Sent as a header, and in a `<meta>` for files on another server. Only a header can forbid frames.
pub const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; \
                          base-uri 'none'; form-action 'none'";

/// A page: its title, the way from it to the top (`../../`), and its main part.
pub struct Page<'a> {
    pub title: &'a str,
    pub root: &'a str,
    /// The word for this page in the navigation.
    pub place: &'a str,
    pub main: Markup,
}

impl Page<'_> {
    pub fn render(self, view: &View<'_>) -> String {
        let Self {
            title,
            root,
            place,
            main,
        } = self;
        let name = &view.options.title;
        let up = if root.is_empty() { "./" } else { root };
        let current = |word: &str| (word == place).then_some("page");
        html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta http-equiv="Content-Security-Policy" content=(POLICY);
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    title { (title) " – " (name) }
                    link rel="stylesheet" href={ (root) "style.css" };
                    link rel="icon" type="image/svg+xml" href={ (root) "icon.svg" };
                    link rel="alternate" type="application/atom+xml" title={ "Incidents – " (name) } href={ (root) "feed.atom" };
                    script src={ (root) "refresh.js" } defer {}
                    noscript { meta http-equiv="refresh" content="60"; }
                }
                body {
                    a.skip href="#main" { "Skip to the content" }
                    header {
                        a.title href=(up) { (name) }
                        nav aria-label="Pages" {
                            a href=(up) aria-current=[current("Overview")] { "Overview" }
                            a href={ (root) "incidents/" } aria-current=[current("Incidents")] { "Incidents" }
                        }
                    }
                    p #news .unseen role="status" {}
                    p #old .banner role="alert" hidden { "This page could not be refreshed. It shows the state at the time below." }
                    main #main tabindex="-1" data-at=(words::machine_time(view.snapshot.taken_at)) {
                        @if let Some(age) = view.age {
                            p.banner {
                                strong { "These figures are " (words::duration(age)) " old." }
                                " The database cannot be reached at the moment."
                            }
                        }
                        (main)
                        p.at { "As of " (moment(view.snapshot.taken_at)) ". All times are UTC." }
                    }
                    footer {
                        (legend())
                        p {
                            a href={ (root) "feed.atom" } { "Atom feed" }
                            a href={ (root) "status.json" } { "status.json" }
                        }
                    }
                }
            }
        }
        .into_string()
    }
}

/// What the shapes of the bars mean.
fn legend() -> Markup {
    let meaning = |state| match state {
        State::Up => "no check failed",
        State::Slow => "a tenth or more of the checks were slow",
        State::Partly => "some checks failed",
        State::Down => "half or more of the checks failed",
        State::NotChecked => "no check was made",
    };
    html! {
        dl.legend aria-label="The bars" {
            @for state in State::ALL {
                div {
                    dt { (chart::sample(state)) " " (words::state(state)) }
                    dd { (meaning(state)) }
                }
            }
        }
    }
}

/// A state in words, with a mark whose shape differs too.
pub fn badge(state: State) -> Markup {
    html! {
        span.state.(state.word()) { (mark(state)) " " (words::state(state)) }
    }
}

/// The mark alone, for use beside the words.
pub fn mark(state: State) -> Markup {
    html! {
        svg.mark.(state.word()) viewBox="0 0 16 16" aria-hidden="true" focusable="false" { (shape(state)) }
    }
}

/// A disc with a tick, a hand of a clock, a bar or a cross; a broken circle for what is not checked.
pub fn shape(state: State) -> Markup {
    let line = match state {
        State::Up => "M4.6 8.4 7 10.8 11.4 5.6",
        State::Slow => "M8 4v4.4l2.8 1.8",
        State::Partly => "M8 4.2v4.6M8 11.4v.4",
        State::Down => "M5.3 5.3l5.4 5.4M10.7 5.3l-5.4 5.4",
        State::NotChecked => "",
    };
    html! {
        @match state {
            State::NotChecked => circle.open cx="8" cy="8" r="6.2" {},
            State::Partly => path.disc d="M8 .8 15.6 14.6H.4Z" {},
            _ => circle.disc cx="8" cy="8" r="7.5" {},
        }
        path.line d=(line) {}
    }
}

/// A point in time, for people and programs.
pub fn moment(micros: i64) -> Markup {
    html! { time datetime=(words::machine_time(micros)) { (words::date_and_time(micros)) } }
}

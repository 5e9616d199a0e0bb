//! What the page shows of a snapshot: the hosts, their names and addresses within the page, their states, and the sentence about
//! all of them.
//!
//! Pure. Texts from elsewhere (names, errors, agents) are shortened and lose their hidden characters here; the templates escape
//! them. If addresses are hidden, they are removed here from names, errors and file names.

use std::collections::{HashMap, HashSet};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::page::snapshot::{Host, Incident, Snapshot, State};
use crate::page::words;
use crate::tables::buckets::series_id;
use crate::terminal::{cut, plain};

/// What the operator decides.
#[derive(Clone, Debug)]
pub struct Options {
    /// PAGE_TITLE
    pub title: String,
    /// PAGE_SHOW_ADDRESSES
    pub shows_addresses: bool,
}

/// The most characters of a name. An address may have 2,048.
const MAX_NAME_CHARS: usize = 80;
/// Longer than the errors of our records, which have at most 200.
const MAX_ERROR_CHARS: usize = 300;

/// The longest key. File systems take 255 bytes, and a suffix follows.
const MAX_KEY_BYTES: usize = 100;

/// How many hosts the sentences name.
const NAMED: usize = 5;

/// A snapshot with what is shown of it.
#[derive(Debug)]
pub struct View<'a> {
    pub options: &'a Options,
    pub snapshot: &'a Snapshot,
    /// By group, then by name. Hosts without a group come last.
    pub hosts: Vec<Shown<'a>>,
    by_address: HashMap<&'a str, usize>,
    /// The age of the snapshot, if the page has to show it.
    pub age: Option<i64>,
}

/// A host on the page.
#[derive(Debug)]
pub struct Shown<'a> {
    pub host: &'a Host,
    /// Its part of addresses of the page: `host/KEY/`, `badge/KEY.svg`.
    pub key: String,
    pub name: String,
    pub group: Option<String>,
    /// `None` if it is hidden, or is the name already.
    pub address: Option<String>,
    pub state: State,
}

/// The page says that a snapshot is old if it is older than this: three rounds of reading.
const OLD_AFTER: i64 = 30 * crate::page::snapshot::SECOND;

impl<'a> View<'a> {
    pub fn new(snapshot: &'a Snapshot, options: &'a Options, now: i64) -> Self {
        let mut keys = HashSet::new();
        let mut hosts: Vec<Shown<'a>> = Vec::new();
        for host in &snapshot.hosts {
            let given = host
                .name
                .as_deref()
                .map(plain)
                .filter(|name| !name.trim().is_empty());
            if given.is_none() && !options.shows_addresses {
                continue;
            }
            let address = plain(&host.address);
            let name = given.as_deref().unwrap_or(&address);
            hosts.push(Shown {
                host,
                key: key(name, &host.address, &mut keys),
                name: cut(name.trim(), MAX_NAME_CHARS),
                group: host
                    .group
                    .as_deref()
                    .map(|group| cut(&plain(group), MAX_NAME_CHARS)),
                address: (options.shows_addresses && given.is_some()).then(|| cut(&address, 200)),
                state: host.state(snapshot.taken_at),
            });
        }
        hosts.sort_by(|a, b| {
            let by = |shown: &Shown<'_>| {
                (
                    shown.group.is_none(),
                    shown.group.clone(),
                    shown.name.to_lowercase(),
                )
            };
            by(a).cmp(&by(b))
        });
        let by_address = hosts
            .iter()
            .enumerate()
            .map(|(index, shown)| (shown.host.address.as_str(), index))
            .collect();
        let age = now.saturating_sub(snapshot.taken_at);
        Self {
            options,
            snapshot,
            hosts,
            by_address,
            age: (age > OLD_AFTER).then_some(age),
        }
    }

    /// The hosts by group, in their order.
    pub fn groups(&self) -> impl Iterator<Item = (Option<&str>, &[Shown<'a>])> {
        let chunks = self.hosts.chunk_by(|a, b| a.group == b.group);
        chunks.map(|hosts| (hosts[0].group.as_deref(), hosts))
    }

    /// The incidents of hosts that are shown, the newest first.
    pub fn incidents(&self) -> impl Iterator<Item = (&Shown<'a>, &'a Incident)> {
        self.snapshot.incidents.iter().filter_map(|incident| {
            let index = self.by_address.get(incident.address.as_str())?;
            Some((&self.hosts[*index], incident))
        })
    }

    /// The same by month, the newest first: the key of the month, and its incidents.
    pub fn months(&self) -> Vec<(String, Vec<(&Shown<'a>, &'a Incident)>)> {
        let incidents: Vec<_> = self.incidents().collect();
        let month = |(_, incident): &(&Shown<'a>, &Incident)| words::month_key(incident.started_at);
        let months = incidents.chunk_by(|a, b| month(a) == month(b));
        months.map(|same| (month(&same[0]), same.to_vec())).collect()
    }

    /// An error as it is shown.
    pub fn error(&self, error: &str, address: &str) -> String {
        let error = plain(error);
        let error = if self.options.shows_addresses {
            error
        } else {
            without_addresses(&error, address)
        };
        cut(&error, MAX_ERROR_CHARS)
    }

    fn named(&self, state: State) -> Vec<&str> {
        let hosts = self.hosts.iter().filter(|shown| shown.state == state);
        hosts.map(|shown| shown.name.as_str()).collect()
    }

    /// The worst state of all, for the title and the icon.
    pub fn state(&self) -> State {
        let states: HashSet<State> = self.hosts.iter().map(|shown| shown.state).collect();
        [State::Down, State::Partly, State::NotChecked, State::Slow]
            .into_iter()
            .find(|state| states.contains(state))
            .unwrap_or(if self.hosts.is_empty() {
                State::NotChecked
            } else {
                State::Up
            })
    }

    /// The state of all hosts in one sentence.
    pub fn sentence(&self) -> String {
        let all = self.hosts.len();
        let (down, not_checked) = (self.named(State::Down), self.named(State::NotChecked));
        if let [only] = self.hosts.as_slice() {
            return match only.state {
                State::Partly => format!("{} is down from some places.", only.name),
                state => format!("{} is {}.", only.name, words::state(state)),
            };
        }
        if all == 0 {
            return "No site is shown.".to_owned();
        }
        if not_checked.len() == all {
            return "No site is being checked.".to_owned();
        }
        if !down.is_empty() {
            let verb = if down.len() == 1 { "is" } else { "are" };
            return format!(
                "{} of {all} sites {verb} down: {}.",
                down.len(),
                words::list(&down, NAMED)
            );
        }
        if !not_checked.is_empty() {
            let (up, count) = (all - not_checked.len(), not_checked.len());
            let verb = |count| if count == 1 { "is" } else { "are" };
            let names = words::list(&not_checked, NAMED);
            return format!(
                "{up} of {all} sites {} up; {count} {} not being checked: {names}.",
                verb(up),
                verb(count)
            );
        }
        format!("All {all} sites are up.")
    }

    /// What the sentence leaves out.
    pub fn more_sentences(&self) -> Vec<String> {
        if self.hosts.len() < 2 {
            return Vec::new();
        }
        let is_any_down = self.hosts.iter().any(|shown| shown.state == State::Down);
        let mut sentences = Vec::new();
        for (state, what) in [
            (State::Partly, "down from some places"),
            (State::Slow, "slow"),
            (State::NotChecked, "not being checked"),
        ] {
            let names = self.named(state);
            // Unless a site is down, the first sentence already names those that are not checked.
            if names.is_empty() || state == State::NotChecked && !is_any_down {
                continue;
            }
            let sites = if names.len() == 1 { "site is" } else { "sites are" };
            let (count, names) = (names.len(), words::list(&names, NAMED));
            sentences.push(format!("{count} {sites} {what}: {names}."));
        }
        sentences
    }
}

/// A part of a URL: everything but letters, digits and `-._~` is escaped.
pub fn encoded(key: &str) -> String {
    const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
        .remove(b'-')
        .remove(b'.')
        .remove(b'_')
        .remove(b'~');
    utf8_percent_encode(key, ESCAPED).to_string()
}

/// The name, if it can be the name of a file and no other host has it; else its letters and digits, and a number made of the
/// address. So a key stays the same as long as the host does.
fn key(name: &str, address: &str, taken: &mut HashSet<String>) -> String {
    let is_file_name = (1..=MAX_KEY_BYTES).contains(&name.len())
        && name.trim() == name
        && !name.starts_with('.')
        && !name.contains(['/', '\\'])
        && name != "index.html";
    // A file system may not tell upper from lower case.
    if is_file_name && taken.insert(name.to_lowercase()) {
        return name.to_owned();
    }
    let words = name
        .split(|char: char| !char.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty());
    let mut slug = words.collect::<Vec<_>>().join("-").to_lowercase();
    slug.truncate(MAX_KEY_BYTES / 2);
    let key = format!("{slug}-{:08x}", series_id(address, name) as u32);
    taken.insert(key.clone());
    key
}

/// The text with `…` for every word that may be an address or a part of one.
fn without_addresses(text: &str, address: &str) -> String {
    let host = address.split("://").last().unwrap_or(address);
    let host = host.split(['/', '?', '#']).next().unwrap_or(host);
    let host = host
        .rsplit_once(':')
        .map_or(host, |(host, _)| host)
        .trim_matches(['[', ']']);
    let is_own = |word: &str| !host.is_empty() && word.to_lowercase().contains(&host.to_lowercase());
    text.split(' ')
        .map(|word| {
            if is_own(word) || is_like_an_address(word) {
                "…"
            } else {
                word
            }
        })
        .collect::<Vec<_>>()
        .join(" ")
}

/// A URL, a path, a name with a dot, an IP address, or one of these with a port; but not a number or the end of a sentence.
fn is_like_an_address(word: &str) -> bool {
    let word =
        word.trim_matches(|char: char| !char.is_alphanumeric() && !matches!(char, ':' | '/' | '[' | ']'));
    let is_number = |text: &str| text.trim_end_matches(char::is_alphabetic).parse::<f64>().is_ok();
    let word = word.trim_end_matches(':');
    let has_inner = |sign: char| word.trim_matches(sign).contains(sign);
    let is_version = word.strip_prefix("HTTP/").is_some_and(is_number);
    !is_version
        && !is_number(word)
        && (word.contains('/') || has_inner('.') || word.contains(':') || word.contains('@'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::snapshot::{Place, SECOND};

    const NOW: i64 = 1_000_000 * SECOND;

    fn host(address: &str, name: Option<&str>, state: State) -> Host {
        let place = |is_valid, last_check_at| Place {
            is_valid: Some(is_valid),
            last_check_at: Some(last_check_at),
            interval_seconds: Some(10.0),
            ..Place::default()
        };
        Host {
            address: address.to_owned(),
            name: name.map(str::to_owned),
            is_down: Some(state == State::Down),
            places: match state {
                State::Up | State::Slow => vec![place(true, NOW)],
                State::Partly => vec![place(true, NOW), place(false, NOW)],
                State::Down => vec![place(false, NOW)],
                State::NotChecked => vec![place(true, 0)],
            },
            ..Host::default()
        }
    }

    fn options(shows_addresses: bool) -> Options {
        Options {
            title: "Status".to_owned(),
            shows_addresses,
        }
    }

    fn said(states: &[State]) -> (String, Vec<String>) {
        let hosts = states.iter().enumerate();
        let snapshot = Snapshot {
            taken_at: NOW,
            hosts: hosts
                .map(|(index, state)| host("a", Some(&format!("site {index}")), *state))
                .collect(),
            ..Snapshot::default()
        };
        let options = options(false);
        let view = View::new(&snapshot, &options, NOW);
        (view.sentence(), view.more_sentences())
    }

    #[test]
    fn one_sentence_says_how_all_sites_are() {
        use State::{Down, NotChecked, Partly, Up};
        let cases: [(&[State], &str, &[&str]); 9] = [
            (&[], "No site is shown.", &[]),
            (&[Up], "site 0 is up.", &[]),
            (&[Partly], "site 0 is down from some places.", &[]),
            (&[Up, Up], "All 2 sites are up.", &[]),
            (&[NotChecked, NotChecked], "No site is being checked.", &[]),
            (
                &[Up, NotChecked],
                "1 of 2 sites is up; 1 is not being checked: site 1.",
                &[],
            ),
            (
                &[Up, Partly],
                "All 2 sites are up.",
                &["1 site is down from some places: site 1."],
            ),
            (
                &[Down, Up, NotChecked],
                "1 of 3 sites is down: site 0.",
                &["1 site is not being checked: site 2."],
            ),
            (
                &[Down; 7],
                "7 of 7 sites are down: site 0, site 1, site 2, site 3, site 4 and 2 more.",
                &[],
            ),
        ];
        for (states, sentence, more) in cases {
            assert_eq!(
                said(states),
                (
                    sentence.to_owned(),
                    more.iter().map(|s| (*s).to_owned()).collect()
                )
            );
        }
    }

    #[test]
    fn only_hosts_with_a_name_are_shown_unless_addresses_are() {
        let snapshot = Snapshot {
            hosts: vec![
                host("https://a.example/", Some("Shop"), State::Up),
                host("https://b.example/", None, State::Up),
                host("https://c.example/", Some(" \u{202e}"), State::Up),
            ],
            ..Snapshot::default()
        };
        let names = |shows_addresses| {
            let options = options(shows_addresses);
            let view = View::new(&snapshot, &options, NOW);
            view.hosts
                .iter()
                .map(|shown| (shown.name.clone(), shown.address.clone()))
                .collect::<Vec<_>>()
        };
        assert_eq!(names(false), [("Shop".to_owned(), None)]);
        let with = |name: &str, address: Option<&str>| (name.to_owned(), address.map(str::to_owned));
        assert_eq!(
            names(true),
            [
                with("https://b.example/", None),
                with("https://c.example/", None),
                with("Shop", Some("https://a.example/"))
            ]
        );
    }

    #[test]
    fn a_key_is_the_name_or_something_that_can_name_a_file() {
        let mut taken = HashSet::new();
        let mut key = |name: &str, address: &str| super::key(name, address, &mut taken);
        assert_eq!(key("Web shop é&%", "a"), "Web shop é&%");
        for (name, begins) in [
            ("web SHOP É&%", "web-shop-"),
            ("../../etc/passwd", "etc-passwd-"),
            (".hidden", "hidden-"),
            ("a\\b", "a-b-"),
            ("", "-"),
            (&"x".repeat(500), "xxxx"),
            ("https://example.com/", "https-example-com-"),
        ] {
            let key = key(name, "b");
            assert!(key.starts_with(begins) && key.len() < 255, "{key}");
            assert!(!key.contains(['/', '\\', '.']), "{key}");
        }
        assert_eq!(encoded("a b/ü"), "a%20b%2F%C3%BC");
    }

    #[test]
    fn errors_do_not_tell_addresses_that_are_hidden() {
        let cases = [
            ("connection refused by 10.0.0.7:8080", "connection refused by …"),
            ("[::1]:80 is unreachable: no route", "… is unreachable: no route"),
            (
                "cannot resolve intranet: no such name",
                "cannot resolve … no such name",
            ),
            ("redirect to https://secret.example/x?y.", "redirect to …"),
            ("redirect to /login", "redirect to …"),
            (
                "the certificate is for *.corp.example, not for this",
                "the certificate is for … not for this",
            ),
            (
                "no answer within 9.5 s (HTTP/1.1).",
                "no answer within 9.5 s (HTTP/1.1).",
            ),
            ("status 503, expected 200-399", "status 503, expected 200-399"),
            ("mail me@corp", "mail …"),
        ];
        for (error, expected) in cases {
            assert_eq!(without_addresses(error, "http://intranet:8080/health"), expected);
        }
    }
}

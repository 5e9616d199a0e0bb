//! Searches for a host's regex in a text that comes in pieces, until a deadline.
//!
//! Uses regex-automata, which the regex crate is built on: that crate's own searches need the whole text and cannot be
//! interrupted. The matches are the same. Pure: the clock is an argument.
//!
//! Nearly all regexes are searched for with a lazy DFA, a table that is built during the search. It does not support Unicode
//! word boundaries (`\b`) in text that is not ASCII. For a regex with one, the search follows the states of the NFA.

mod dfa;
mod nfa;
mod states;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use dfa::DfaSearch;
use nfa::NfaSearch;
use regex_automata::Input;
use regex_automata::hybrid::dfa::DFA;
use regex_automata::hybrid::regex::Regex;
use regex_automata::nfa::thompson::{Compiler, NFA, WhichCaptures};
use regex_syntax::hir::{Hir, HirKind, Look};
use states::Starts;

/// The memory that a compiled regex may take. `\w{3,30}`, which includes all of Unicode, takes 1.5 MB.
const MAX_COMPILED_BYTES: usize = 4 << 20;

/// The size of the table that a search builds, as each check under way may have one. For the largest regexes the least possible
/// size is larger.
const MAX_TABLE_BYTES: usize = 256 << 10;

/// How many states of the NFA may be visited between two checks of the deadline: in the worst case some milliseconds.
const STATES_PER_DEADLINE_CHECK: usize = 1 << 18;
/// With few states, the clock is still read every few microseconds.
const MAX_BYTES_PER_DEADLINE_CHECK: usize = 4096;

/// The deadline passed before the end of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadlinePassed;

/// A compiled regex.
#[derive(Clone)]
pub struct Pattern {
    text: String,
    nfa: NFA,
    /// `None` if a search has to follow the NFA's states.
    dfa: Option<DFA>,
    starts: Starts,
    bytes_per_deadline_check: usize,
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

/// Whether it requires the beginning of the text after a character, or the end of the text before one, as `$5` does.
fn contradicts(hir: &Hir) -> bool {
    match hir.kind() {
        HirKind::Concat(parts) => {
            let takes = |part: &Hir| part.properties().minimum_len() != Some(0);
            parts.iter().enumerate().any(|(at, part)| {
                let looks = part.properties();
                contradicts(part)
                    || looks.look_set_prefix().contains(Look::Start) && parts[..at].iter().any(takes)
                    || looks.look_set_suffix().contains(Look::End) && parts[at + 1..].iter().any(takes)
            })
        }
        HirKind::Alternation(parts) => parts.iter().all(contradicts),
        HirKind::Capture(part) => contradicts(&part.sub),
        HirKind::Repetition(part) => part.min > 0 && contradicts(&part.sub),
        _ => false,
    }
}

/// Why a text is not a valid regex. `at`: the byte of the text where the mistake is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct PatternError {
    pub at: usize,
    pub why: String,
}

impl Pattern {
    /// # Errors
    /// The text does not have the syntax of the regex crate, or takes more than 4 MiB when compiled.
    pub fn new(text: &str) -> Result<Self, PatternError> {
        let hir = regex_syntax::Parser::new().parse(text).map_err(|error| {
            let (at, why) = match error {
                regex_syntax::Error::Parse(error) => (error.span().start.offset, error.kind().to_string()),
                regex_syntax::Error::Translate(error) => {
                    (error.span().start.offset, error.kind().to_string())
                }
                other => (0, other.to_string()),
            };
            PatternError { at, why }
        })?;
        let config = NFA::config()
            .which_captures(WhichCaptures::None)
            .nfa_size_limit(Some(MAX_COMPILED_BYTES));
        let nfa = Compiler::new()
            .configure(config)
            .build_from_hir(&hir)
            .map_err(|error| {
                let why = match error.size_limit() {
                    Some(limit) => format!("it takes more than {limit} bytes when compiled"),
                    None => error.to_string(),
                };
                PatternError { at: 0, why }
            })?;
        let dfa = if can_be_a_dfa(&nfa, &hir) {
            let config = DFA::config()
                .cache_capacity(MAX_TABLE_BYTES)
                .skip_cache_capacity_check(true)
                .specialize_start_states(true);
            let built = DFA::builder().configure(config).build_from_nfa(nfa.clone());
            Some(built.map_err(|error| PatternError {
                at: 0,
                why: error.to_string(),
            })?)
        } else {
            None
        };
        Ok(Self {
            text: text.to_owned(),
            dfa,
            starts: Starts::new(&nfa, &hir),
            bytes_per_deadline_check: (STATES_PER_DEADLINE_CHECK / nfa.states().len())
                .clamp(1, MAX_BYTES_PER_DEADLINE_CHECK),
            nfa,
        })
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The memory that the pattern takes.
    pub fn compiled_bytes(&self) -> usize {
        // The DFA shares the NFA and takes next to nothing itself.
        self.text.len() + self.nfa.memory_usage() + self.starts.bytes() + size_of::<Self>()
    }

    /// Whether it matches every body or none; `None`: that depends on the body.
    pub fn always(&self) -> Option<bool> {
        let hir = regex_syntax::parse(&self.text).ok()?;
        let properties = hir.properties();
        match properties.minimum_len() {
            None => Some(false),
            _ if contradicts(&hir) => Some(false),
            Some(0) if properties.look_set().is_empty() => Some(true),
            Some(_) => None,
        }
    }

    /// The most memory that one search for it takes.
    pub fn search_bytes(&self) -> usize {
        match &self.dfa {
            Some(dfa) => {
                let least = dfa
                    .get_config()
                    .get_minimum_cache_capacity(dfa.get_nfa())
                    .unwrap_or_default();
                MAX_TABLE_BYTES.max(least)
            }
            None => NfaSearch::bytes(self.nfa.states().len()),
        }
    }

    /// Where the first match is. `None` also if this way of searching does not support the regex (`\b` in text that is not
    /// ASCII).
    pub fn find(&self, text: &str) -> Option<Range<usize>> {
        let config = DFA::config()
            .skip_cache_capacity_check(true)
            .unicode_word_boundary(true);
        let regex = Regex::builder().dfa(config).build(&self.text).ok()?;
        let found = regex.try_search(&mut regex.create_cache(), &Input::new(text));
        found.ok()?.map(|found| found.range())
    }

    /// Whether the text has a match, without a deadline.
    pub fn is_match(self: &Arc<Self>, text: &str) -> bool {
        let mut search = Search::new(Arc::clone(self));
        search.search(text, || false).is_ok() && search.finish()
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pattern").field(&self.text).finish()
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A DFA reads bytes, so it would find an empty match next to `(?-u:\B)` inside a character.
fn can_be_a_dfa(nfa: &NFA, hir: &Hir) -> bool {
    let looks = nfa.look_set_any();
    let matches_inside_characters = looks.contains_word() && hir.properties().minimum_len() == Some(0);
    !looks.contains_word_unicode() && !matches_inside_characters
}

/// One search. It can be used again for the next text.
pub struct Search {
    pattern: Arc<Pattern>,
    engine: Engine,
    found: bool,
}

enum Engine {
    Dfa(Box<DfaSearch>),
    Nfa(Box<NfaSearch>),
}

impl Search {
    pub fn new(pattern: Arc<Pattern>) -> Self {
        let engine = match &pattern.dfa {
            Some(dfa) => Engine::Dfa(Box::new(DfaSearch::new(dfa))),
            None => Engine::Nfa(Box::new(NfaSearch::new(pattern.nfa.states().len()))),
        };
        Self {
            pattern,
            engine,
            found: false,
        }
    }

    pub fn pattern(&self) -> &Arc<Pattern> {
        &self.pattern
    }

    /// Forgets the last text, but keeps the tables that were built.
    pub fn restart(&mut self) {
        self.found = false;
        match &mut self.engine {
            Engine::Dfa(search) => search.restart(),
            Engine::Nfa(search) => search.restart(),
        }
    }

    /// Searches the next piece of the text. Checks the deadline before each part of it, because reading the clock at each byte
    /// would take longer than the search.
    pub fn search(&mut self, piece: &str, is_late: impl Fn() -> bool) -> Result<(), DeadlinePassed> {
        let mut rest = piece;
        while !self.found && !rest.is_empty() {
            if is_late() {
                return Err(DeadlinePassed);
            }
            let mut end = self.pattern.bytes_per_deadline_check.min(rest.len());
            while !rest.is_char_boundary(end) {
                end += 1;
            }
            let (part, after) = rest.split_at(end);
            self.found = match (&mut self.engine, &self.pattern.dfa) {
                (Engine::Dfa(search), Some(dfa)) => {
                    search.step(&self.pattern.starts, dfa, part.as_bytes())?
                }
                (Engine::Nfa(search), _) => search.step(&self.pattern.starts, &self.pattern.nfa, part),
                // Not reached: there is a DFA search only if the pattern has a DFA.
                (Engine::Dfa(_), None) => false,
            };
            rest = after;
        }
        Ok(())
    }

    /// Ends the text, and returns whether it has a match.
    pub fn finish(&mut self) -> bool {
        self.found = self.found
            || match (&mut self.engine, &self.pattern.dfa) {
                (Engine::Dfa(search), Some(dfa)) => search.end(dfa),
                (Engine::Nfa(search), _) => search.end(&self.pattern.nfa),
                (Engine::Dfa(_), None) => false,
            };
        self.found
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Searches the text in one piece, and in pieces of one character.
    fn is_found(pattern: &Arc<Pattern>, text: &str) -> bool {
        let whole = pattern.is_match(text);
        let mut search = Search::new(Arc::clone(pattern));
        for _ in 0..2 {
            search.restart();
            for (at, character) in text.char_indices() {
                let piece = &text[at..at + character.len_utf8()];
                search.search(piece, || false).unwrap();
            }
            assert_eq!(search.finish(), whole, "{pattern} in pieces of {text:?}");
        }
        whole
    }

    #[test]
    fn a_match_is_found_where_it_is() {
        let find = |pattern: &str, text: &str| Pattern::new(pattern).unwrap().find(text);
        assert_eq!(find("l+o", "hello"), Some(2..5));
        assert_eq!(find("b|ab", "cab"), Some(1..3), "the leftmost match");
        assert_eq!(find("", "x"), Some(0..0));
        assert_eq!(find("y", "x"), None);
        assert_eq!(find(r"\bx", "a x"), Some(2..3));
        assert_eq!(find(r"\bx", "ä x"), None, "not supported");
    }

    #[test]
    fn it_finds_what_the_regex_crate_finds() {
        let regexes = [
            r"",
            r"a",
            r"^a",
            r"a$",
            r"^$",
            r"(?m)^a$",
            r"(?mR)^a$",
            r"(?mR)a$",
            r"\Aab\z",
            r"ab|ba",
            r"a{2,3}b",
            r"(?i)ä",
            r"[äöü]+",
            r".",
            r"(?s).",
            r"\b",
            r"\B",
            r"\bab\b",
            r"\bä",
            r"ä\b",
            r"\Bb",
            r"\b\w+\b \d",
            r"\w{3}",
            r"(?-u:\b)",
            r"(?-u:\B)",
            r"(?-u:\B)a",
            r"(?-u:\w)b",
            r"\b{start}ä",
            r"ä\b{end}",
            r"\b{start-half}b",
            r"(?-u:\b{start-half})",
            r"(?-u:\b{end-half})b",
            r"ab c|\bd",
            r"a\b.\bb",
            r"\d+ab",
            r"aab(?:ba)?",
            r"\bab.*ba",
            r"(?m)\B$",
            r"\P{L}b",
            r"x*",
            r"x*\b",
            r"[^a]ab",
            r"ä|b\b",
            r"€ä",
        ];
        let letters = ["a", "b", " ", "ä", "€", "\n", "\r", "1", "c", "🦀"];
        let compiled = regexes.map(|regex| {
            let pattern = Arc::new(Pattern::new(regex).unwrap());
            (regex::Regex::new(regex).unwrap(), pattern)
        });
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..1_000 {
            let text: String = (0..random.usize(..9))
                .map(|_| letters[random.usize(..letters.len())])
                .collect();
            for (regex, pattern) in &compiled {
                let expected = regex.is_match(&text);
                assert_eq!(is_found(pattern, &text), expected, "{pattern} in {text:?}");
            }
        }
    }

    #[test]
    fn a_match_may_lie_across_pieces_of_any_length() {
        let text = format!("{}hello, wörld{}", "hell ".repeat(50), "o".repeat(50));
        let characters: Vec<char> = text.chars().collect();
        for regex in [
            "hello, w",
            "hello, wö",
            "hello, wörld|hello, wöbld",
            r"\bhello, wö",
            r"(?i)HELLO, \w+d",
            r"w\w+rldo+\b",
        ] {
            let mut search = Search::new(Arc::new(Pattern::new(regex).unwrap()));
            for length in 1..60 {
                search.restart();
                for piece in characters.chunks(length) {
                    let piece: String = piece.iter().collect();
                    search.search(&piece, || false).unwrap();
                }
                assert!(search.finish(), "{regex:?}, {length}");
            }
        }
    }

    #[test]
    fn an_invalid_regex_is_an_error_with_its_place() {
        let table = [
            ("a(b", 1),
            ("a[z-a]", 2),
            (r"ab(?-u:\xff)", 7),
            (r"\d+\p{Such}", 3),
            ("a{1001}{1001}{1001}", 0),
        ];
        for (regex, at) in table {
            assert!(regex::Regex::new(regex).is_err(), "{regex}");
            assert_eq!(Pattern::new(regex).unwrap_err().at, at, "{regex}");
        }
        let error = Pattern::new(r"(?:\w{100}){10}").unwrap_err();
        assert_eq!(error.why, "it takes more than 4194304 bytes when compiled");
    }

    #[test]
    fn the_deadline_ends_a_search_and_is_checked_more_often_for_larger_regexes() {
        let text = "ab".repeat(50_000);
        for regex in [
            "a[ab]{2000}c",
            "(?-u)a[ab]{10000}c",
            r"\b\w{3,60}c",
            "(?i)[a-zä]{300}c",
            "(?:ab)+c",
        ] {
            let pattern = Arc::new(Pattern::new(regex).unwrap());
            let states_per_deadline_check = pattern.bytes_per_deadline_check * pattern.nfa.states().len();
            assert!(
                states_per_deadline_check <= STATES_PER_DEADLINE_CHECK,
                "{regex}: {states_per_deadline_check}"
            );
            let checks = Cell::new(0);
            let is_late = || checks.replace(checks.get() + 1) == 1;
            let late = Search::new(pattern).search(&text, is_late);
            assert_eq!((late, checks.get()), (Err(DeadlinePassed), 2), "{regex}");
        }
    }
}

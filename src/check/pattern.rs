//! The regex of a host, searched for in a text that comes in pieces, against the clock.
//!
//! Owns regex-automata, the parts that the regex crate is made of: that crate's own searches want the whole text and cannot
//! be interrupted, whatever they take. What matches is the same. Pure: the clock is an argument.
//!
//! Nearly every regex is searched for by a lazy DFA, a table that is built while it is used. It knows no Unicode word
//! boundaries (`\b`) beside text that is not ASCII; where a regex has one, the states of its NFA are followed instead.

use std::fmt;
use std::sync::Arc;

use regex_automata::hybrid::LazyStateID;
use regex_automata::hybrid::dfa::{Cache, DFA};
use regex_automata::nfa::thompson::{Compiler, NFA, State, WhichCaptures};
use regex_automata::util::look::Look;
use regex_automata::util::prefilter::Prefilter;
use regex_automata::util::primitives::StateID;
use regex_automata::util::start;
use regex_automata::{Anchored, MatchKind, Span};
use regex_syntax::hir::Hir;

/// What a regex may take when compiled: `\w{3,30}`, in all of Unicode, takes 1.5 MB.
const MAX_COMPILED_BYTES: usize = 4 << 20;

/// Of the table that a search builds, beyond what the largest regexes need for any search at all.
const MAX_TABLE_BYTES: usize = 256 << 10;

/// How many states of the NFA may be visited, in the worst case, between two looks at the clock: some milliseconds.
const STATES_PER_LOOK: usize = 1 << 18;
const MAX_BYTES_PER_LOOK: usize = 4096;

/// A regex, compiled.
#[derive(Clone)]
pub struct Pattern {
    text: String,
    nfa: NFA,
    /// `None`: a search follows the NFA's states.
    dfa: Option<DFA>,
    /// Finds where a match may begin.
    prefilter: Option<Prefilter>,
    /// The bytes that a match can begin with; all of them where it may be empty.
    first_bytes: Box<[bool; 256]>,
    bytes_per_look: usize,
}

/// Why a text is no regex, and where: a byte of the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct PatternError {
    pub at: usize,
    pub why: String,
}

/// The time was over before the end of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Late;

impl Pattern {
    /// # Errors
    /// The text is no regex in the syntax of the regex crate, or compiled it takes more than 4 MiB.
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
                    Some(limit) => format!("compiled, it takes more than {limit} bytes"),
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
            prefilter: Prefilter::from_hir_prefix(MatchKind::LeftmostFirst, &hir),
            first_bytes: Box::new(first_bytes(&nfa, &hir)),
            bytes_per_look: (STATES_PER_LOOK / nfa.states().len()).clamp(1, MAX_BYTES_PER_LOOK),
            nfa,
        })
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// What it takes while it is kept.
    pub fn compiled_bytes(&self) -> usize {
        // Of the DFA's own there is next to nothing beside the NFA that both share.
        let prefilter = self.prefilter.as_ref().map_or(0, Prefilter::memory_usage);
        self.text.len() + self.nfa.memory_usage() + prefilter + size_of::<Self>()
    }

    /// What one search for it takes at most.
    pub fn search_bytes(&self) -> usize {
        let states = self.nfa.states().len();
        match &self.dfa {
            Some(dfa) => {
                let least = dfa
                    .get_config()
                    .get_minimum_cache_capacity(dfa.get_nfa())
                    .unwrap_or_default();
                MAX_TABLE_BYTES.max(least)
            }
            None => 3 * Set::bytes(states),
        }
    }

    /// Whether it is in the text, however long that takes.
    pub fn is_match(self: &Arc<Self>, text: &str) -> bool {
        let mut search = Search::new(Arc::clone(self));
        search.look_at(text, || false).is_ok() && search.finish()
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

/// A DFA sees bytes. So an empty match beside `(?-u:\B)` would be found within a character, too.
fn can_be_a_dfa(nfa: &NFA, hir: &Hir) -> bool {
    let looks = nfa.look_set_any();
    let is_blind = looks.contains_word() && hir.properties().minimum_len() == Some(0);
    !looks.contains_word_unicode() && !is_blind
}

fn first_bytes(nfa: &NFA, hir: &Hir) -> [bool; 256] {
    if hir.properties().minimum_len() == Some(0) {
        return [true; 256];
    }
    let mut first = [false; 256];
    let mut reached = Set::new(nfa.states().len());
    let mut stack = Vec::new();
    reached.follow(nfa, nfa.start_anchored(), &mut stack, |_| true);
    for byte in 0..=u8::MAX {
        first[usize::from(byte)] = reached
            .states
            .iter()
            .any(|state| after(nfa, *state, byte).is_some());
    }
    first
}

/// Where a byte leads from a state.
fn after(nfa: &NFA, state: StateID, byte: u8) -> Option<StateID> {
    match nfa.state(state) {
        State::ByteRange { trans } => trans.matches_byte(byte).then_some(trans.next),
        State::Sparse(transitions) => transitions.matches_byte(byte),
        State::Dense(transitions) => transitions.matches_byte(byte),
        _ => None,
    }
}

/// One search; it can be used again for the next text.
pub struct Search {
    pattern: Arc<Pattern>,
    engine: Engine,
    found: bool,
}

enum Engine {
    Dfa(Box<Table>),
    Nfa(Box<Threads>),
}

impl Search {
    pub fn new(pattern: Arc<Pattern>) -> Self {
        let engine = match &pattern.dfa {
            Some(dfa) => Engine::Dfa(Box::new(Table {
                cache: dfa.create_cache(),
                state: None,
            })),
            None => Engine::Nfa(Box::new(Threads::new(pattern.nfa.states().len()))),
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

    /// Forgets the last text, but not what was built for searching it.
    pub fn restart(&mut self) {
        self.found = false;
        match &mut self.engine {
            Engine::Dfa(table) => table.state = None,
            Engine::Nfa(threads) => threads.restart(),
        }
    }

    /// Looks at the next piece of the text.
    ///
    /// # Errors
    /// `is_late` said so.
    pub fn look_at(&mut self, piece: &str, is_late: impl Fn() -> bool) -> Result<(), Late> {
        if self.found {
            return Ok(());
        }
        let mut clock = Clock {
            is_late,
            bytes_left: self.pattern.bytes_per_look,
            bytes_per_look: self.pattern.bytes_per_look,
        };
        self.found = match (&mut self.engine, &self.pattern.dfa) {
            (Engine::Dfa(table), Some(dfa)) => {
                table.step(&self.pattern, dfa, piece.as_bytes(), &mut clock)?
            }
            (Engine::Nfa(threads), _) => threads.step(&self.pattern, piece, &mut clock)?,
            // An engine is made of what its pattern has.
            (Engine::Dfa(_), None) => false,
        };
        clock.look()
    }

    /// Whether the text, which ends here, has a match.
    pub fn finish(&mut self) -> bool {
        self.found = self.found
            || match (&mut self.engine, &self.pattern.dfa) {
                (Engine::Dfa(table), Some(dfa)) => table.end(dfa),
                (Engine::Nfa(threads), _) => threads.enter(&self.pattern.nfa, None),
                (Engine::Dfa(_), None) => false,
            };
        self.found
    }
}

struct Clock<F> {
    is_late: F,
    bytes_left: usize,
    bytes_per_look: usize,
}

impl<F: Fn() -> bool> Clock<F> {
    #[inline]
    fn spend(&mut self, bytes: usize) -> Result<(), Late> {
        self.bytes_left = self.bytes_left.saturating_sub(bytes);
        if self.bytes_left > 0 {
            return Ok(());
        }
        self.bytes_left = self.bytes_per_look;
        self.look()
    }

    fn look(&self) -> Result<(), Late> {
        if (self.is_late)() { Err(Late) } else { Ok(()) }
    }
}

/// The next place where a match can begin, at `at` or behind it; near the end, one from where it may go on in the next
/// piece.
fn next_start(prefilter: &Prefilter, text: &[u8], at: usize) -> usize {
    let rest = Span {
        start: at,
        end: text.len(),
    };
    match prefilter.find(text, rest) {
        Some(candidate) => candidate.start,
        None => at.max((text.len() + 1).saturating_sub(prefilter.max_needle_len())),
    }
}

/// A lazy DFA and where it is.
struct Table {
    cache: Cache,
    /// `None`: at the beginning of the text.
    state: Option<LazyStateID>,
}

impl Table {
    fn step(
        &mut self,
        pattern: &Pattern,
        dfa: &DFA,
        text: &[u8],
        clock: &mut Clock<impl Fn() -> bool>,
    ) -> Result<bool, Late> {
        let mut at = 0;
        let mut state = self.start(dfa)?;
        while let Some(byte) = text.get(at) {
            if state.is_tagged() {
                if state.is_match() || state.is_dead() {
                    break;
                }
                if let (true, Some(prefilter)) = (state.is_start(), &pattern.prefilter) {
                    let next = next_start(prefilter, text, at);
                    if next > at {
                        at = next;
                        state = start(dfa, &mut self.cache, Some(text[at - 1]))?;
                        continue;
                    }
                }
            }
            state = dfa.next_state(&mut self.cache, state, *byte).or(Err(Late))?;
            at += 1;
            clock.spend(1)?;
        }
        self.state = Some(state);
        Ok(state.is_match())
    }

    fn end(&mut self, dfa: &DFA) -> bool {
        let last = self
            .start(dfa)
            .map(|state| dfa.next_eoi_state(&mut self.cache, state));
        matches!(last, Ok(Ok(state)) if state.is_match())
    }

    fn start(&mut self, dfa: &DFA) -> Result<LazyStateID, Late> {
        self.state.map_or_else(|| start(dfa, &mut self.cache, None), Ok)
    }
}

/// The state from which a search goes on behind a byte. Neither this nor a step ever fails: no limit was set on how often
/// the table may be built anew.
fn start(dfa: &DFA, cache: &mut Cache, behind: Option<u8>) -> Result<LazyStateID, Late> {
    let config = start::Config::new().anchored(Anchored::No).look_behind(behind);
    dfa.start_state(cache, &config).or(Err(Late))
}

/// The NFA's states that the text so far leads to, all at once.
struct Threads {
    /// Behind the last character, and before anything that only the next one decides.
    pending: Set,
    current: Set,
    stack: Vec<StateID>,
    last: Option<char>,
}

impl Threads {
    fn new(states: usize) -> Self {
        Self {
            pending: Set::new(states),
            current: Set::new(states),
            stack: Vec::new(),
            last: None,
        }
    }

    fn restart(&mut self) {
        self.pending.clear();
        self.last = None;
    }

    fn step(
        &mut self,
        pattern: &Pattern,
        text: &str,
        clock: &mut Clock<impl Fn() -> bool>,
    ) -> Result<bool, Late> {
        let mut rest = text;
        while let Some(next) = rest.chars().next() {
            if self.pending.states.is_empty() {
                let skipped = skipped(pattern, rest);
                if skipped > 0 {
                    self.last = rest[..skipped].chars().next_back();
                    rest = &rest[skipped..];
                    continue;
                }
            }
            if self.enter(&pattern.nfa, Some(next)) {
                return Ok(true);
            }
            let (character, behind) = rest.split_at(next.len_utf8());
            self.read(&pattern.nfa, character.as_bytes());
            self.last = Some(next);
            rest = behind;
            clock.spend(character.len())?;
        }
        Ok(false)
    }

    /// Follows all that needs no further character, to where `next` stands; tells whether the regex is found.
    fn enter(&mut self, nfa: &NFA, next: Option<char>) -> bool {
        let mut around = [0; 8];
        let at = self.last.map_or(0, |last| last.encode_utf8(&mut around).len());
        let end = at + next.map_or(0, |next| next.encode_utf8(&mut around[at..]).len());
        let holds = |look| nfa.look_matcher().matches(look, &around[..end], at);
        self.current.clear();
        let mut found = self
            .current
            .follow(nfa, nfa.start_anchored(), &mut self.stack, holds);
        for state in &self.pending.states {
            found |= self.current.follow(nfa, *state, &mut self.stack, holds);
        }
        found
    }

    fn read(&mut self, nfa: &NFA, character: &[u8]) {
        for (number, byte) in character.iter().enumerate() {
            if number > 0 {
                self.current.clear();
                for state in &self.pending.states {
                    // Nothing can be asked for in the middle of a character.
                    self.current.follow(nfa, *state, &mut self.stack, |_| false);
                }
            }
            self.pending.clear();
            for state in &self.current.states {
                if let Some(next) = after(nfa, *state, *byte) {
                    self.pending.insert(next);
                }
            }
        }
    }
}

/// So many bytes at the beginning of the text cannot begin a match.
fn skipped(pattern: &Pattern, text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut skipped = match &pattern.prefilter {
        Some(prefilter) => next_start(prefilter, bytes, 0),
        None => bytes
            .iter()
            .position(|byte| pattern.first_bytes[usize::from(*byte)])
            .unwrap_or(bytes.len()),
    };
    while !text.is_char_boundary(skipped) {
        skipped -= 1;
    }
    skipped
}

/// States of the NFA, each once.
struct Set {
    states: Vec<StateID>,
    is_in: Vec<bool>,
}

impl Set {
    fn new(states: usize) -> Self {
        Self {
            states: Vec::new(),
            is_in: vec![false; states],
        }
    }

    fn bytes(states: usize) -> usize {
        states * (size_of::<StateID>() + size_of::<bool>())
    }

    fn clear(&mut self) {
        for state in self.states.drain(..) {
            self.is_in[state.as_usize()] = false;
        }
    }

    fn insert(&mut self, state: StateID) -> bool {
        let is_new = !std::mem::replace(&mut self.is_in[state.as_usize()], true);
        if is_new {
            self.states.push(state);
        }
        is_new
    }

    /// Adds the state and all that it leads to without a byte; tells whether a match is among them.
    fn follow(
        &mut self,
        nfa: &NFA,
        state: StateID,
        stack: &mut Vec<StateID>,
        holds: impl Fn(Look) -> bool,
    ) -> bool {
        let mut found = false;
        stack.push(state);
        while let Some(state) = stack.pop() {
            if !self.insert(state) {
                continue;
            }
            match nfa.state(state) {
                State::Look { look, next } if holds(*look) => stack.push(*next),
                State::Union { alternates } => stack.extend_from_slice(alternates),
                State::BinaryUnion { alt1, alt2 } => stack.extend([*alt1, *alt2]),
                State::Capture { next, .. } => stack.push(*next),
                State::Match { .. } => found = true,
                _ => {}
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// In one piece, and in pieces of one character.
    fn is_found(pattern: &Arc<Pattern>, text: &str) -> bool {
        let whole = pattern.is_match(text);
        let mut search = Search::new(Arc::clone(pattern));
        for _ in 0..2 {
            search.restart();
            for (at, character) in text.char_indices() {
                let piece = &text[at..at + character.len_utf8()];
                search.look_at(piece, || false).unwrap();
            }
            assert_eq!(search.finish(), whole, "{pattern} in pieces of {text:?}");
        }
        whole
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
                    search.look_at(&piece, || false).unwrap();
                }
                assert!(search.finish(), "{regex:?}, {length}");
            }
        }
    }

    #[test]
    fn what_is_no_regex_is_told_with_its_place() {
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
        assert_eq!(error.why, "compiled, it takes more than 4194304 bytes");
    }

    #[test]
    fn the_larger_the_regex_the_more_often_the_clock_is_looked_at_and_it_ends_the_search() {
        let text = "ab".repeat(50_000);
        for regex in [
            "a[ab]{2000}c",
            "(?-u)a[ab]{10000}c",
            r"\b\w{3,60}c",
            "(?i)[a-zä]{300}c",
            "(?:ab)+c",
        ] {
            let pattern = Arc::new(Pattern::new(regex).unwrap());
            let states_per_look = pattern.bytes_per_look * pattern.nfa.states().len();
            assert!(states_per_look <= STATES_PER_LOOK, "{regex}: {states_per_look}");
            let looks = Cell::new(0);
            let is_late = || looks.replace(looks.get() + 1) == 1;
            let late = Search::new(pattern).look_at(&text, is_late);
            assert_eq!((late, looks.get()), (Err(Late), 2), "{regex}");
        }
    }
}

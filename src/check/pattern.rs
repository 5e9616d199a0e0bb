//! Searches for a host's regex in a text that comes in pieces, until a deadline.
//!
//! Uses regex-automata, which the regex crate is built on: that crate's own searches need the whole text and cannot be
//! interrupted. The matches are the same. Pure: the clock is an argument.
//!
//! Nearly all regexes are searched for with a lazy DFA, a table that is built during the search. It does not support Unicode
//! word boundaries (`\b`) in text that is not ASCII. For a regex with one, the search follows the states of the NFA and
//! remembers where ASCII characters led.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use regex_automata::hybrid::LazyStateID;
use regex_automata::hybrid::dfa::{Cache, DFA};
use regex_automata::hybrid::regex::Regex;
use regex_automata::nfa::thompson::{Compiler, NFA, State, WhichCaptures};
use regex_automata::util::look::Look;
use regex_automata::util::prefilter::Prefilter;
use regex_automata::util::primitives::StateID;
use regex_automata::util::start;
use regex_automata::{Anchored, Input, MatchKind, Span};
use regex_syntax::hir::Hir;

/// The memory that a compiled regex may take. `\w{3,30}`, which includes all of Unicode, takes 1.5 MB.
const MAX_COMPILED_BYTES: usize = 4 << 20;

/// The size of the table that a search builds. For the largest regexes the least possible size is larger.
const MAX_TABLE_BYTES: usize = 256 << 10;

/// How many states of the NFA may be visited between two checks of the deadline: in the worst case some milliseconds.
const STATES_PER_DEADLINE_CHECK: usize = 1 << 18;
const MAX_BYTES_PER_DEADLINE_CHECK: usize = 4096;

/// A compiled regex.
#[derive(Clone)]
pub struct Pattern {
    text: String,
    nfa: NFA,
    /// `None` if a search has to follow the NFA's states.
    dfa: Option<DFA>,
    /// Finds the places where a match may begin.
    prefilter: Option<Prefilter>,
    /// The bytes that a match can begin with: all of them if a match can be empty.
    first_bytes: Box<[bool; 256]>,
    bytes_per_deadline_check: usize,
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

/// Why a text is not a valid regex. `at`: the byte of the text where the mistake is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct PatternError {
    pub at: usize,
    pub why: String,
}

/// The deadline passed before the end of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadlinePassed;

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
            prefilter: Prefilter::from_hir_prefix(MatchKind::LeftmostFirst, &hir),
            first_bytes: Box::new(first_bytes(&nfa, &hir)),
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
        let prefilter = self.prefilter.as_ref().map_or(0, Prefilter::memory_usage);
        self.text.len() + self.nfa.memory_usage() + prefilter + size_of::<Self>()
    }

    /// Whether it matches every body or none; `None`: that depends on the body.
    pub fn always(&self) -> Option<bool> {
        let hir = regex_syntax::parse(&self.text).ok()?;
        let properties = hir.properties();
        match properties.minimum_len() {
            None => Some(false),
            Some(0) if properties.look_set().is_empty() => Some(true),
            Some(_) => None,
        }
    }

    /// The most memory that one search for it takes.
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
            None => 3 * StateSet::bytes(states) + MAX_TABLE_BYTES,
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

fn first_bytes(nfa: &NFA, hir: &Hir) -> [bool; 256] {
    if hir.properties().minimum_len() == Some(0) {
        return [true; 256];
    }
    let mut first = [false; 256];
    let mut reached = StateSet::new(nfa.states().len());
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

/// The state that a byte leads to from a state.
fn after(nfa: &NFA, state: StateID, byte: u8) -> Option<StateID> {
    match nfa.state(state) {
        State::ByteRange { trans } => trans.matches_byte(byte).then_some(trans.next),
        State::Sparse(transitions) => transitions.matches_byte(byte),
        State::Dense(transitions) => transitions.matches_byte(byte),
        _ => None,
    }
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
            Some(dfa) => Engine::Dfa(Box::new(DfaSearch {
                cache: dfa.create_cache(),
                state: None,
            })),
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
            Engine::Dfa(search) => search.state = None,
            Engine::Nfa(search) => search.restart(),
        }
    }

    /// Searches the next piece of the text.
    ///
    /// # Errors
    /// `is_late` returned true.
    pub fn search(&mut self, piece: &str, is_late: impl Fn() -> bool) -> Result<(), DeadlinePassed> {
        if self.found {
            return Ok(());
        }
        let mut watch = DeadlineWatch {
            is_late,
            bytes_left: self.pattern.bytes_per_deadline_check,
            bytes_per_deadline_check: self.pattern.bytes_per_deadline_check,
        };
        self.found = match (&mut self.engine, &self.pattern.dfa) {
            (Engine::Dfa(search), Some(dfa)) => {
                search.step(&self.pattern, dfa, piece.as_bytes(), &mut watch)?
            }
            (Engine::Nfa(search), _) => search.step(&self.pattern, piece, &mut watch)?,
            // Not reached: there is a DFA search only if the pattern has a DFA.
            (Engine::Dfa(_), None) => false,
        };
        watch.check()
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

/// Checks the deadline after a number of bytes.
struct DeadlineWatch<F> {
    is_late: F,
    bytes_left: usize,
    bytes_per_deadline_check: usize,
}

impl<F: Fn() -> bool> DeadlineWatch<F> {
    #[inline]
    fn spend(&mut self, bytes: usize) -> Result<(), DeadlinePassed> {
        self.bytes_left = self.bytes_left.saturating_sub(bytes);
        if self.bytes_left > 0 {
            return Ok(());
        }
        self.bytes_left = self.bytes_per_deadline_check;
        self.check()
    }

    fn check(&self) -> Result<(), DeadlinePassed> {
        if (self.is_late)() {
            Err(DeadlinePassed)
        } else {
            Ok(())
        }
    }
}

/// The next place, from `at` on, where a match can begin. If there is none, the place near the end where a match may begin
/// that continues in the next piece.
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

/// A search with a lazy DFA.
struct DfaSearch {
    cache: Cache,
    /// `None` at the beginning of the text.
    state: Option<LazyStateID>,
}

impl DfaSearch {
    fn step(
        &mut self,
        pattern: &Pattern,
        dfa: &DFA,
        text: &[u8],
        watch: &mut DeadlineWatch<impl Fn() -> bool>,
    ) -> Result<bool, DeadlinePassed> {
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
            state = dfa
                .next_state(&mut self.cache, state, *byte)
                .or(Err(DeadlinePassed))?;
            at += 1;
            watch.spend(1)?;
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

    fn start(&mut self, dfa: &DFA) -> Result<LazyStateID, DeadlinePassed> {
        self.state.map_or_else(|| start(dfa, &mut self.cache, None), Ok)
    }
}

/// The state in which a search starts after a byte. Neither this nor a step fails, because the table may be rebuilt any number
/// of times.
fn start(dfa: &DFA, cache: &mut Cache, behind: Option<u8>) -> Result<LazyStateID, DeadlinePassed> {
    let config = start::Config::new().anchored(Anchored::No).look_behind(behind);
    dfa.start_state(cache, &config).or(Err(DeadlinePassed))
}

/// A search that follows all states of the NFA that the text so far leads to.
struct NfaSearch {
    /// The states after the last character, before the transitions that depend on the next one. Not used while `at` is set.
    pending: StateSet,
    current: StateSet,
    stack: Vec<StateID>,
    last: Option<char>,
    memo: Memo,
    /// The place in `memo` that has the states after the last character.
    at: Option<usize>,
}

impl NfaSearch {
    fn new(states: usize) -> Self {
        Self {
            pending: StateSet::new(states),
            current: StateSet::new(states),
            stack: Vec::new(),
            last: None,
            memo: Memo::default(),
            at: None,
        }
    }

    fn restart(&mut self) {
        self.pending.clear();
        self.last = None;
        self.at = None;
    }

    fn step(
        &mut self,
        pattern: &Pattern,
        text: &str,
        watch: &mut DeadlineWatch<impl Fn() -> bool>,
    ) -> Result<bool, DeadlinePassed> {
        let mut rest = text;
        while let Some(next) = rest.chars().next() {
            if self.has_no_states() {
                let skipped = skipped(pattern, rest);
                if skipped > 0 {
                    self.leave_memo();
                    self.last = rest[..skipped].chars().next_back();
                    rest = &rest[skipped..];
                    continue;
                }
            }
            let (character, after) = rest.split_at(next.len_utf8());
            let is_found = match u8::try_from(next) {
                Ok(byte) if byte.is_ascii() => self.step_ascii(&pattern.nfa, byte),
                _ => {
                    self.leave_memo();
                    self.step_character(&pattern.nfa, next, character.as_bytes())
                }
            };
            if is_found {
                return Ok(true);
            }
            self.last = Some(next);
            rest = after;
            watch.spend(character.len())?;
        }
        Ok(false)
    }

    fn end(&mut self, nfa: &NFA) -> bool {
        self.leave_memo();
        self.enter(nfa, None)
    }

    fn has_no_states(&self) -> bool {
        match self.at {
            Some(at) => self.memo.places[at].states.is_empty(),
            None => self.pending.states.is_empty(),
        }
    }

    /// Puts the states into `pending` again.
    fn leave_memo(&mut self) {
        if let Some(at) = self.at.take() {
            self.pending.clear();
            for state in &self.memo.places[at].states {
                self.pending.insert(*state);
            }
        }
    }

    /// Steps over an ASCII character, through the memo. Returns whether there is a match.
    fn step_ascii(&mut self, nfa: &NFA, byte: u8) -> bool {
        let from = match self.at {
            Some(at) => Some(at),
            None => self.memo.place(&self.pending.states, self.last),
        };
        if let Some(from) = from
            && let Some(next) = self.memo.places[from].next[usize::from(byte)]
        {
            self.at = Some(usize::from(next));
            return false;
        }
        self.at = from;
        self.leave_memo();
        if self.step_character(nfa, char::from(byte), &[byte]) {
            return true;
        }
        let cleared = self.memo.cleared;
        self.at = self.memo.place(&self.pending.states, Some(char::from(byte)));
        if let (Some(from), Some(to)) = (from, self.at)
            && cleared == self.memo.cleared
        {
            self.memo.places[from].next[usize::from(byte)] = u16::try_from(to).ok();
        }
        false
    }

    /// Steps over a character. Returns whether there is a match before it.
    fn step_character(&mut self, nfa: &NFA, next: char, bytes: &[u8]) -> bool {
        if self.enter(nfa, Some(next)) {
            return true;
        }
        self.read(nfa, bytes);
        false
    }

    /// Follows the transitions that need no character but may depend on `next`. Returns whether there is a match.
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
                    // Assertions never hold inside a character.
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

/// Where ASCII characters led before: a DFA over characters that is built during the search.
#[derive(Default)]
struct Memo {
    places: Vec<Place>,
    numbers: HashMap<(Vec<StateID>, Before), usize>,
    bytes: usize,
    /// How often everything was forgotten because there was no more room.
    cleared: usize,
}

/// The states after a character, and the places that the next character leads to, as far as they are known.
struct Place {
    states: Vec<StateID>,
    next: Box<[Option<u16>; 128]>,
}

/// What assertions such as `\b` and `^` can find out about the character before them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Before {
    TextStart,
    LineFeed,
    CarriageReturn,
    AsciiWord,
    UnicodeWord,
    Other,
}

impl Before {
    fn of(last: Option<char>) -> Self {
        match last {
            None => Self::TextStart,
            Some('\n') => Self::LineFeed,
            Some('\r') => Self::CarriageReturn,
            Some('0'..='9' | 'A'..='Z' | 'a'..='z' | '_') => Self::AsciiWord,
            Some(last) if !last.is_ascii() && regex_syntax::is_word_character(last) => Self::UnicodeWord,
            Some(_) => Self::Other,
        }
    }
}

impl Memo {
    /// The place with these states after a character. `None` if there are too many states to remember.
    fn place(&mut self, states: &[StateID], last: Option<char>) -> Option<usize> {
        let mut states = states.to_vec();
        states.sort_unstable();
        let key = (states, Before::of(last));
        if let Some(number) = self.numbers.get(&key) {
            return Some(*number);
        }
        // The states are kept twice. A table of numbers has room for twice as many at most.
        let bytes = 2 * size_of_val(key.0.as_slice())
            + size_of::<[Option<u16>; 128]>()
            + size_of::<Place>()
            + 2 * size_of::<((Vec<StateID>, Before), usize)>();
        if bytes > MAX_TABLE_BYTES {
            return None;
        }
        if self.bytes + bytes > MAX_TABLE_BYTES {
            *self = Self {
                cleared: self.cleared + 1,
                ..Self::default()
            };
        }
        self.bytes += bytes;
        let number = self.places.len();
        self.places.push(Place {
            states: key.0.clone(),
            next: Box::new([None; 128]),
        });
        self.numbers.insert(key, number);
        Some(number)
    }
}

/// How many bytes at the beginning of the text cannot begin a match.
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

/// A set of states of the NFA.
struct StateSet {
    states: Vec<StateID>,
    is_in: Vec<bool>,
}

impl StateSet {
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

    /// Adds the state and all states that it leads to without a byte. Returns whether one of them is a match.
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
    fn a_full_cache_is_cleared_and_the_search_finds_the_same() {
        let pattern = Arc::new(Pattern::new(r"\b[ab]*a[ab]{14}c\b").unwrap());
        let mut random = fastrand::Rng::with_seed(7);
        let letters: String = (0..20_000).map(|_| random.choice(['a', 'b']).unwrap()).collect();
        let after_an_a = 15;
        for (last, is_match) in [("a", true), ("b", false)] {
            let text = format!("{letters}{last}{}c", "b".repeat(after_an_a - 1));
            let mut search = Search::new(Arc::clone(&pattern));
            search.search(&text, || false).unwrap();
            assert_eq!(search.finish(), is_match);
            let Engine::Nfa(nfa) = &search.engine else {
                panic!("a regex with \\b has no DFA")
            };
            assert!(nfa.memo.cleared > 0 && nfa.memo.bytes <= MAX_TABLE_BYTES);
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

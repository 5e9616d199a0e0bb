//! The search that follows the NFA's states, and remembers where ASCII characters led. It is for regexes that a DFA does not
//! support.

use std::collections::HashMap;

use regex_automata::nfa::thompson::NFA;
use regex_automata::util::primitives::StateID;

use super::deadline::{DeadlinePassed, DeadlineWatch};
use super::states::{Starts, StateSet, after};

/// The most memory for the places that are remembered: as much as the table of the other search.
pub(super) const MAX_MEMO_BYTES: usize = 256 << 10;

/// A search that follows all states of the NFA that the text so far leads to.
pub(super) struct NfaSearch {
    /// The states after the last character, before the transitions that depend on the next one. Not used while `at` is set.
    pending: StateSet,
    current: StateSet,
    stack: Vec<StateID>,
    last: Option<char>,
    pub(super) memo: Memo,
    /// The place in `memo` that has the states after the last character.
    at: Option<usize>,
}

impl NfaSearch {
    /// The most memory of a search for a regex with this many states.
    pub(super) fn bytes(states: usize) -> usize {
        3 * StateSet::bytes(states) + MAX_MEMO_BYTES
    }

    pub(super) fn new(states: usize) -> Self {
        Self {
            pending: StateSet::new(states),
            current: StateSet::new(states),
            stack: Vec::new(),
            last: None,
            memo: Memo::default(),
            at: None,
        }
    }

    pub(super) fn restart(&mut self) {
        self.pending.clear();
        self.last = None;
        self.at = None;
    }

    pub(super) fn step(
        &mut self,
        starts: &Starts,
        nfa: &NFA,
        text: &str,
        watch: &mut DeadlineWatch<impl Fn() -> bool>,
    ) -> Result<bool, DeadlinePassed> {
        let mut rest = text;
        while let Some(next) = rest.chars().next() {
            if self.has_no_states() {
                let skipped = starts.skipped(rest);
                if skipped > 0 {
                    self.leave_memo();
                    self.last = rest[..skipped].chars().next_back();
                    rest = &rest[skipped..];
                    continue;
                }
            }
            let (character, after) = rest.split_at(next.len_utf8());
            let is_found = match u8::try_from(next) {
                Ok(byte) if byte.is_ascii() => self.step_ascii(nfa, byte),
                _ => {
                    self.leave_memo();
                    self.step_character(nfa, next, character.as_bytes())
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

    pub(super) fn end(&mut self, nfa: &NFA) -> bool {
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
pub(super) struct Memo {
    places: Vec<Place>,
    numbers: HashMap<(Vec<StateID>, Before), usize>,
    pub(super) bytes: usize,
    /// How often everything was forgotten because there was no more room.
    pub(super) cleared: usize,
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
        if bytes > MAX_MEMO_BYTES {
            return None;
        }
        if self.bytes + bytes > MAX_MEMO_BYTES {
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

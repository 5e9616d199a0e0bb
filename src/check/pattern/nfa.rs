//! The search that follows the NFA's states. It is for regexes that a DFA does not support.

use regex_automata::nfa::thompson::NFA;
use regex_automata::util::primitives::StateID;

use super::states::{Starts, StateSet, after};

/// A search that follows all states of the NFA that the text so far leads to.
pub(super) struct NfaSearch {
    /// The states after the last character, before the transitions that depend on the next one.
    pending: StateSet,
    current: StateSet,
    stack: Vec<StateID>,
    last: Option<char>,
}

impl NfaSearch {
    /// The most memory of a search for a regex with this many states.
    pub(super) fn bytes(states: usize) -> usize {
        3 * StateSet::bytes(states)
    }

    pub(super) fn new(states: usize) -> Self {
        Self {
            pending: StateSet::new(states),
            current: StateSet::new(states),
            stack: Vec::new(),
            last: None,
        }
    }

    pub(super) fn restart(&mut self) {
        self.pending.clear();
        self.last = None;
    }

    pub(super) fn step(&mut self, starts: &Starts, nfa: &NFA, text: &str) -> bool {
        let mut rest = text;
        while let Some(next) = rest.chars().next() {
            let skipped = match self.pending.states.is_empty() {
                true => starts.skipped(rest),
                false => 0,
            };
            if skipped > 0 {
                self.last = rest[..skipped].chars().next_back();
                rest = &rest[skipped..];
                continue;
            }
            if self.enter(nfa, Some(next)) {
                return true;
            }
            let (character, after) = rest.split_at(next.len_utf8());
            self.read(nfa, character.as_bytes());
            self.last = Some(next);
            rest = after;
        }
        false
    }

    pub(super) fn end(&mut self, nfa: &NFA) -> bool {
        self.enter(nfa, None)
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

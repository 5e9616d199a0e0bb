//! Sets of the NFA's states, and where in a text a match can begin.

use regex_automata::nfa::thompson::{NFA, State};
use regex_automata::util::look::Look;
use regex_automata::util::prefilter::Prefilter;
use regex_automata::util::primitives::StateID;
use regex_automata::{MatchKind, Span};
use regex_syntax::hir::Hir;

/// Where a match can begin.
#[derive(Clone)]
pub(super) struct Starts {
    prefilter: Option<Prefilter>,
    /// The bytes that a match can begin with: all of them if a match can be empty.
    first_bytes: Box<[bool; 256]>,
}

impl Starts {
    pub(super) fn new(nfa: &NFA, hir: &Hir) -> Self {
        Self {
            prefilter: Prefilter::from_hir_prefix(MatchKind::LeftmostFirst, hir),
            first_bytes: Box::new(first_bytes(nfa, hir)),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.prefilter.as_ref().map_or(0, Prefilter::memory_usage) + size_of_val(&*self.first_bytes)
    }

    /// Where, from `at` on, the next match can begin. If none can begin in this piece of the text, the place near its end where
    /// one may begin that continues in the next piece. `None`: every place has to be tried.
    pub(super) fn next(&self, text: &[u8], at: usize) -> Option<usize> {
        let prefilter = self.prefilter.as_ref()?;
        let rest = Span {
            start: at,
            end: text.len(),
        };
        Some(match prefilter.find(text, rest) {
            Some(candidate) => candidate.start,
            None => at.max((text.len() + 1).saturating_sub(prefilter.max_needle_len())),
        })
    }

    /// How many bytes at the beginning of the text cannot begin a match.
    pub(super) fn skipped(&self, text: &str) -> usize {
        let bytes = text.as_bytes();
        let mut skipped = self.next(bytes, 0).unwrap_or_else(|| {
            bytes
                .iter()
                .position(|byte| self.first_bytes[usize::from(*byte)])
                .unwrap_or(bytes.len())
        });
        while !text.is_char_boundary(skipped) {
            skipped -= 1;
        }
        skipped
    }
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
pub(super) fn after(nfa: &NFA, state: StateID, byte: u8) -> Option<StateID> {
    match nfa.state(state) {
        State::ByteRange { trans } => trans.matches_byte(byte).then_some(trans.next),
        State::Sparse(transitions) => transitions.matches_byte(byte),
        State::Dense(transitions) => transitions.matches_byte(byte),
        _ => None,
    }
}

/// A set of states of the NFA.
pub(super) struct StateSet {
    pub(super) states: Vec<StateID>,
    is_in: Vec<bool>,
}

impl StateSet {
    pub(super) fn new(states: usize) -> Self {
        Self {
            states: Vec::new(),
            is_in: vec![false; states],
        }
    }

    pub(super) fn bytes(states: usize) -> usize {
        states * (size_of::<StateID>() + size_of::<bool>())
    }

    pub(super) fn clear(&mut self) {
        for state in self.states.drain(..) {
            self.is_in[state.as_usize()] = false;
        }
    }

    pub(super) fn insert(&mut self, state: StateID) -> bool {
        let is_new = !std::mem::replace(&mut self.is_in[state.as_usize()], true);
        if is_new {
            self.states.push(state);
        }
        is_new
    }

    /// Adds the state and all states that it leads to without a byte. Returns whether one of them is a match.
    pub(super) fn follow(
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

//! The search with a lazy DFA, a table that is built during the search.

use regex_automata::Anchored;
use regex_automata::hybrid::LazyStateID;
use regex_automata::hybrid::dfa::{Cache, DFA};
use regex_automata::util::start;

use super::DeadlinePassed;
use super::states::Starts;

/// A search with a lazy DFA.
pub(super) struct DfaSearch {
    cache: Cache,
    /// `None` at the beginning of the text.
    state: Option<LazyStateID>,
}

impl DfaSearch {
    pub(super) fn new(dfa: &DFA) -> Self {
        Self {
            cache: dfa.create_cache(),
            state: None,
        }
    }

    pub(super) fn restart(&mut self) {
        self.state = None;
    }

    pub(super) fn step(&mut self, starts: &Starts, dfa: &DFA, text: &[u8]) -> Result<bool, DeadlinePassed> {
        let mut at = 0;
        let mut state = self.start(dfa)?;
        while let Some(byte) = text.get(at) {
            if state.is_tagged() {
                if state.is_match() || state.is_dead() {
                    break;
                }
                if state.is_start()
                    && let Some(next) = starts.next(text, at)
                    && next > at
                {
                    at = next;
                    state = start(dfa, &mut self.cache, Some(text[at - 1]))?;
                    continue;
                }
            }
            state = dfa
                .next_state(&mut self.cache, state, *byte)
                .or(Err(DeadlinePassed))?;
            at += 1;
        }
        self.state = Some(state);
        Ok(state.is_match())
    }

    pub(super) fn end(&mut self, dfa: &DFA) -> bool {
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

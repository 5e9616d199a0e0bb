//! When the windows of the state are brought up to date (`tables::windows` says how).
//!
//! Pure. A window is refreshed after each flush. If that took long, the window then rests, so that it uses at most a fiftieth of
//! the time.

use std::time::{Duration, Instant};

use crate::tables::windows::WINDOWS;

/// After a refresh, a window rests this many times as long as the refresh took.
const REST_TIMES: u32 = 50;

/// Windows move on even if no record comes.
const REFRESH_EVERY: Duration = Duration::from_secs(300);

/// The rest after a failed refresh.
const REST_AFTER_FAILURE: Duration = Duration::from_secs(600);

#[derive(Debug, Default)]
pub(super) struct Windows([Window; WINDOWS.len()]);

/// Without times it is due at once.
#[derive(Debug, Default)]
struct Window {
    is_changed: bool,
    rests_until: Option<Instant>,
    moves_at: Option<Instant>,
}

impl Window {
    fn due_at(&self) -> Option<Instant> {
        match self.is_changed {
            true => self.rests_until,
            false => self.rests_until.max(self.moves_at),
        }
    }
}

impl Windows {
    /// Buckets have changed, so every window has to be refreshed.
    pub(super) fn change(&mut self) {
        for window in &mut self.0 {
            window.is_changed = true;
        }
    }

    /// When the next refresh is due; `None`: at once.
    pub(super) fn due_at(&self) -> Option<Instant> {
        self.0.iter().map(Window::due_at).min().flatten()
    }

    /// The windows whose refresh is due, shortest first.
    pub(super) fn due(&self, now: Instant) -> Vec<usize> {
        let is_due = |window: &usize| self.0[*window].due_at() <= Some(now);
        (0..self.0.len()).filter(is_due).collect()
    }

    /// Plans the next refresh of a window, which took `took`; `None`: it failed.
    pub(super) fn refreshed(&mut self, window: usize, now: Instant, took: Option<Duration>) {
        let rest = took.map_or(REST_AFTER_FAILURE, |took| REST_TIMES * took);
        self.0[window] = Window {
            is_changed: took.is_none(),
            rests_until: Some(now + rest),
            moves_at: Some(now + REFRESH_EVERY),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::instant_now;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_window_rests_after_a_slow_refresh_and_moves_on_without_records() {
        let mut windows = Windows::default();
        let now = instant_now();
        assert_eq!(windows.due(now), [0, 1, 2, 3, 4, 5]);
        for window in 0..6 {
            windows.refreshed(window, now, Some(Duration::from_millis(1)));
        }
        windows.refreshed(5, now, Some(Duration::from_secs(2)));
        assert_eq!(windows.due_at(), Some(now + 300 * SECOND), "nothing has changed");
        windows.change();
        assert_eq!(windows.due_at(), Some(now + SECOND / 20));
        assert_eq!(windows.due(now + SECOND), [0, 1, 2, 3, 4]);
        assert_eq!(windows.due(now + 100 * SECOND), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_refresh_that_fails_is_tried_again_after_a_while() {
        let mut windows = Windows::default();
        let now = instant_now();
        windows.refreshed(0, now, None);
        windows.change();
        assert_eq!(windows.due(now + 599 * SECOND), [1, 2, 3, 4, 5]);
        assert_eq!(windows.due(now + 600 * SECOND), [0, 1, 2, 3, 4, 5]);
    }
}

//! When the windows of the state are brought up to date (`tables::windows` says how).
//!
//! Pure. A window is refreshed after each flush. If that took long, the window then rests, so that it uses at most a fiftieth of
//! the time. Times are microseconds since 1970.

use std::time::Duration;

use crate::duration;
use crate::tables::windows::WINDOWS;

/// After a refresh, a window rests this many times as long as the refresh took.
const REST_TIMES: u32 = 50;

/// Windows move on even if no record comes.
const REFRESH_EVERY_MICROS: i64 = 300_000_000;

/// The rest after a failed refresh.
const REST_AFTER_FAILURE: Duration = Duration::from_secs(600);

#[derive(Debug, Default)]
pub(super) struct Windows([Window; WINDOWS.len()]);

#[derive(Debug, Default)]
struct Window {
    is_changed: bool,
    rests_until: i64,
    moves_at: i64,
}

impl Window {
    fn due_at(&self) -> i64 {
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

    /// When the next refresh is due.
    pub(super) fn due_at(&self) -> i64 {
        self.0.iter().map(Window::due_at).min().unwrap_or(i64::MAX)
    }

    /// The windows whose refresh is due, shortest first.
    pub(super) fn due(&self, now: i64) -> Vec<usize> {
        let is_due = |window: &usize| self.0[*window].due_at() <= now;
        (0..self.0.len()).filter(is_due).collect()
    }

    /// Plans the next refresh of a window, which took `took`; `None`: it failed.
    pub(super) fn refreshed(&mut self, window: usize, now: i64, took: Option<Duration>) {
        let rest = took.map_or(REST_AFTER_FAILURE, |took| REST_TIMES * took);
        let rest_micros = duration::micros(rest);
        self.0[window] = Window {
            is_changed: took.is_none(),
            rests_until: now.saturating_add(rest_micros),
            moves_at: now.saturating_add(REFRESH_EVERY_MICROS),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000;

    #[test]
    fn a_window_rests_after_a_slow_refresh_and_moves_on_without_records() {
        let mut windows = Windows::default();
        let now = 1_000_000 * SECOND;
        assert_eq!(windows.due(now), [0, 1, 2, 3, 4, 5]);
        for window in 0..6 {
            windows.refreshed(window, now, Some(Duration::from_millis(1)));
        }
        windows.refreshed(5, now, Some(Duration::from_secs(2)));
        assert_eq!(windows.due_at(), now + 300 * SECOND, "nothing has changed");
        windows.change();
        assert_eq!(windows.due_at(), now + SECOND / 20);
        assert_eq!(windows.due(now + SECOND), [0, 1, 2, 3, 4]);
        assert_eq!(windows.due(now + 100 * SECOND), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_refresh_that_fails_is_tried_again_after_a_while() {
        let mut windows = Windows::default();
        windows.refreshed(0, SECOND, None);
        windows.change();
        assert_eq!(windows.due(600 * SECOND), [1, 2, 3, 4, 5]);
        assert_eq!(windows.due(601 * SECOND), [0, 1, 2, 3, 4, 5]);
    }
}

//! A trouble that is waited out: when to say so, and when to say that it is over.
//!
//! Pure. A server that is away for a second is nobody's business; one that stays away is said after a few seconds and
//! then rarely, with the last reason, in one line.

use std::time::{Duration, Instant};

/// A trouble is said once it has lasted this long.
pub const SAY_AFTER: Duration = Duration::from_secs(3);

/// And again after so much longer.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// One kind of trouble.
#[derive(Debug, Default)]
pub struct Trouble {
    current: Option<Current>,
}

#[derive(Debug)]
struct Current {
    since: Instant,
    said: Option<Instant>,
    is_without_cause: bool,
    reason: String,
}

impl Trouble {
    /// The trouble is there since then, or still there; only the last reason is kept.
    pub fn is_there(&mut self, since: Instant, reason: String) {
        match &mut self.current {
            Some(current) => current.reason = reason,
            None => {
                self.current = Some(Current {
                    since,
                    said: None,
                    is_without_cause: false,
                    reason,
                });
            }
        }
    }

    /// The trouble is over. How long it lasted, if it was said.
    pub fn is_over(&mut self, now: Instant) -> Option<Duration> {
        let current = self.current.take()?;
        current.said.map(|_| now.saturating_duration_since(current.since))
    }

    pub fn reason(&self) -> Option<&str> {
        self.current.as_ref().map(|current| current.reason.as_str())
    }

    /// Whether its cause is known: what was said without one is said again, once, as soon as it is.
    pub fn cause_is_known(&mut self, is_known: bool) {
        if let Some(current) = &mut self.current {
            if is_known && current.is_without_cause {
                current.said = None;
            }
            if current.said.is_none() {
                current.is_without_cause = !is_known;
            }
        }
    }

    /// The reason and how long it has lasted, if that is to be said now.
    pub fn due(&mut self, now: Instant) -> Option<(&str, Duration)> {
        let current = self.current.as_mut()?;
        let due = match current.said {
            Some(said) => said + SAY_EVERY,
            None => current.since + SAY_AFTER,
        };
        if now < due {
            return None;
        }
        current.said = Some(now);
        Some((&current.reason, now.saturating_duration_since(current.since)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Instant {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        #[expect(clippy::disallowed_methods, reason = "an instant to count from")]
        let start = *START.get_or_init(Instant::now);
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn a_short_trouble_is_never_said() {
        let mut trouble = Trouble::default();
        trouble.is_there(at(0), "refused".into());
        assert_eq!(trouble.due(at(2)), None);
        assert_eq!(trouble.is_over(at(2)), None);
        assert_eq!(trouble.due(at(10)), None);
    }

    #[test]
    fn a_long_trouble_is_said_soon_then_rarely_and_its_end_once() {
        let mut trouble = Trouble::default();
        trouble.is_there(at(0), "refused".into());
        trouble.is_there(at(3), "timed out".into());
        assert_eq!(trouble.due(at(3)), Some(("timed out", Duration::from_secs(3))));
        assert_eq!(trouble.due(at(62)), None);
        assert_eq!(trouble.due(at(63)), Some(("timed out", Duration::from_secs(63))));
        assert_eq!(trouble.is_over(at(70)), Some(Duration::from_secs(70)));
        assert_eq!(trouble.is_over(at(71)), None);
    }

    #[test]
    fn a_trouble_of_unknown_cause_is_said_once_more_when_the_cause_is_known() {
        let mut trouble = Trouble::default();
        trouble.is_there(at(0), "silent".into());
        let mut said = Vec::new();
        for second in 0..130 {
            // It comes and goes.
            trouble.cause_is_known([5, 7, 8, 20].contains(&second));
            said.extend(trouble.due(at(second)).map(|_| second));
        }
        assert_eq!(said, [3, 5, 65, 125]);
    }

    #[test]
    fn a_trouble_that_comes_back_starts_anew() {
        let mut trouble = Trouble::default();
        trouble.is_there(at(0), "refused".into());
        trouble.is_over(at(1));
        trouble.is_there(at(2), "refused".into());
        assert_eq!(trouble.due(at(4)), None);
        assert_eq!(trouble.due(at(5)), Some(("refused", Duration::from_secs(3))));
    }
}

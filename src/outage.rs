//! When to log an outage that is waited out, and its end.
//!
//! Pure. An outage of a second is not logged. A longer one is logged after a few seconds and then once a minute, in one
//! line with the last reason.

use std::time::{Duration, Instant};

/// How long an outage lasts before it is logged: longer than the restart of a server that nobody has to act on.
pub(crate) const SAY_AFTER: Duration = Duration::from_secs(3);

/// The time from one line about the same outage to the next.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// One kind of outage, such as "Kafka cannot be reached": at present or not.
#[derive(Debug, Default)]
pub(crate) struct Outage {
    current: Option<Current>,
}

#[derive(Debug)]
struct Current {
    since: Instant,
    /// When it was last logged.
    logged: Option<Instant>,
    /// Whether that line named no cause.
    is_without_cause: bool,
    reason: String,
}

impl Outage {
    /// Begins the outage at `since`, or gives the present one a new reason.
    pub(crate) fn begin(&mut self, since: Instant, reason: String) {
        match &mut self.current {
            Some(current) => current.reason = reason,
            None => {
                self.current = Some(Current {
                    since,
                    logged: None,
                    is_without_cause: false,
                    reason,
                });
            }
        }
    }

    /// Ends the outage. Returns how long it lasted if it was logged, so that its end can be logged too.
    pub(crate) fn end(&mut self, now: Instant) -> Option<Duration> {
        let current = self.current.take()?;
        current
            .logged
            .map(|_| now.saturating_duration_since(current.since))
    }

    /// The last reason; `None` without an outage.
    pub(crate) fn reason(&self) -> Option<&str> {
        self.current.as_ref().map(|current| current.reason.as_str())
    }

    /// Sets whether the last reason names a cause. An outage that was logged without a cause is logged again, once, as
    /// soon as the cause is known.
    pub(crate) fn set_cause_known(&mut self, is_known: bool) {
        if let Some(current) = &mut self.current {
            if is_known && current.is_without_cause {
                current.logged = None;
            }
            if current.logged.is_none() {
                current.is_without_cause = !is_known;
            }
        }
    }

    /// The reason and how long the outage has lasted, if it is time to log that; the caller then does so.
    pub(crate) fn take_report(&mut self, now: Instant) -> Option<(&str, Duration)> {
        let current = self.current.as_mut()?;
        let due = match current.logged {
            Some(logged) => logged + SAY_EVERY,
            None => current.since + SAY_AFTER,
        };
        if now < due {
            return None;
        }
        current.logged = Some(now);
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
    fn a_short_outage_is_never_logged() {
        let mut outage = Outage::default();
        outage.begin(at(0), "refused".into());
        assert_eq!(outage.take_report(at(2)), None);
        assert_eq!(outage.end(at(2)), None);
        assert_eq!(outage.take_report(at(10)), None);
    }

    #[test]
    fn a_long_outage_is_logged_soon_then_rarely_and_its_end_once() {
        let mut outage = Outage::default();
        outage.begin(at(0), "refused".into());
        outage.begin(at(3), "timed out".into());
        assert_eq!(
            outage.take_report(at(3)),
            Some(("timed out", Duration::from_secs(3)))
        );
        assert_eq!(outage.take_report(at(62)), None);
        assert_eq!(
            outage.take_report(at(63)),
            Some(("timed out", Duration::from_secs(63)))
        );
        assert_eq!(outage.end(at(70)), Some(Duration::from_secs(70)));
        assert_eq!(outage.end(at(71)), None);
    }

    #[test]
    fn an_outage_of_unknown_cause_is_logged_once_more_when_the_cause_is_known() {
        let mut outage = Outage::default();
        outage.begin(at(0), "silent".into());
        let mut logged = Vec::new();
        for second in 0..130 {
            // The cause comes and goes.
            outage.set_cause_known([5, 7, 8, 20].contains(&second));
            logged.extend(outage.take_report(at(second)).map(|_| second));
        }
        assert_eq!(logged, [3, 5, 65, 125]);
    }

    #[test]
    fn an_outage_that_returns_is_a_new_outage() {
        let mut outage = Outage::default();
        outage.begin(at(0), "refused".into());
        outage.end(at(1));
        outage.begin(at(2), "refused".into());
        assert_eq!(outage.take_report(at(4)), None);
        assert_eq!(
            outage.take_report(at(5)),
            Some(("refused", Duration::from_secs(3)))
        );
    }
}

//! The one clock of a run: Unix time as it was at the start, carried on by a clock that nobody sets.
//!
//! Owns the difference between the two. Setting the wall clock disturbs neither the rhythm of the checks nor the times in
//! their records; the price is that a run that began with a wrong clock keeps it until it is started again, which
//! [`Clock::wall_clock_ahead_micros`] lets the run say. There is no re-anchoring: ticks would come twice or not at all, and
//! where the wall clock is kept by NTP there is nothing to gain, because that steers the rate of the monotonic clocks, too.
//! On Linux the time while the machine is suspended counts, or every later record would lie that much in the past.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use rustix::time::{ClockId, clock_gettime};

use crate::sample::Timestamp;

#[cfg(any(target_os = "linux", target_os = "android"))]
const STEADY: ClockId = ClockId::Boottime;
#[cfg(not(any(target_os = "linux", target_os = "android")))]
const STEADY: ClockId = ClockId::Monotonic;

/// A clock that only goes forward; copies agree.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// What to add to the steady clock to get Unix time as it was set at the start.
    offset_micros: i64,
}

impl Clock {
    /// # Errors
    /// The machine's clock is set to a time before 1970 or after 9999, which no record could hold.
    pub fn start() -> anyhow::Result<Self> {
        let wall_micros = wall_micros();
        Timestamp::from_unix_micros(wall_micros)
            .context("this machine's clock lies outside the years 1970 to 9999: set it")?;
        Ok(Self {
            offset_micros: wall_micros - steady_micros(),
        })
    }

    /// Microseconds since the Unix epoch.
    pub fn now_micros(self) -> i64 {
        steady_micros() + self.offset_micros
    }

    /// When that was: microseconds since the Unix epoch at an instant that lies in the past.
    pub fn micros_at(self, past: Instant) -> i64 {
        let ago = instant_now().saturating_duration_since(past);
        self.now_micros() - i64::try_from(ago.as_micros()).unwrap_or(0)
    }

    /// How long until then; nothing if it is past.
    pub fn until(self, micros: i64) -> Duration {
        Duration::from_micros(u64::try_from(micros - self.now_micros()).unwrap_or(0))
    }

    /// How far the wall clock has been set ahead (or, negative, back) since the start.
    pub fn wall_clock_ahead_micros(self) -> i64 {
        wall_micros() - self.now_micros()
    }
}

/// For a record; what lies outside the years that a record can hold is moved to their end.
pub fn timestamp(micros: i64) -> Timestamp {
    const LAST_MICROS: i64 = 253_402_300_799_999_999;
    Timestamp::from_unix_micros(micros.clamp(0, LAST_MICROS)).expect("clamped into the years 1970 to 9999")
}

#[expect(clippy::disallowed_methods, reason = "an edge: the run's clock")]
pub fn instant_now() -> Instant {
    Instant::now()
}

fn steady_micros() -> i64 {
    let now = clock_gettime(STEADY);
    now.tv_sec * 1_000_000 + now.tv_nsec / 1_000
}

#[expect(
    clippy::disallowed_methods,
    reason = "an edge: Unix time is read at the start and compared with later"
)]
pub fn wall_micros() -> i64 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_micros()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_micros()).map_or(i64::MIN, |ago| -ago),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_starts_with_the_wall_clock_and_goes_forward() {
        let clock = Clock::start().unwrap();
        assert!(clock.wall_clock_ahead_micros().abs() < 1_000_000);
        let (first, instant) = (clock.now_micros(), instant_now());
        let second = clock.now_micros();
        assert!(first <= second);
        assert!((clock.micros_at(instant) - first).abs() < 1_000_000);
        assert_eq!(clock.until(first - 1), Duration::ZERO);
        assert!(clock.until(second + 60_000_000) > Duration::from_secs(58));
    }
}

//! The clock of a run: Unix time at the start, plus the time that a monotonic clock has counted since.
//!
//! Setting the wall clock during a run changes neither the rhythm of the checks nor the times in their records. The cost is
//! that a run that starts with a wrong clock keeps the error until its next start; [`Clock::wall_clock_ahead_micros`] lets
//! the run report that. The clock is not corrected during the run, because ticks would then come twice or be lost. NTP makes
//! a correction unnecessary, because it adjusts the rate of the monotonic clocks too. On Linux the clock also counts the time
//! while the machine is suspended; without it every later record would be too early by that time.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use rustix::time::{ClockId, clock_gettime};

use crate::sample::Timestamp;

#[cfg(any(target_os = "linux", target_os = "android"))]
const STEADY: ClockId = ClockId::Boottime;
#[cfg(not(any(target_os = "linux", target_os = "android")))]
const STEADY: ClockId = ClockId::Monotonic;

/// A clock that only goes forward. All copies show the same time.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// Unix time at the start minus the steady clock at the start, in microseconds.
    offset_micros: i64,
}

impl Clock {
    pub fn start() -> anyhow::Result<Self> {
        let wall_micros = wall_micros();
        Timestamp::from_unix_micros(wall_micros)
            .context("this machine's clock shows a year outside 1970 to 9999; set the clock")?;
        Ok(Self {
            offset_micros: wall_micros - steady_micros(),
        })
    }

    /// Microseconds since the Unix epoch.
    pub fn now_micros(self) -> i64 {
        steady_micros() + self.offset_micros
    }

    /// A past instant in microseconds since the Unix epoch.
    pub fn micros_at(self, past: Instant) -> i64 {
        let ago = instant_now().saturating_duration_since(past);
        self.now_micros() - i64::try_from(ago.as_micros()).unwrap_or(0)
    }

    /// The time until `micros` since the Unix epoch; zero if that is past.
    pub fn until(self, micros: i64) -> Duration {
        Duration::from_micros(u64::try_from(micros - self.now_micros()).unwrap_or(0))
    }

    /// How many microseconds the wall clock was set ahead since the start; negative if it was set back.
    pub fn wall_clock_ahead_micros(self) -> i64 {
        wall_micros() - self.now_micros()
    }
}

/// A timestamp for a record. A time outside the years 1970 to 9999 becomes the nearest one inside.
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

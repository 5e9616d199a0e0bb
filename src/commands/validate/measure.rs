//! What `validate` finds out by making checks: what one costs on this machine, and with `--try` the outcome of each host.

use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rustix::time::{ClockId, clock_gettime};

use crate::check::http::Checks;
use crate::check::target::Target;
use crate::clock::instant_now;
use crate::commands::demo::site::SampleSite;
use crate::config::CheckConfig;
use crate::lock::lock;
use crate::produce::host_file;
use crate::sample::Outcome;

/// Enough for a steady mean, in some ten milliseconds.
const CHECKS_MEASURED: u32 = 40;

/// The most hosts that are tried at the same time: a thousand hosts take seconds, and a small machine is not overrun.
const MAX_TRIED_AT_ONCE: usize = 64;

/// The CPU time of one check.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    pub http: Duration,
    pub https: Duration,
}

impl Cost {
    /// Checks a site on loopback some times, with and without TLS. Each check has a new connection, as always.
    pub(super) fn measure(config: &CheckConfig) -> anyhow::Result<Self> {
        let ca_file = tempfile::NamedTempFile::new().context("cannot make a temporary file")?;
        let site = SampleSite::start(ca_file.path())?;
        let hosts = host_file::parse("sample site", site.host_file().as_bytes())?;
        let config = CheckConfig {
            ca_file: Some(ca_file.path().to_owned()),
            ..config.clone()
        };
        let mut checker = Checks::new(&config)?.checker();
        let mut cost = |scheme: &str| {
            let is_good = |target: &&Target| target.url.scheme() == scheme && target.url.path() == "/up";
            let target = hosts.targets.iter().find(is_good).context("the site has it")?;
            let mut check = || {
                let seen = checker.check(target, instant_now() + Duration::from_secs(5));
                anyhow::ensure!(
                    seen.outcome == Outcome::Ok,
                    "a check on loopback: {:?}",
                    seen.error
                );
                Ok(())
            };
            // The first one allocates what the others use again.
            check()?;
            let before = cpu_time();
            (0..CHECKS_MEASURED).try_for_each(|_| check())?;
            anyhow::Ok((cpu_time() - before) / CHECKS_MEASURED)
        };
        Ok(Self {
            http: cost("http")?,
            https: cost("https")?,
        })
    }
}

/// Of this thread.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        time.tv_sec.try_into().unwrap_or_default(),
        time.tv_nsec.try_into().unwrap_or_default(),
    )
}

/// What the check of one host has shown.
#[derive(Clone, Debug)]
pub(super) struct Tried {
    pub outcome: Outcome,
    pub error: Option<String>,
    pub ip: Option<IpAddr>,
    pub took: Duration,
}

/// Checks each host once, several at the same time. The results are in the order of the targets. `show` is called after each check.
pub(super) fn try_all(
    config: &CheckConfig,
    targets: &[Target],
    show: impl Fn(&str) + Sync,
) -> anyhow::Result<Vec<Tried>> {
    let checks = Checks::new(config)?;
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Tried)>> = Mutex::default();
    let work = || {
        let mut checker = checks.checker();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(target) = targets.get(index) else { return };
            let begun = instant_now();
            let seen = checker.check(target, begun + target.timeout(config.timeout));
            let tried = Tried {
                outcome: seen.outcome,
                error: seen.error,
                ip: seen.ip,
                took: begun.elapsed(),
            };
            let mut done = lock(&done);
            done.push((index, tried));
            show(&bar(done.len(), targets.len()));
        }
    };
    thread::scope(|scope| {
        for _ in 1..targets.len().min(MAX_TRIED_AT_ONCE).min(config.max_threads) {
            // With fewer threads it only takes longer.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    let mut done = lock(&done);
    done.sort_unstable_by_key(|(index, _)| *index);
    Ok(done.drain(..).map(|(_, tried)| tried).collect())
}

/// `[#####     ] 3 of 6`, in 40 columns up to a million hosts.
fn bar(done: usize, all: usize) -> String {
    const WIDTH: usize = 20;
    let filled = done * WIDTH / all.max(1);
    format!("[{:<WIDTH$}] {done} of {all}", "#".repeat(filled))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_is_full_when_all_are_done() {
        assert_eq!(bar(0, 3), "[                    ] 0 of 3");
        assert_eq!(bar(2, 3), "[#############       ] 2 of 3");
        assert_eq!(bar(3, 3), "[####################] 3 of 3");
        assert!(bar(999_999, 999_999).len() <= 40);
    }
}

//! What the log and /readyz say about the group.

use std::time::{Duration, Instant};

use super::thread::Thread;
use crate::clock::instant_now;
use crate::lock::lock;
use crate::produce::share::tail::Takeover;

/// Joining a group takes a few seconds, and up to a session longer after a kill. A longer wait is logged.
const JOIN_WITHIN: Duration = Duration::from_secs(10);

impl Thread {
    pub(super) fn log_shares(&mut self) {
        let (_, ours) = self.shares.owned_of();
        if self.logged_shares.replace(ours) == Some(ours) {
            return;
        }
        match ours {
            0 => log::info!(
                "group={} this producer has no share: it waits until another one leaves",
                self.group
            ),
            _ => log::info!("group={} shares={ours}", self.group),
        }
    }

    pub(super) fn report_outages(&mut self) {
        let now = instant_now();
        self.report_membership(now);
        self.report_shares(now);
        if let Some((reason, lasted)) = self.foreign_ledger.take_report(now) {
            log::error!(
                "group={} {reason}; until then its hosts are not checked (for {} s)",
                self.group,
                lasted.as_secs()
            );
        }
    }

    fn report_membership(&mut self, now: Instant) {
        let group = &self.group;
        if let Some((reason, lasted)) = self.member.refusal(now) {
            log::error!(
                "group={group} Kafka has refused the membership for {} s: {reason}",
                lasted.as_secs()
            );
        }
        if let Some((who, lasted)) = self.member.other_programs_to_report(now) {
            log::error!(
                "group={group} another program is a member of the group, and the hosts of its partitions are not checked: {who} \
                 (for {} s); end it, or set another PRODUCE_GROUP",
                lasted.as_secs()
            );
        }
        let refused = self.member.refused();
        match self.absent_since {
            Some(since) if refused.is_none() => {
                if now.duration_since(since) >= JOIN_WITHIN {
                    self.absence.begin(since, String::new());
                }
            }
            _ => drop(self.absence.end(now)),
        }
        if let Some((_, lasted)) = self.absence.take_report(now) {
            log::warn!(
                "waiting for the group {group}: this producer is not a member of it (for {} s)",
                lasted.as_secs()
            );
        }
        // A member without a share is ready too.
        self.readiness.set(match (refused, self.member.other_programs()) {
            (Some(reason), _) => Err(format!(
                "Kafka refuses the membership of the group {group}: {reason}"
            )),
            (_, Some(who)) => Err(format!("another program is a member of the group {group}: {who}")),
            _ if self.absent_since.is_some() => Err(format!("waiting for the group {group}")),
            _ => Ok(()),
        });
    }

    fn report_shares(&mut self, now: Instant) {
        if let Some(why) = lock(&self.commit_failure).take() {
            self.unsaved.begin(now, why.clone());
            self.failure = Some(why);
        }
        if self.shares.owned().next().is_none() {
            self.unsaved.end(now);
        }
        if let Some((why, lasted)) = self.unsaved.take_report(now) {
            log::warn!(
                "group={} the ledgers of its shares could not be committed for {} s: {why}; the next owners have to read all records \
                 since then",
                self.group,
                lasted.as_secs()
            );
        }
        let mut untaken = self.shares.untaken();
        let Some((share, waits_for)) = untaken.next() else {
            self.failure = None;
            self.foreign_ledger.end(now);
            self.untaken.end(now);
            return;
        };
        let count = 1 + untaken.count();
        self.untaken
            .begin(now, format!("share={share} waits {waits_for}"));
        if let Some((reason, lasted)) = self.untaken.take_report(now) {
            let (_, ours) = self.shares.owned_of();
            let failure = self.failure.as_deref().unwrap_or("no error is known");
            log::warn!(
                "group={} {count} of {ours} shares could not be taken for {} s: {reason}; {failure}",
                self.group,
                lasted.as_secs()
            );
        }
    }

    pub(super) fn log_takeover(&mut self, takeover: &Takeover) {
        let Takeover {
            share,
            ledger,
            is_unbroken,
            ..
        } = takeover;
        let again = if *is_unbroken { " again" } else { "" };
        log::info!("share={share} epoch={} taken{again}", ledger.epoch);
        let group = &self.group;
        if ledger.whole_before == 0 && takeover.last_tick() > 0 {
            log::warn!(
                "share={share} has no ledger in group {group}: its hosts continue from the last records of the partition, and ticks \
                 that are missing before them stay missing"
            );
        }
        if let Some(other) = self.other_place.take() {
            log::warn!(
                "group={group} the last owner of a share had AGENT_NAME={other}, and this producer has AGENT_NAME={}: the producers \
                 of a group check each host once, so they need the same AGENT_NAME; give each place a PRODUCE_GROUP of its own",
                self.place
            );
        }
    }
}

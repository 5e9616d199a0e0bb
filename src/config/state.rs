//! What `consume` keeps beside the rows, and when a host is down: STATE, DOWN_WHEN, DB_ROLLUP_RETENTION.

use std::time::Duration;

use super::form::RETENTIONS;
use super::reader::Reader;
use crate::consume::fold::host::DownWhen;

#[derive(Clone, Debug, Default)]
pub struct StateConfig {
    pub down_when: DownWhen,
    /// How long sums by hour and day, and incidents that have ended, are kept; `None`: for ever.
    pub rollup_retention: Option<Duration>,
}

/// `None` if STATE is `off`. The other two variables are read all the same, so that mistakes in them are found.
pub(super) fn state(reader: &mut Reader<'_>) -> Option<StateConfig> {
    let is_on = reader.switch("STATE");
    let expected = "any, majority, all, or how many places must see a host down, from 1";
    let down_when = reader.read("DOWN_WHEN", expected, |text| text.parse().ok());
    let rollup_retention = reader.duration("DB_ROLLUP_RETENTION", RETENTIONS, "400d");
    is_on.then(|| StateConfig {
        down_when: down_when.unwrap_or_default(),
        rollup_retention,
    })
}

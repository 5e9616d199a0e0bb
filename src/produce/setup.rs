//! What a run is given.

use std::sync::Arc;

use crate::config::ProduceConfig;
use crate::produce::counters::Counters;
use crate::produce::hosts::Sources;
use crate::produce::publisher::Bounds;
use crate::shutdown::Shutdown;

/// When a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounds {
    /// `--once`: after one check of each host, when Kafka has acknowledged every record.
    Once,
    /// When a stop is requested.
    Endless,
}

/// What a run needs from its caller. Tests use their own checks and bounds.
pub struct Setup<'a> {
    pub config: &'a ProduceConfig,
    pub sources: Sources,
    pub rounds: Rounds,
    pub shutdown: &'a Shutdown,
    pub counters: Arc<Counters>,
    pub bounds: Bounds,
}

//! What a run is given.

use std::sync::Arc;

use crate::config::ProduceConfig;
use crate::produce::counters::Counters;
use crate::produce::hosts::Sources;
use crate::produce::publisher::Bounds;
use crate::produce::schedule::Rounds;
use crate::shutdown::Shutdown;

/// What a run needs from its caller. Tests use their own checks and bounds.
pub struct Setup<'a> {
    pub config: &'a ProduceConfig,
    pub sources: Sources,
    pub rounds: Rounds,
    pub shutdown: &'a Shutdown,
    pub counters: Arc<Counters>,
    pub bounds: Bounds,
}

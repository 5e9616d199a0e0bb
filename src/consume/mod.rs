//! The `consume` agent: writes the records to durable rows, and folds the state from them, each record exactly once.
//!
//! Two pipelines, the rows and the state, do the same work: each has its own consumer group, positions, connection and threads.
//! In a pipeline, `ingest` (the state machine), `batch` and `fold` are pure; `source` (Kafka) and `store` (Postgres)
//! do the I/O; and a `Sink` decides what is written: `rows` or `state`. `pipeline` is the thread that polls Kafka and runs the
//! state machine. It sends one request at a time to the `writer`, the thread that owns the database connection.

pub mod batch;
mod counters;
pub mod fold;
pub mod ingest;
mod pipeline;
mod positions;
mod report;
pub mod rows;
pub mod sink;
pub mod source;
pub mod state;
pub mod store;
mod stuck;
mod writer;

use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;

use crate::clock::instant_now;
use crate::config::{ConsumeConfig, StateConfig};
pub use crate::consume::counters::Counters;
use crate::consume::pipeline::run_pipeline;
use crate::consume::source::Source;
use crate::consume::state::StateSink;
use crate::consume::store::Store;
use crate::http;
use crate::postgres::Bounds;
use crate::shutdown::Shutdown;
use crate::thread::start_thread;

/// The wait before the state's pipeline starts again after an error, such as a missing privilege. It doubles each time, so
/// that a lasting error costs nothing, and an operator sees the effect of a repair within ten minutes.
const STATE_AGAIN_FIRST: Duration = Duration::from_secs(10);
const STATE_AGAIN_MOST: Duration = Duration::from_secs(600);

/// Reads the topics and writes batches to Postgres until a stop is requested. Serves METRICS_ADDR meanwhile.
///
/// # Errors
/// An error that waiting does not resolve, so the operator has to act. Nothing unwritten was committed.
pub fn run(config: &ConsumeConfig, shutdown: &Shutdown) -> anyhow::Result<()> {
    let counters = Counters::default();
    let _endpoint = config
        .metrics_addr
        .map(|address| http::serve(address, counters.clone()))
        .transpose()?;
    run_counted(config, shutdown, &counters)
}

/// As [`run`], without METRICS_ADDR: the caller reads the counters.
pub fn run_counted(config: &ConsumeConfig, shutdown: &Shutdown, counters: &Counters) -> anyhow::Result<()> {
    let source = Source::join(config, &[])?;
    run_with(config, source, shutdown, counters)
}

/// As [`run_counted`], with a consumer that has already joined the group.
pub fn run_with(
    config: &ConsumeConfig,
    source: Source,
    shutdown: &Shutdown,
    counters: &Counters,
) -> anyhow::Result<()> {
    log::info!(
        "consuming {} as group {} into {}",
        config.topics.join(", "),
        config.group_id,
        config.database.table.quoted("")
    );
    let ended = Shutdown::new();
    let state = match &config.state {
        Some(state) => {
            let wake = ended.clone();
            shutdown.on_request(move || wake.request());
            let join = source.joiner(&state::config_of(config).group_id);
            Some(
                start_state(config, state, join, &ended, counters)
                    .context("cannot start a thread for the state")?,
            )
        }
        None => {
            log::info!("STATE=off: only rows are written; the tables of the state stay as they are");
            None
        }
    };
    let stopped = run_pipeline(Store::new(config)?, config, source, shutdown, counters);
    ended.request();
    // The state's pipeline bounds its own stop.
    if state.is_some_and(|state| state.join().is_err()) {
        log::error!("the thread of the state panicked: this is a bug, please report it");
    }
    stopped
}

/// Runs the state's pipeline on a thread of its own. An error there does not end the rows' pipeline; the state's starts again
/// from its positions in the table.
fn start_state(
    config: &ConsumeConfig,
    state: &StateConfig,
    join: impl Fn() -> anyhow::Result<Source> + Send + 'static,
    ended: &Shutdown,
    rows: &Counters,
) -> std::io::Result<JoinHandle<()>> {
    let (config, state) = (state::config_of(config), state.clone());
    let (ended, rows) = (ended.clone(), rows.clone());
    let run = move || {
        let mut wait = STATE_AGAIN_FIRST;
        while !ended.requested() {
            let sink = StateSink::new(state.clone(), rows.clone());
            let stopped = Store::of(sink, &config, Bounds::default())
                .and_then(|store| run_pipeline(store, &config, join()?, &ended, rows.state()));
            let Err(error) = stopped else { return };
            log::error!(
                "the state is not being updated (retry in {} s): {error:#}",
                wait.as_secs()
            );
            ended.wait_until(instant_now() + wait);
            wait = (wait * 2).min(STATE_AGAIN_MOST);
        }
    };
    start_thread("state", run)
}

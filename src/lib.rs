//! host-metrics: checks web sites on time and keeps every result exactly once.
//!
//! The way of the data, one name per boundary:
//!
//! ```text
//! host file line → Target → Tick → Observation → Sample ──JSON──▶ record → Row → durable → committed
//!      text        parsed   due     observed     stamped   Kafka          COPY   Postgres   Kafka
//! ```
//!
//! `produce` owns the left half, `consume` the right one; [`sample`] is the wire between them and the only module that
//! both import. The program is `main.rs`; this library exists so that tests and benches can reach the parts.

pub mod check;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod config;
pub mod consume;
pub mod duration;
pub mod http;
pub mod kafka;
pub mod limits;
pub mod logging;
mod outage;
pub mod postgres;
pub mod produce;
pub mod sample;
pub mod shutdown;
pub mod tables;
pub mod terminal;

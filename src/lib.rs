//! host-metrics: checks web sites on schedule and stores every result exactly once.
//!
//! ARCHITECTURE.md has the map. The program is `main.rs`; this library exists so that tests, benchmarks and fuzz targets can use the
//! parts.

#![cfg_attr(not(test), warn(clippy::too_many_lines, unreachable_pub))]

pub mod check;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod config;
pub mod consume;
pub mod duration;
mod files;
mod hash;
pub mod http;
pub mod kafka;
pub mod limits;
mod lock;
pub mod logging;
mod outage;
pub mod page;
pub mod postgres;
pub mod produce;
pub mod sample;
pub mod shutdown;
mod socket;
pub mod tables;
pub mod terminal;
mod thread;
mod words;

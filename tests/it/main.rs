//! Integration tests without servers: real sockets, real certificates, and librdkafka's in-process broker.

mod certificates;
mod check;
mod child;
mod command_line;
mod consume;
mod demo;
mod deployment;
mod docs;
mod fleet;
mod fleet_walk;
mod host_file;
mod host_options;
mod metrics;
#[cfg(target_os = "linux")]
mod network;
#[cfg(target_os = "linux")]
mod own_network;
mod page;
mod produce;
mod revision;
mod sample;
mod secrets;
mod simulator;
mod site;
mod status;
#[cfg(target_os = "linux")]
mod terminal;

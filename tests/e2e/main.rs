//! End-to-end tests: the binary with a real Apache Kafka and a real Postgres, which the tests start.
//!
//! The harness: `scratch` (processes and directories that end with the test run), `kafka` (one real broker), `database` (a
//! database for one test), `agent` (the program as a child process), `case` (the three together), `faults` (a proxy that swallows
//! bytes, a frozen process), `site` (scripted web sites), `table` (the table compared with the topic). The rest are scenarios.

mod agent;
mod audit;
mod browser;
mod bundled_postgres;
mod case;
mod database;
mod demo;
mod docs;
mod existing_tables;
mod faults;
mod fleet;
mod fleet_kills;
mod fleet_members;
mod harness;
mod hosts;
mod init;
mod kafka;
mod kills;
mod operator_errors;
mod outages;
mod page;
mod pipeline;
mod planted;
mod poison;
mod pooler;
mod positions;
mod rebalance;
mod scratch;
mod security;
mod site;
mod state;
mod store;
mod table;
mod tail;
mod unreadable;
mod watching;

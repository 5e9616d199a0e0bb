//! End-to-end tests: the binary against a real Apache Kafka and a real Postgres, both started here.
//!
//! The harness: `scratch` (processes and directories that do not outlive the test run), `kafka` (one real broker), `database`
//! (a database of a test's own), `agent` (our program as a child process), `case` (the three together), `faults` (a deaf proxy,
//! a frozen process), `site` (scripted web sites), `table` (the table as a test looks at it). The rest are scenarios.

mod agent;
mod audit;
mod bundled_postgres;
mod case;
mod database;
mod demo;
mod existing_tables;
mod faults;
mod fleet;
mod harness;
mod init;
mod kafka;
mod kills;
mod operator_errors;
mod outages;
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

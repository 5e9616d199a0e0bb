//! The tables in Postgres: their names and SQL, a row as COPY takes it, tables that exist already, and their upkeep.

pub mod days;
mod ddl;
pub mod destination;
pub mod hosts;
pub mod migrate;
pub mod names;
pub mod row;
pub mod schema;
pub mod state;
pub mod views;

//! The tables in Postgres: their names and SQL, a row as COPY takes it, and tables that exist already.

pub mod catalogue;
pub mod row;
pub mod schema;
pub mod sums;
pub mod views;

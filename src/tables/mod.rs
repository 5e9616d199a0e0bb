//! The tables in Postgres: names, SQL, migrations, COPY's row format, checks of existing tables, and partitions.

pub mod buckets;
pub mod days;
pub mod ddl;
pub mod destination;
pub mod hosts;
pub mod migrate;
pub mod names;
pub mod row;
pub mod schema;
pub mod state;
pub mod views;
pub mod windows;

//! The store, `init` and `drop` with a real Postgres, by subject.
//!
//! Most tests have their own database on one shared server. Tests that break the server start one for themselves. This file has
//! what the subjects share.

mod flushing;
mod logins;
mod migrations;
mod names;
mod partitions;
mod passing_faults;
mod refused_rows;
mod users_tables;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::Duration;

use host_metrics::config::{ConsumeConfig, InitConfig};
use host_metrics::consume::batch::{Batch, Form, NextOffset, Offset, Partition, Record};
use host_metrics::consume::store::Store;
use host_metrics::postgres::{Fault, Kind};
use host_metrics::sample::{Sample, Timestamp};
use host_metrics::tables::days;
use host_metrics::tables::row::{Layout, Origin};
use host_metrics::tables::schema::Day;

use crate::database::{Database, config, server};
use crate::scratch;

pub const P0: Partition = Partition::new("t", 0);
pub const P1: Partition = Partition::new("t", 1);
const P2: Partition = Partition::new("t", 2);

impl Database {
    pub fn config(&self) -> ConsumeConfig {
        self.config_of("host_metrics")
    }

    pub fn config_of(&self, table: &str) -> ConsumeConfig {
        config(server(), &self.name, table)
    }

    pub fn init_config(&self) -> InitConfig {
        let ConsumeConfig {
            kafka,
            topics,
            database,
            ..
        } = self.config();
        InitConfig {
            kafka,
            topics,
            database,
        }
    }

    pub fn store(&self) -> Store {
        self.store_of("host_metrics")
    }

    fn store_of(&self, table: &str) -> Store {
        Store::new(&self.config_of(table)).unwrap()
    }

    /// Connects as a user who may log in and has no other rights.
    pub fn store_without_create(&mut self, table: &str) -> Store {
        let user = format!("poor_{}", self.name);
        // Before Postgres 15, every user may create objects in the schema public.
        self.execute(&format!(
            "CREATE ROLE {user} LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC"
        ));
        let mut config = self.config_of(table);
        config.database.user = user;
        Store::new(&config).unwrap()
    }
}

pub fn start_at(store: &mut Store, at: &[(Partition, i64)]) {
    let partitions: Vec<Partition> = at.iter().map(|(partition, _)| *partition).collect();
    let missing = at
        .iter()
        .map(|(partition, next)| (*partition, NextOffset(*next)))
        .collect();
    store.positions(&partitions, &missing).unwrap();
}

fn positions(store: &mut Store, partitions: &[Partition]) -> Vec<(Partition, i64)> {
    let found = store.positions(partitions, &BTreeMap::new()).unwrap();
    found
        .into_iter()
        .map(|(partition, position)| (partition, position.next.0))
        .collect()
}

/// A store of `table`, and a batch with one row for it.
fn with_one_row(db: &Database, table: &str) -> (Store, Batch) {
    let mut store = db.store_of(table);
    let layout = store.open().unwrap();
    start_at(&mut store, &[(P0, 0)]);
    let mut batch = Batch::default();
    row(&mut batch, &layout, P0, 0, 0, &ok("https://a.example/"));
    (store, batch)
}

pub fn row(
    batch: &mut Batch,
    layout: &Layout,
    partition: Partition,
    base: i64,
    offset: i64,
    sample: &Sample<'_>,
) {
    let record = Record {
        partition,
        offset: Offset(offset),
        timestamp: None,
        key: Some(sample.address.as_bytes()),
        value: Some(b"{}"),
    };
    let origin = Origin {
        topic: partition.topic,
        partition: partition.number,
        offset,
    };
    batch.push(NextOffset(base), record, |into| {
        layout.encode_row(sample, origin, into)
    });
    assert!(matches!(batch.entries.last().unwrap().form, Form::Row(_)));
}

pub fn reject(
    batch: &mut Batch,
    partition: Partition,
    base: i64,
    offset: i64,
    key: Option<&[u8]>,
    value: Option<&[u8]>,
    reason: &str,
) {
    let record = Record {
        partition,
        offset: Offset(offset),
        timestamp: None,
        key,
        value,
    };
    batch.push(NextOffset(base), record, |_| Err(reason.to_owned()));
}

pub fn ok(address: &str) -> Sample<'static> {
    Sample {
        address: address.to_owned().into(),
        is_valid: true,
        outcome: Some("ok".into()),
        status_code: Some(200),
        latency: Some(0.25),
        scheduled_at: Some(at_day(days::today(), 0)),
        ..Sample::default()
    }
}

/// The first moment of a day.
pub fn at_day(today: Day, days: i64) -> Timestamp {
    let bounds = today.plus(days).bounds();
    let text = bounds.start.trim_matches('\'').to_owned();
    let (year, rest) = text.split_at(4);
    let date = time::Date::from_calendar_date(
        year.parse().unwrap(),
        time::Month::try_from(rest[1..3].parse::<u8>().unwrap()).unwrap(),
        rest[4..6].parse().unwrap(),
    )
    .unwrap();
    Timestamp::from_unix_micros(date.midnight().assume_utc().unix_timestamp() * 1_000_000).unwrap()
}

/// The text of an error that passes.
fn retry<T: Debug>(result: Result<T, Fault>) -> String {
    let fault = result.unwrap_err();
    assert_eq!(fault.kind, Kind::Passing, "{fault}");
    fault.text
}

/// The text of an error that the operator has to correct.
fn fatal<T: Debug>(result: Result<T, Fault>) -> String {
    let fault = result.unwrap_err();
    assert_ne!(fault.kind, Kind::Passing, "{fault}");
    fault.text
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    scratch::wait_for(
        Duration::from_secs(30),
        what,
        || is_so().then_some(()),
        String::new,
    );
}

use super::*;
use crate::consume::batch::{Form, Offset};

const P: Partition = Partition::new("t", 0);
const Q: Partition = Partition::new("t", 1);

/// A time of the tests, in milliseconds.
fn at(millis: u64) -> Instant {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    #[expect(clippy::disallowed_methods, reason = "the tests need some instant")]
    let start = *START.get_or_init(Instant::now);
    start + Duration::from_millis(millis)
}

/// A batch is full with 3 records, and waits for at most 200 ms.
const LIMITS: Limits = Limits {
    batch_size: 3,
    batch_wait: Duration::from_millis(200),
    is_asynchronous: false,
};

/// A state machine whose store is open.
fn open() -> Ingest {
    open_with(LIMITS)
}

fn open_with(limits: Limits) -> Ingest {
    let mut ingest = Ingest::new(limits, 1);
    assert_eq!(ingest.next_action(at(0)), Action::Ask(Request::Open));
    ingest.handle(at(0), Event::Opened { same_layout: true });
    ingest
}

/// The same, and it reads `partitions` from offset 100 on.
fn reading(partitions: &[Partition]) -> Ingest {
    let mut ingest = open();
    ingest.handle(at(0), Event::Assigned(partitions.to_vec()));
    let locate = locate(partitions, BTreeMap::new());
    assert_eq!(ingest.next_action(at(0)), locate);
    ingest.handle(at(0), Event::Located(positions_at(partitions, 100)));
    let starts: Vec<_> = starts_at(partitions, 100).into_iter().collect();
    assert_eq!(ingest.next_action(at(0)), Action::Read(starts.clone()));
    assert_eq!(ingest.next_action(at(0)), Action::Commit(starts));
    ingest
}

fn starts_at(partitions: &[Partition], position: i64) -> BTreeMap<Partition, NextOffset> {
    let place = |partition: &Partition| (*partition, NextOffset(position));
    partitions.iter().map(place).collect()
}

/// The positions in the table.
fn positions_at(partitions: &[Partition], position: i64) -> BTreeMap<Partition, Position> {
    let place = |partition: &Partition| (*partition, Position::from(NextOffset(position)));
    partitions.iter().map(place).collect()
}

fn record(partition: Partition, offset: i64) -> Record<'static> {
    Record {
        partition,
        offset: Offset(offset),
        timestamp: None,
        key: None,
        value: Some(b"value"),
    }
}

fn read_from(offset: i64) -> Action {
    Action::Read(vec![(P, NextOffset(offset))])
}

fn commit_of(offset: i64) -> Action {
    Action::Commit(vec![(P, NextOffset(offset))])
}

fn locate(partitions: &[Partition], missing_from: BTreeMap<Partition, NextOffset>) -> Action {
    Action::Ask(Request::Locate {
        partitions: partitions.to_vec(),
        missing_from,
    })
}

/// Whether the batch was stored is not known.
fn lost(batch: Batch) -> Event {
    Event::Flushed(batch, None)
}

fn read(ingest: &mut Ingest, millis: u64, partition: Partition, offset: i64) -> bool {
    let record = record(partition, offset);
    ingest.record(at(millis), record, |_, row| {
        row.extend_from_slice(b"row");
        Ok(())
    })
}

fn flush(ingest: &mut Ingest, millis: u64) -> Batch {
    match ingest.next_action(at(millis)) {
        Action::Ask(Request::Flush(batch)) => batch,
        action => panic!("{action:?} instead of a flush"),
    }
}

fn assert_locates(ingest: &mut Ingest, millis: u64) {
    let action = ingest.next_action(at(millis));
    assert!(
        matches!(action, Action::Ask(Request::Locate { .. })),
        "{action:?}"
    );
}

fn assert_tells(ingest: &mut Ingest, millis: u64, words: &str) {
    match ingest.next_action(at(millis)) {
        Action::Tell(text) => assert!(text.contains(words), "{text}"),
        action => panic!("{action:?} instead of a text"),
    }
}

fn span(base: i64, next: i64) -> Span {
    Span {
        base: NextOffset(base),
        next: NextOffset(next),
    }
}

/// The next wait of the machine. Until then it must not ask for anything of the store.
fn next_wait(ingest: &mut Ingest, millis: u64) -> Action {
    loop {
        match ingest.next_action(at(millis)) {
            action @ (Action::Poll { .. } | Action::Hold { .. }) => return action,
            Action::Commit(_) | Action::Tell(_) | Action::Read(_) => {}
            action => panic!("{action:?} instead of a wait"),
        }
    }
}

#[test]
fn nothing_is_read_before_the_store_is_open() {
    let mut ingest = Ingest::new(LIMITS, 1);
    ingest.handle(at(0), Event::Assigned(vec![P]));
    assert_eq!(ingest.next_action(at(0)), Action::Ask(Request::Open));
    assert!(matches!(ingest.next_action(at(0)), Action::Poll { .. }));
    assert!(!read(&mut ingest, 0, P, 0), "its position is not known yet");
}

#[test]
fn a_small_batch_is_written_when_its_oldest_record_has_waited() {
    let mut ingest = reading(&[P, Q]);
    assert!(read(&mut ingest, 1_000, P, 100));
    assert!(read(&mut ingest, 1_150, Q, 107));
    let until = at(1_200);
    assert_eq!(next_wait(&mut ingest, 1_199), Action::Poll { until });
    let batch = flush(&mut ingest, 1_200);
    assert_eq!(
        batch.spans,
        BTreeMap::from([(P, span(100, 101)), (Q, span(100, 108))])
    );
}

#[test]
fn a_backlog_is_written_in_full_batches_and_the_next_one_fills_meanwhile() {
    let mut ingest = reading(&[P]);
    for offset in 100..103 {
        assert!(read(&mut ingest, 0, P, offset));
    }
    assert!(!ingest.has_room());
    let first = flush(&mut ingest, 0);
    assert_eq!((first.len(), first.spans[&P]), (3, span(100, 103)));
    for offset in 103..106 {
        assert!(read(&mut ingest, 0, P, offset));
    }
    assert!(matches!(ingest.next_action(at(0)), Action::Hold { .. }));
    ingest.handle(at(10), Event::Flushed(first, Some(Flushed::Durable)));
    let second = flush(&mut ingest, 10);
    assert_eq!((second.len(), second.spans[&P]), (3, span(103, 106)));
}

#[test]
fn a_record_for_which_there_is_no_room_is_read_again() {
    let mut ingest = reading(&[P]);
    for offset in 100..103 {
        assert!(read(&mut ingest, 0, P, offset));
    }
    assert!(!read(&mut ingest, 0, P, 103));
    assert!(!read(&mut ingest, 0, P, 104));
    let _batch = flush(&mut ingest, 0);
    assert_eq!(ingest.next_action(at(0)), read_from(103));
}

#[test]
fn with_both_batches_full_reading_pauses_after_a_second_and_continues_where_it_was() {
    let mut ingest = reading(&[P]);
    for offset in 100..103 {
        read(&mut ingest, 0, P, offset);
    }
    let batch = flush(&mut ingest, 0);
    for (millis, offset) in [(10, 103), (20, 104), (50, 105)] {
        read(&mut ingest, millis, P, offset);
    }
    let until = at(1_049);
    assert_eq!(ingest.next_action(at(949)), Action::Hold { until });
    assert_eq!(ingest.next_action(at(1_050)), Action::Pause);
    assert!(matches!(ingest.next_action(at(1_050)), Action::Poll { .. }));
    assert!(!read(&mut ingest, 1_100, P, 106), "it is paused");
    ingest.handle(at(5_000), Event::Flushed(batch, Some(Flushed::Durable)));
    flush(&mut ingest, 5_000);
    assert_eq!(ingest.next_action(at(5_000)), read_from(106));
}

#[test]
fn the_position_of_a_stuck_partition_is_read_again_once_nothing_is_unwritten() {
    let mut ingest = reading(&[P]);
    read(&mut ingest, 0, P, 100);
    ingest.handle(at(100), Event::Stuck(vec![P]));
    let batch = flush(&mut ingest, 200);
    ingest.handle(at(200), Event::Stuck(vec![P]));
    ingest.handle(at(200), Event::Flushed(batch, Some(Flushed::Durable)));
    assert!(read(&mut ingest, 200, P, 101), "it is still being read");
    let batch = flush(&mut ingest, 400);
    ingest.handle(at(400), Event::Flushed(batch, Some(Flushed::Durable)));

    ingest.handle(at(400), Event::Stuck(vec![P]));
    let expected = locate(&[P], BTreeMap::new());
    assert_eq!(ingest.next_action(at(400)), expected);
    ingest.handle(at(400), Event::Located(positions_at(&[P], 150)));
    assert_eq!(ingest.next_action(at(400)), read_from(150));
}

#[test]
fn a_batch_of_huge_records_is_full_before_it_has_batch_size_records() {
    let mut ingest = reading(&[P]);
    for offset in 100..102 {
        let record = record(P, offset);
        let half = |_: &mut Epochs, row: &mut Vec<u8>| {
            row.resize(row.len() + LEAST_BATCH_BYTES / 2, 0);
            Ok(())
        };
        assert!(ingest.record(at(0), record, half));
    }
    assert_eq!(flush(&mut ingest, 0).len(), 2);
}

#[test]
fn a_batch_stores_the_highest_epochs_and_those_of_the_table_count() {
    let mut ingest = reading(&[P, Q]);
    let admit = |ingest: &mut Ingest, offset, epoch| {
        let record = record(P, offset);
        let mut is_valid = false;
        ingest.record(at(0), record, |epochs, _| {
            is_valid = epochs.admit("eu", epoch).is_ok();
            Ok(())
        });
        is_valid
    };
    assert!(admit(&mut ingest, 100, 7));
    read(&mut ingest, 0, Q, 100);
    assert!(!admit(&mut ingest, 101, 6));
    let batch = flush(&mut ingest, 200);
    assert_eq!(batch.epochs, BTreeMap::from([(P, Epochs::of("eu", 7))]));
    // Another consumer has moved the position, and has seen a higher epoch.
    ingest.handle(at(200), Event::Flushed(batch, Some(Flushed::Fenced)));
    let moved = Position {
        next: NextOffset(150),
        epochs: Epochs::of("eu", 9),
    };
    assert_locates(&mut ingest, 200);
    let found = BTreeMap::from([(P, moved)])
        .into_iter()
        .chain(positions_at(&[Q], 101));
    ingest.handle(at(200), Event::Located(found.collect()));
    while !matches!(ingest.next_action(at(200)), Action::Poll { .. }) {}
    assert!(!admit(&mut ingest, 150, 8));
    assert!(admit(&mut ingest, 151, 9));
    // The highest epoch has not changed, so it does not have to be written.
    assert_eq!(flush(&mut ingest, 400).epochs, BTreeMap::new());
}

#[test]
fn retries_of_a_failing_store_become_rarer_up_to_a_bound_until_one_succeeds() {
    let mut ingest = reading(&[P]);
    read(&mut ingest, 0, P, 100);
    let mut now = 200;
    let batch = flush(&mut ingest, now);
    ingest.handle(at(now), lost(batch));
    let mut waits = Vec::new();
    for _ in 0..12 {
        let failed_at = now;
        loop {
            match ingest.next_action(at(now)) {
                Action::Ask(Request::Open) => break,
                Action::Poll { until } | Action::Hold { until } => {
                    now = until.duration_since(at(0)).as_millis() as u64;
                }
                Action::Commit(_) => {}
                action => panic!("{action:?}"),
            }
        }
        waits.push(now - failed_at);
        ingest.handle(at(now), Event::StoreFailed);
    }
    assert!((50..=110).contains(&waits[0]), "{waits:?}");
    assert!(
        waits[8..].iter().all(|wait| (5_000..=10_100).contains(wait)),
        "{waits:?}"
    );
    assert!(ingest.store_is_away());
    assert_eq!(
        ingest.unwritten(),
        1,
        "records that were read are kept during the outage"
    );
}

#[test]
fn after_a_lost_answer_the_position_shows_whether_the_rows_are_stored() {
    for (position, is_written) in [(100, false), (101, true)] {
        let mut ingest = reading(&[P]);
        read(&mut ingest, 0, P, 100);
        let batch = flush(&mut ingest, 200);
        ingest.handle(at(200), lost(batch));
        assert!(matches!(next_wait(&mut ingest, 200), Action::Poll { .. }));
        assert_eq!(ingest.next_action(at(400)), Action::Ask(Request::Open));
        ingest.handle(at(400), Event::Opened { same_layout: true });
        assert_locates(&mut ingest, 400);
        ingest.handle(at(400), Event::Located(positions_at(&[P], position)));
        assert_eq!(ingest.unwritten(), usize::from(!is_written));
        match is_written {
            false => assert_eq!(flush(&mut ingest, 400).spans[&P], span(100, 101)),
            true => {
                let commit = commit_of(101);
                assert_eq!(ingest.next_action(at(1_400)), commit);
            }
        }
    }
}

#[test]
fn a_moved_position_costs_only_the_records_of_its_partition() {
    let mut ingest = reading(&[P, Q]);
    read(&mut ingest, 0, P, 100);
    read(&mut ingest, 0, Q, 100);
    let batch = flush(&mut ingest, 200);
    read(&mut ingest, 200, P, 101);
    read(&mut ingest, 200, Q, 101);
    ingest.handle(at(200), Event::Flushed(batch, Some(Flushed::Fenced)));
    assert_locates(&mut ingest, 200);
    let positions = positions_at(&[P], 150)
        .into_iter()
        .chain(positions_at(&[Q], 100))
        .collect();
    ingest.handle(at(200), Event::Located(positions));
    assert_tells(
        &mut ingest,
        200,
        "moved the position of t/0 from 100 to 150; 2 records",
    );
    let batch = flush(&mut ingest, 200);
    assert_eq!(batch.spans, BTreeMap::from([(Q, span(100, 101))]));
    assert_eq!(ingest.next_action(at(200)), read_from(150));
}

#[test]
fn a_refused_row_is_rejected_and_the_others_are_written_with_it() {
    let mut ingest = reading(&[P]);
    read(&mut ingest, 0, P, 100);
    read(&mut ingest, 0, P, 101);
    read(&mut ingest, 0, P, 102);
    let batch = flush(&mut ingest, 200);
    let refused = Flushed::Refused(vec![(1, "refused".into()), (2, "refused".into())]);
    ingest.handle(at(200), Event::Flushed(batch, Some(refused)));
    let batch = flush(&mut ingest, 200);
    assert!(matches!(batch.entries[0].form, Form::Row(_)));
    assert_eq!(batch.entries[1].form, Form::Rejected("refused".into()));
    // A refusal that names no further row counts as a failure. Otherwise the batch would be sent again at once, for ever.
    let refused = Flushed::Refused(vec![(1, "refused".into())]);
    ingest.handle(at(200), Event::Flushed(batch, Some(refused)));
    assert!(matches!(next_wait(&mut ingest, 200), Action::Poll { .. }));
}

#[test]
fn a_revoked_partition_is_no_longer_written_committed_or_read() {
    let mut ingest = reading(&[P, Q]);
    read(&mut ingest, 0, P, 100);
    let batch = flush(&mut ingest, 200);
    read(&mut ingest, 200, P, 101);
    read(&mut ingest, 200, Q, 100);
    ingest.handle(at(200), Event::Revoked(vec![P]));
    assert!(!read(&mut ingest, 200, P, 102));
    ingest.handle(at(200), lost(batch));
    assert_eq!(ingest.next_action(at(400)), Action::Ask(Request::Open));
    ingest.handle(at(400), Event::Opened { same_layout: true });
    let batch = flush(&mut ingest, 400);
    assert_eq!(batch.spans, BTreeMap::from([(Q, span(100, 101))]));
}

#[test]
fn a_stop_writes_and_commits_first_and_takes_no_more() {
    let mut ingest = reading(&[P]);
    read(&mut ingest, 0, P, 100);
    ingest.handle(at(10), Event::Stop { deadline: at(5_000) });
    assert!(!read(&mut ingest, 10, P, 101));
    let batch = flush(&mut ingest, 10);
    assert!(matches!(ingest.next_action(at(10)), Action::Poll { .. }));
    ingest.handle(at(20), Event::Flushed(batch, Some(Flushed::Durable)));
    let commit = commit_of(101);
    assert_eq!(
        ingest.next_action(at(20)),
        commit,
        "at once, although the last commit was less than a second ago"
    );
    assert_eq!(ingest.next_action(at(20)), Action::Stop { unwritten: 0 });
}

#[test]
fn a_stop_without_the_store_ends_after_a_few_tries_and_reports_what_is_not_written() {
    let mut ingest = reading(&[P]);
    read(&mut ingest, 0, P, 100);
    read(&mut ingest, 0, P, 101);
    let batch = flush(&mut ingest, 200);
    ingest.handle(at(200), lost(batch));
    ingest.handle(at(210), Event::Stop { deadline: at(5_000) });
    for _ in 0..TRIES_DURING_STOP {
        assert_eq!(ingest.next_action(at(210)), Action::Ask(Request::Open));
        ingest.handle(at(210), Event::StoreFailed);
    }
    assert_eq!(ingest.next_action(at(210)), commit_of(100));
    assert_eq!(ingest.next_action(at(210)), Action::Stop { unwritten: 2 });
}

#[test]
fn a_stop_does_not_wait_for_a_store_that_hangs() {
    let mut ingest = reading(&[P]);
    read(&mut ingest, 0, P, 100);
    ingest.handle(at(10), Event::Stop { deadline: at(5_000) });
    flush(&mut ingest, 10);
    let mut now = 10;
    loop {
        match ingest.next_action(at(now)) {
            Action::Poll { until } => now = until.duration_since(at(0)).as_millis() as u64,
            Action::Stop { unwritten } => {
                assert_eq!((now, unwritten), (5_000, 1));
                break;
            }
            Action::Commit(_) => {}
            action => panic!("{action:?}"),
        }
    }
}

#[test]
fn commits_follow_flushes_at_most_once_a_second_and_have_all_partitions() {
    let mut ingest = reading(&[P, Q]);
    for (millis, offset) in [(100, 100), (400, 101)] {
        read(&mut ingest, millis, P, offset);
        let batch = flush(&mut ingest, millis + 200);
        ingest.handle(at(millis + 200), Event::Flushed(batch, Some(Flushed::Durable)));
    }
    assert!(matches!(ingest.next_action(at(999)), Action::Poll { .. }));
    let commits = vec![(P, NextOffset(102)), (Q, NextOffset(100))];
    assert_eq!(ingest.next_action(at(1_000)), Action::Commit(commits.clone()));
    // Once in a while they are repeated.
    assert!(matches!(ingest.next_action(at(61_999)), Action::Poll { .. }));
    assert_eq!(ingest.next_action(at(62_000)), Action::Commit(commits));
}

#[test]
fn a_partition_without_a_position_starts_at_kafkas_commit_or_beginning() {
    let mut ingest = open();
    ingest.handle(at(0), Event::Assigned(vec![P]));
    assert_locates(&mut ingest, 0);
    ingest.handle(at(0), Event::Located(BTreeMap::new()));
    assert_eq!(ingest.next_action(at(0)), Action::FindStarts(vec![P]));
    // Without an answer Kafka is asked again, but not at once.
    ingest.handle(at(0), Event::Starts(BTreeMap::new()));
    assert!(matches!(next_wait(&mut ingest, 999), Action::Poll { .. }));
    assert_eq!(ingest.next_action(at(1_000)), Action::FindStarts(vec![P]));
    ingest.handle(at(1_000), Event::Starts(starts_at(&[P], 42)));
    let locate = locate(&[P], starts_at(&[P], 42));
    assert_eq!(ingest.next_action(at(1_000)), locate);
    ingest.handle(at(1_000), Event::Located(positions_at(&[P], 42)));
    assert_eq!(ingest.next_action(at(1_000)), read_from(42));
}

#[test]
fn a_recreated_topic_is_read_from_its_beginning_and_moves_the_position_back() {
    let mut ingest = reading(&[P]);
    let extent = Extent {
        low: NextOffset(0),
        high: NextOffset(2),
    };
    ingest.handle(at(0), Event::OutOfRange);
    for millis in [0, 1_000] {
        // One answer is not enough, because the whole partition is stored again.
        assert_eq!(ingest.next_action(at(millis)), Action::FindExtents(vec![P]));
        ingest.handle(at(millis), Event::Extents(BTreeMap::from([(P, extent)])));
    }
    assert_tells(&mut ingest, 1_000, "position 100 of t/0 is beyond the end, 2,");
    assert!(matches!(next_wait(&mut ingest, 1_000), Action::Poll { .. }));
    assert_eq!(ingest.next_action(at(2_000)), read_from(0));
    assert!(read(&mut ingest, 2_000, P, 0));
    let batch = flush(&mut ingest, 2_200);
    assert_eq!(batch.spans[&P], span(100, 1));
    ingest.handle(at(2_200), Event::Flushed(batch, Some(Flushed::Durable)));
    let commit = commit_of(1);
    assert_eq!(ingest.next_action(at(2_200)), commit);
}

#[test]
fn records_deleted_by_retention_are_reported_and_those_read_before_are_written() {
    let mut ingest = reading(&[P]);
    read(&mut ingest, 0, P, 100);
    let extent = Extent {
        low: NextOffset(500),
        high: NextOffset(600),
    };
    ingest.handle(at(0), Event::OutOfRange);
    assert_eq!(ingest.next_action(at(0)), Action::FindExtents(vec![P]));
    ingest.handle(at(0), Event::Extents(BTreeMap::from([(P, extent)])));
    assert_tells(&mut ingest, 0, "the records of t/0 from 101 to 500 before");
    let batch = flush(&mut ingest, 1_000);
    assert_eq!(batch.spans[&P], span(100, 101));
    assert_eq!(ingest.next_action(at(1_000)), read_from(500));
}

#[test]
fn rows_for_other_columns_are_forgotten_and_read_again() {
    let mut ingest = reading(&[P]);
    read(&mut ingest, 0, P, 100);
    let batch = flush(&mut ingest, 200);
    ingest.handle(at(200), lost(batch));
    assert_eq!(ingest.next_action(at(400)), Action::Ask(Request::Open));
    ingest.handle(at(400), Event::Opened { same_layout: false });
    assert_tells(&mut ingest, 400, "columns changed; 1 records");
    assert_locates(&mut ingest, 400);
    ingest.handle(at(400), Event::Located(positions_at(&[P], 100)));
    assert_eq!(ingest.next_action(at(400)), read_from(100));
}

#[test]
fn another_layout_is_not_reported_if_no_record_was_read() {
    let mut ingest = reading(&[P]);
    ingest.handle(at(0), Event::StoreFailed);
    assert_eq!(ingest.next_action(at(200)), Action::Ask(Request::Open));
    ingest.handle(at(200), Event::Opened { same_layout: false });
    assert_locates(&mut ingest, 200);
}

#[test]
fn extents_that_are_missing_are_asked_for_again_after_a_second() {
    let mut ingest = reading(&[P]);
    ingest.handle(at(0), Event::OutOfRange);
    assert_eq!(ingest.next_action(at(0)), Action::FindExtents(vec![P]));
    ingest.handle(at(0), Event::Extents(BTreeMap::new()));
    assert!(matches!(next_wait(&mut ingest, 999), Action::Poll { .. }));
    assert_eq!(ingest.next_action(at(1_000)), Action::FindExtents(vec![P]));
}

#[test]
fn a_start_that_the_table_does_not_take_is_asked_for_again_after_a_second() {
    let mut ingest = open();
    ingest.handle(at(0), Event::Assigned(vec![P]));
    assert_locates(&mut ingest, 0);
    ingest.handle(at(0), Event::Located(BTreeMap::new()));
    assert_eq!(ingest.next_action(at(0)), Action::FindStarts(vec![P]));
    ingest.handle(at(0), Event::Starts(starts_at(&[P], 42)));
    assert_locates(&mut ingest, 0);
    ingest.handle(at(0), Event::Located(BTreeMap::new()));
    assert!(matches!(next_wait(&mut ingest, 999), Action::Poll { .. }));
    assert_eq!(ingest.next_action(at(1_000)), Action::FindStarts(vec![P]));
}

#[test]
fn repeated_fences_wait_before_the_next_try() {
    let mut ingest = reading(&[P]);
    read(&mut ingest, 0, P, 100);
    for _ in 0..2 {
        let batch = flush(&mut ingest, 200);
        ingest.handle(at(200), Event::Flushed(batch, Some(Flushed::Fenced)));
        match ingest.next_action(at(200)) {
            Action::Ask(Request::Locate { .. }) => {}
            Action::Poll { .. } => {
                let next = ingest.next_action(at(249));
                assert!(
                    matches!(next, Action::Poll { .. }),
                    "at least half of the first wait"
                );
                return;
            }
            action => panic!("{action:?}"),
        }
        // Nobody has moved the position.
        ingest.handle(at(200), Event::Located(positions_at(&[P], 100)));
    }
    panic!("it does not wait");
}

#[test]
fn a_stop_with_nothing_to_write_does_not_wait_for_the_store() {
    let mut ingest = reading(&[P]);
    ingest.handle(at(0), Event::StoreFailed);
    assert!(ingest.store_is_away());
    ingest.handle(at(500), Event::Stop { deadline: at(5_000) });
    assert_eq!(ingest.next_action(at(500)), commit_of(100));
    assert_eq!(ingest.next_action(at(500)), Action::Stop { unwritten: 0 });
}

#[test]
fn after_its_deadline_a_stop_writes_nothing_more() {
    let mut ingest = reading(&[P]);
    assert!(!ingest.store_is_away());
    read(&mut ingest, 0, P, 100);
    ingest.handle(at(10), Event::Stop { deadline: at(100) });
    assert_eq!(ingest.next_action(at(100)), commit_of(100));
    assert_eq!(ingest.next_action(at(100)), Action::Stop { unwritten: 1 });
}

/// Reads P from offset 100 on. Commits do not wait for the disk.
fn asynchronous() -> Ingest {
    let mut ingest = open_with(Limits {
        is_asynchronous: true,
        ..LIMITS
    });
    ingest.handle(at(0), Event::Assigned(vec![P]));
    assert_eq!(ingest.next_action(at(0)), locate(&[P], BTreeMap::new()));
    ingest.handle(at(0), Event::Located(positions_at(&[P], 100)));
    assert_eq!(ingest.next_action(at(0)), read_from(100));
    ingest
}

#[test]
fn kafka_gets_only_what_is_on_disk_for_which_one_commit_a_second_waits() {
    let mut ingest = asynchronous();
    read(&mut ingest, 0, P, 100);
    let batch = flush(&mut ingest, 200);
    assert!(batch.may_be_lost);
    ingest.handle(at(210), Event::Flushed(batch, Some(Flushed::Durable)));
    // Nothing more comes, not even a record.
    assert!(matches!(next_wait(&mut ingest, 999), Action::Poll { .. }));
    let nothing = flush(&mut ingest, 1_000);
    assert_eq!(nothing, Batch::default());
    ingest.handle(at(1_001), Event::Flushed(nothing, Some(Flushed::Durable)));
    assert_eq!(ingest.next_action(at(1_001)), commit_of(101));
    assert!(matches!(next_wait(&mut ingest, 9_000), Action::Poll { .. }));
}

#[test]
fn a_position_that_another_consumer_wrote_is_brought_to_the_disk_too() {
    let mut ingest = asynchronous();
    assert!(matches!(next_wait(&mut ingest, 999), Action::Poll { .. }));
    assert_eq!(flush(&mut ingest, 1_000), Batch::default());
}

#[test]
fn after_a_crash_that_lost_commits_reading_starts_at_the_position_that_is_left() {
    let mut ingest = asynchronous();
    for offset in [100, 101, 102] {
        read(&mut ingest, 0, P, offset);
    }
    let batch = flush(&mut ingest, 0);
    ingest.handle(at(0), Event::Flushed(batch, Some(Flushed::Durable)));
    read(&mut ingest, 0, P, 103);
    let batch = flush(&mut ingest, 200);
    ingest.handle(at(200), lost(batch));
    assert_eq!(ingest.next_action(at(400)), Action::Ask(Request::Open));
    ingest.handle(at(400), Event::Opened { same_layout: true });
    assert_eq!(ingest.next_action(at(400)), locate(&[P], BTreeMap::new()));
    ingest.handle(at(400), Event::Located(positions_at(&[P], 100)));
    assert_eq!(ingest.next_action(at(400)), read_from(100));
}

#[test]
fn a_stop_waits_for_the_disk() {
    let mut ingest = asynchronous();
    read(&mut ingest, 0, P, 100);
    let batch = flush(&mut ingest, 200);
    ingest.handle(at(200), Event::Stop { deadline: at(5_000) });
    ingest.handle(at(210), Event::Flushed(batch, Some(Flushed::Durable)));
    let nothing = flush(&mut ingest, 210);
    ingest.handle(at(220), Event::Flushed(nothing, Some(Flushed::Durable)));
    assert_eq!(ingest.next_action(at(220)), commit_of(101));
    assert_eq!(ingest.next_action(at(220)), Action::Stop { unwritten: 0 });
}

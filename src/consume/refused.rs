//! The search for the rows that the table refuses: which rows of a batch to try next.
//!
//! Pure, so that its bounds can be tested. `rows` makes the trials.

use std::ops::Range;

/// After a bad row, the next trial has this many rows. Their number doubles with each good trial, because the next bad row may
/// be near or far.
const SEARCH_ROWS: usize = 16;

/// Which rows to try next.
#[derive(Debug)]
pub(super) struct Trials {
    rows: usize,
    /// The first row that is not decided yet.
    at: usize,
    /// The end of the rows under trial, which begin at `at`.
    end: usize,
    /// There is a bad row before this one.
    suspect: Option<usize>,
    /// The rows of the trial after the next success, if there is no suspect.
    width: usize,
}

impl Trials {
    /// Starts after a COPY of all rows failed, at `line` (from 1) if the error contained it.
    pub(super) fn new(rows: usize, line: Option<usize>) -> Self {
        let mut search = Self {
            rows,
            at: 0,
            end: rows,
            suspect: None,
            width: SEARCH_ROWS,
        };
        search.narrow(line);
        search
    }

    /// The rows of the next trial, or `None` at the end.
    pub(super) fn next(&self) -> Option<Range<usize>> {
        (self.at < self.rows).then_some(self.at..self.end)
    }

    pub(super) fn good(&mut self) {
        self.at = self.end;
        match self.suspect {
            Some(suspect) if suspect > self.at => self.end = self.middle(suspect),
            _ => {
                self.suspect = None;
                self.end = self.at.saturating_add(self.width).min(self.rows);
                self.width = self.width.saturating_mul(2);
            }
        }
    }

    /// The trial failed, at `line` (from 1) if the error contained it. Returns the bad row if the trial had only that one.
    pub(super) fn bad(&mut self, line: Option<usize>) -> Option<usize> {
        if self.end - self.at > 1 {
            self.narrow(line);
            return None;
        }
        let row = self.at;
        self.at += 1;
        self.suspect = None;
        self.end = self.at.saturating_add(SEARCH_ROWS).min(self.rows);
        self.width = SEARCH_ROWS * 2;
        Some(row)
    }

    /// `at..end` failed: tries the rows before the bad line next, or the first half.
    fn narrow(&mut self, line: Option<usize>) {
        let bad = line.and_then(|line| self.at.checked_add(line)?.checked_sub(1));
        match bad.filter(|bad| (self.at..self.end).contains(bad)) {
            Some(bad) => {
                self.suspect = Some(bad + 1);
                self.end = if bad > self.at { bad } else { bad + 1 };
            }
            None => {
                self.suspect = Some(self.end);
                self.end = self.middle(self.end);
            }
        }
    }

    fn middle(&self, end: usize) -> usize {
        self.at + ((end - self.at) / 2).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches `rows` rows of which `bad` are refused, with or without the line in the error. Returns what was found
    /// and the number of trials.
    fn search(rows: usize, bad: &[usize], with_lines: bool) -> (Vec<usize>, usize) {
        let first_bad = |range: Range<usize>| bad.iter().copied().find(|row| range.contains(row));
        let line = |range: Range<usize>| {
            let row = first_bad(range.clone()).filter(|_| with_lines);
            row.map(|row| row - range.start + 1)
        };
        let mut search = Trials::new(rows, line(0..rows));
        let (mut found, mut trials) = (Vec::new(), 0);
        while let Some(range) = search.next() {
            trials += 1;
            assert!(!range.is_empty() && range.end <= rows, "{range:?}");
            if first_bad(range.clone()).is_none() {
                search.good();
            } else {
                found.extend(search.bad(line(range)));
            }
        }
        (found, trials)
    }

    #[test]
    fn one_bad_row_costs_a_bounded_number_of_trials() {
        for rows in [1, 2, 3, 100, 1_000, 100_000] {
            for bad in [0, 1, rows / 2, rows - 1] {
                let bad = bad.min(rows - 1);
                let (found, trials) = search(rows, &[bad], true);
                assert_eq!(found, [bad]);
                // The rows before it, itself, and the rest in growing steps.
                assert!(
                    trials <= 2 + rows.div_ceil(SEARCH_ROWS).ilog2() as usize + 1,
                    "{rows} {bad}: {trials}"
                );
                let (found, trials) = search(rows, &[bad], false);
                assert_eq!(found, [bad]);
                assert!(trials <= 2 * rows.ilog2() as usize + 3, "{rows} {bad}: {trials}");
            }
        }
    }

    #[test]
    fn every_bad_row_is_found_and_no_good_one_is_named() {
        fastrand::seed(4);
        for _ in 0..2_000 {
            let rows = fastrand::usize(1..400);
            let share = fastrand::f64();
            let bad: Vec<usize> = (0..rows).filter(|_| fastrand::f64() < share).collect();
            for with_lines in [true, false] {
                assert_eq!(search(rows, &bad, with_lines).0, bad);
            }
        }
    }

    #[test]
    fn a_batch_with_only_bad_rows_makes_steady_progress() {
        let bad: Vec<usize> = (0..1_000).collect();
        let (found, trials) = search(1_000, &bad, true);
        assert_eq!(found.len(), 1_000);
        assert!(trials <= 2 * 1_000, "{trials}");
    }
}

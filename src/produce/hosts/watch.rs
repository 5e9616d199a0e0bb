//! When a list of hosts has to be read again.
//!
//! Pure. Times are in microseconds, on any clock that does not go back.

/// A file that has not changed for this long is complete. A program that writes one in parts pauses for less.
const COMPLETE_AFTER: i64 = 1_000_000;

/// A table is read that often even if its version stays the same: it may have been renamed, or filled without its triggers.
const READ_EVERY: i64 = 60_000_000;

/// The content of a file: which is known, and which may still be incomplete.
#[derive(Debug, Default)]
pub struct Content {
    /// Its hash; `None`: the first one that is seen.
    known: Option<u64>,
    /// The hash of another content, and since when it has been the same.
    changed: Option<(u64, i64)>,
}

impl Content {
    pub fn new(known: Option<u64>) -> Self {
        Self { known, changed: None }
    }

    /// Takes note of the content that the file has now. True if it is new and complete; from then on it is known.
    pub fn look(&mut self, now: i64, hash: u64) -> bool {
        if *self.known.get_or_insert(hash) == hash {
            self.changed = None;
            return false;
        }
        match self.changed {
            Some((changed, since)) if changed == hash => {
                let is_complete = now - since >= COMPLETE_AFTER;
                if is_complete {
                    self.set_known(hash);
                }
                is_complete
            }
            _ => {
                self.changed = Some((hash, now));
                false
            }
        }
    }

    pub fn set_known(&mut self, hash: u64) {
        *self = Self::new(Some(hash));
    }
}

/// The version of a table: every statement that changes the hosts moves it.
#[derive(Debug, Default)]
pub struct Version {
    read: Option<(i64, i64)>,
}

impl Version {
    /// Whether the table has to be read. `None`: the version is not known.
    pub fn is_due(&self, now: i64, version: Option<i64>) -> bool {
        match (self.read, version) {
            (Some((read, read_at)), Some(version)) => version != read || now - read_at >= READ_EVERY,
            _ => true,
        }
    }

    /// The table was read, after it had this version.
    pub fn set_read(&mut self, now: i64, version: Option<i64>) {
        self.read = version.map(|version| (version, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000;

    #[test]
    fn a_file_is_read_again_when_it_has_been_the_same_for_a_second() {
        let mut content = Content::new(Some(1));
        assert!(!content.look(0, 1));
        // It grows.
        assert!(!content.look(SECOND, 2));
        assert!(!content.look(2 * SECOND, 3));
        assert!(!content.look(3 * SECOND - 1, 3));
        assert!(content.look(3 * SECOND, 3));
        assert!(!content.look(4 * SECOND, 3));
        // It changes for a moment only, for example while it is replaced.
        assert!(!content.look(5 * SECOND, 4));
        assert!(!content.look(6 * SECOND, 3));
        assert!(!content.look(7 * SECOND, 4));
        assert!(content.look(8 * SECOND, 4));
    }

    #[test]
    fn the_first_content_is_known_if_no_other_one_is() {
        let mut content = Content::new(None);
        assert!(!content.look(0, 1));
        assert!(!content.look(9 * SECOND, 1));
        content.set_known(2);
        assert!(!content.look(10 * SECOND, 2));
    }

    #[test]
    fn a_table_is_read_when_its_version_moves_and_once_a_minute() {
        let mut version = Version::default();
        assert!(version.is_due(0, Some(7)));
        version.set_read(0, Some(7));
        assert!(!version.is_due(SECOND, Some(7)));
        assert!(version.is_due(SECOND, Some(8)));
        // A restored backup may go back.
        assert!(version.is_due(SECOND, Some(6)));
        assert!(version.is_due(60 * SECOND, Some(7)));
        assert!(version.is_due(SECOND, None));
        version.set_read(SECOND, None);
        assert!(version.is_due(SECOND, Some(7)));
    }
}

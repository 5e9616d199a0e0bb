//! Checks the deadline of a search now and then, because reading the clock at each byte would take longer than the search.

/// The deadline passed before the end of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadlinePassed;

/// Checks the deadline after a number of bytes.
pub(super) struct DeadlineWatch<F> {
    is_late: F,
    bytes_left: usize,
    bytes_per_deadline_check: usize,
}

impl<F: Fn() -> bool> DeadlineWatch<F> {
    pub(super) fn new(is_late: F, bytes_per_deadline_check: usize) -> Self {
        Self {
            is_late,
            bytes_left: bytes_per_deadline_check,
            bytes_per_deadline_check,
        }
    }

    #[inline]
    pub(super) fn spend(&mut self, bytes: usize) -> Result<(), DeadlinePassed> {
        self.bytes_left = self.bytes_left.saturating_sub(bytes);
        if self.bytes_left > 0 {
            return Ok(());
        }
        self.bytes_left = self.bytes_per_deadline_check;
        self.check()
    }

    pub(super) fn check(&self) -> Result<(), DeadlinePassed> {
        if (self.is_late)() {
            Err(DeadlinePassed)
        } else {
            Ok(())
        }
    }
}

//! Locks a mutex whose value a panic of another thread cannot leave half changed.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Also after a panic of another thread.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

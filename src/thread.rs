//! Starts threads. Each has a name, which a debugger and a panic's message show.

use std::io;
use std::thread::{Builder, JoinHandle};

pub(crate) fn start_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name.into()).spawn(work)
}

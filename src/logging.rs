//! Where log lines go and what they look like: one line per fact, `2026-01-31T12:00:00.000Z [INFO] flush rows=500`.

use std::io::{self, LineWriter, Write};

use log::{LevelFilter, SetLoggerError};
use simplelog::{ConfigBuilder, WriteLogger, format_description};

/// Logs to standard error from now on.
///
/// # Errors
/// A logger was started before.
pub fn start(level: LevelFilter) -> Result<(), SetLoggerError> {
    start_to(level, io::stderr())
}

/// Logs to `sink` from now on.
///
/// # Errors
/// A logger was started before.
pub fn start_to(level: LevelFilter, sink: impl Write + Send + 'static) -> Result<(), SetLoggerError> {
    let config = ConfigBuilder::new()
        .set_time_format_custom(format_description!(
            "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z"
        ))
        .set_thread_level(LevelFilter::Off)
        .set_target_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off)
        // Libraries tell at DEBUG what nobody here can act on, and at TRACE what goes over the wire.
        .add_filter_allow_str("host_metrics")
        .add_filter_allow_str("librdkafka")
        .build();
    // A line is one write: lines of several processes into one pipe do not mix.
    WriteLogger::init(level, config, LineWriter::new(sink))
}

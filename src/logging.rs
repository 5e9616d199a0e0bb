//! The format of log lines, `2026-01-31T12:00:00.000Z [INFO] flush rows=500`, and where they go.
//!
//! A line may quote text from a server, so control and hidden characters are removed from every line.

use std::io::{self, LineWriter, Write};

use log::{LevelFilter, Log, Metadata, Record, SetLoggerError};
use simplelog::{ConfigBuilder, WriteLogger, format_description};

use crate::terminal;

/// Logs to standard error from now on.
pub fn start(level: LevelFilter) -> Result<(), SetLoggerError> {
    start_to(level, io::stderr())
}

/// Logs to `sink` from now on.
pub fn start_to(level: LevelFilter, sink: impl Write + Send + 'static) -> Result<(), SetLoggerError> {
    let config = ConfigBuilder::new()
        .set_time_format_custom(format_description!(
            "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z"
        ))
        .set_thread_level(LevelFilter::Off)
        .set_target_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off)
        .build();
    // A line is one write, so that the lines of several processes into one pipe do not mix.
    let lines = WriteLogger::new(level, config, LineWriter::new(sink));
    log::set_boxed_logger(Box::new(Plain(lines)))?;
    log::set_max_level(level);
    Ok(())
}

/// The sources whose lines are logged. The lines of other libraries, at DEBUG and TRACE, help no operator.
const TARGETS: [&str; 2] = ["host_metrics", "librdkafka"];

struct Plain<L>(L);

impl<L: Log> Log for Plain<L> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let is_wanted = TARGETS.iter().any(|target| metadata.target().starts_with(target));
        is_wanted && self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        // Checked before the text is formatted, because tokio-postgres logs every parameter of a statement, which can be
        // megabytes.
        if self.enabled(record.metadata()) {
            let text = record.args().to_string();
            let text = terminal::plain_lines(&text);
            let metadata = record.metadata().clone();
            let mut plain = Record::builder();
            self.0
                .log(&plain.metadata(metadata).args(format_args!("{text}")).build());
        }
    }

    fn flush(&self) {
        self.0.flush();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use crate::lock::lock;

    use super::*;

    #[derive(Default)]
    struct Kept(Arc<Mutex<String>>);

    impl Log for Kept {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            metadata.level() <= LevelFilter::Info
        }

        fn log(&self, record: &Record<'_>) {
            let mut kept = lock(&self.0);
            *kept += &record.args().to_string();
        }

        fn flush(&self) {}
    }

    #[test]
    fn a_log_line_has_no_hidden_characters() {
        let kept = Kept::default();
        let text = Arc::clone(&kept.0);
        let logger = Plain(kept);
        for level in [log::Level::Info, log::Level::Debug] {
            let text = "the server says \u{202e}\u{1b}[2J\nand more";
            logger.log(
                &Record::builder()
                    .level(level)
                    .target("host_metrics::consume")
                    .args(format_args!("{text}"))
                    .build(),
            );
        }
        let text = lock(&text);
        assert_eq!(*text, "the server says   [2J\nand more");
    }

    #[test]
    fn what_a_library_logs_is_not_even_formatted() {
        struct Formatted;
        impl std::fmt::Display for Formatted {
            fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                panic!("formatted")
            }
        }
        let mut record = Record::builder();
        record.level(log::Level::Info).target("tokio_postgres::query");
        Plain(Kept::default()).log(&record.args(format_args!("{Formatted}")).build());
    }
}

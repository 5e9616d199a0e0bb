//! What `demo` and `status --watch` draw on a terminal or print elsewhere, and the log lines that are held back meanwhile.

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex};

use anstream::adapter::strip_str;
use anstream::{AutoStream, ColorChoice};
use terminal_size::{Height, Width, terminal_size};

use crate::lock::lock;
use crate::terminal::plain_lines;

/// The size if there is no terminal, or if it does not report its size. Lines in a file may be long.
const DEFAULT_WIDTH: usize = 160;
const DEFAULT_HEIGHT: usize = 50;

/// How many log lines are kept for the end: about a hundred.
const MAX_NOTICES_BYTES: usize = 16 * 1024;

/// Whether a picture can replace the one before it: on a terminal that knows more than lines of text.
pub fn can_redraw(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Writes plain lines and, on a terminal, a picture that replaces the one before.
pub(super) struct Screen {
    is_terminal: bool,
    has_colours: bool,
    drawn_lines: usize,
}

impl Screen {
    pub(super) fn new() -> Self {
        Self {
            is_terminal: can_redraw(&io::stdout()),
            has_colours: AutoStream::choice(&io::stdout()) != ColorChoice::Never,
            drawn_lines: 0,
        }
    }

    pub(super) fn is_terminal(&self) -> bool {
        self.is_terminal
    }

    pub(super) fn width(&self) -> usize {
        self.size().0
    }

    /// The most lines of a picture that does not scroll.
    pub(super) fn height(&self) -> usize {
        self.size().1.saturating_sub(1).max(1)
    }

    /// Writes text that stays.
    pub(super) fn print(&mut self, text: &str) -> io::Result<()> {
        self.drawn_lines = 0;
        let mut out = anstream::stdout().lock();
        writeln!(out, "{text}")?;
        out.flush()
    }

    /// Draws a picture in place of the last one.
    pub(super) fn draw(&mut self, lines: &[String]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        // ECMA-48: move up, erase to the end of the line, erase to the end of the screen. One write avoids flicker.
        let mut picture = String::from("\r");
        if self.drawn_lines > 0 {
            picture.push_str(&format!("\x1b[{}A", self.drawn_lines));
        }
        for line in lines {
            match self.has_colours {
                true => picture.push_str(line),
                false => picture.extend(strip_str(line)),
            }
            picture.push_str("\x1b[K\n");
        }
        picture.push_str("\x1b[J");
        self.drawn_lines = lines.len();
        out.write_all(picture.as_bytes())?;
        out.flush()
    }

    fn size(&self) -> (usize, usize) {
        terminal_size().filter(|_| self.is_terminal).map_or(
            (DEFAULT_WIDTH, DEFAULT_HEIGHT),
            |(Width(width), Height(height))| (width.into(), height.into()),
        )
    }
}

/// The lines that fit in `height`, the last one with the number of the others.
pub(super) fn first_lines(mut lines: Vec<String>, height: usize) -> Vec<String> {
    if lines.len() > height {
        let shown = height.saturating_sub(1);
        let more = lines.len() - shown;
        lines.truncate(shown);
        lines.push(format!("… {more} more lines"));
    }
    lines
}

/// The last log lines of the agents. On a terminal they would disturb the live table, so only the newest is shown below it, and
/// all of them are printed at the end.
#[derive(Clone, Default)]
pub(super) struct Notices(Arc<Mutex<String>>);

impl Notices {
    pub(super) fn newest(&self) -> Option<String> {
        self.text().lines().next_back().map(str::to_owned)
    }

    pub(super) fn text(&self) -> String {
        lock(&self.0).clone()
    }
}

impl Write for Notices {
    /// The logger writes whole lines.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut text = lock(&self.0);
        // A line may quote an address with escapes, which must not reach the terminal.
        text.push_str(&plain_lines(&String::from_utf8_lossy(bytes)));
        while text.len() > MAX_NOTICES_BYTES {
            let first = text.find('\n').map_or(text.len(), |end| end + 1);
            text.drain(..first);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_not_higher_than_the_terminal() {
        let lines = |height| first_lines(["a", "b", "c"].map(str::to_owned).to_vec(), height);
        assert_eq!(lines(3), ["a", "b", "c"]);
        assert_eq!(lines(2), ["a", "… 2 more lines"]);
        assert_eq!(lines(1), ["… 3 more lines"]);
    }

    #[test]
    fn the_last_notices_are_kept_without_control_characters() {
        let mut notices = Notices::default();
        assert_eq!(notices.newest(), None);
        writeln!(notices, "one \x1b[31mred").unwrap();
        assert_eq!(notices.newest().as_deref(), Some("one  [31mred"));
        for number in 0..MAX_NOTICES_BYTES {
            writeln!(notices, "line {number}").unwrap();
        }
        let text = notices.text();
        assert!(
            text.len() <= MAX_NOTICES_BYTES && text.starts_with("line "),
            "{text}"
        );
    }
}

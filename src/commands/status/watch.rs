//! `--watch`: the answer again and again, on a terminal in place of the last one.

use std::io;
use std::time::Duration;

use crate::clock::instant_now;
use crate::commands::screen::{Screen, first_lines};
use crate::shutdown::{Shutdown, Wake};
use crate::terminal::plain;

const EVERY: Duration = Duration::from_secs(2);

/// Shows `answer` until a signal arrives or the reader of standard output closes it. After the first answer, an error is shown in
/// its place.
pub fn watch(shutdown: &Shutdown, mut answer: impl FnMut() -> anyhow::Result<String>) -> anyhow::Result<()> {
    let mut screen = Screen::new();
    let mut text = answer()?;
    loop {
        let shown = match screen.is_terminal() {
            // An answer with more lines than the terminal would scroll.
            true => {
                let lines = text.lines().map(str::to_owned).collect();
                screen.draw(&first_lines(lines, screen.height()))
            }
            false => screen.print(&text),
        };
        match shown {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            shown => shown?,
        }
        let due = instant_now() + EVERY;
        while let wake @ (Wake::Stop | Wake::Reload) = shutdown.wait_until(due) {
            if wake == Wake::Stop {
                return Ok(());
            }
        }
        text = answer().unwrap_or_else(|error| plain(&format!("error: {error:#}")));
    }
}

//! The host file: lines in, targets out, or every error with its line, column and caret.
//!
//! `parse` reads a whole file and owns what needs all of it, such as an address given twice. Its parts are a file each:
//! `words` splits a line, `address`, `options` and `regexes` read the words, `slips` finds lines that are probably not
//! what their author meant, `report` prints what is wrong. All of them are pure, except `read`, which gets the bytes.

mod address;
mod fault;
mod options;
mod parse;
mod quote;
mod read;
mod regexes;
mod report;
mod slips;
mod words;

pub use fault::HostFileError;
pub use parse::{Hosts, parse, target};
pub use read::{is_stdin, read};

//! The host file: lines in, targets out, or every error with its line, column and caret.
//!
//! `parse` reads a whole file and owns what needs all of it, such as an address given twice. Its parts are a file each:
//! `words` splits a line, `address`, `options`, `request` and `regexes` read the words, `profiles` has the options that several lines
//! share, `slips` finds lines that are probably not what their author meant, and `report` prints what is wrong. All of them are pure,
//! except `read`, which gets the bytes, and `files`, which gets secrets and bodies.

mod address;
mod files;
mod options;
mod parse;
mod profiles;
mod quote;
mod read;
mod regexes;
mod report;
mod request;
mod slips;
mod words;

pub use files::Files;
pub use options::OPTION_NAMES;
pub use parse::{Hosts, parse, parse_with, target, target_with};
pub use read::{contents, is_stdin, parse_contents, read};
pub use report::HostFileError;
pub use words::columns;

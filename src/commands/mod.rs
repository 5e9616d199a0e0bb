//! The commands that do one thing and end. Each has a file or directory with its name.

pub mod audit;
pub mod check;
pub mod demo;
pub mod hosts;
pub mod init;
pub mod page;
pub mod screen;
pub mod skip;
pub mod status;
pub mod tail;
pub mod validate;

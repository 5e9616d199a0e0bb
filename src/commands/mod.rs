//! The commands that do one thing and end, a file or a folder each, named after the command.

pub mod check;
pub mod demo;
pub mod init;
pub mod skip;
pub mod status;
pub mod validate;

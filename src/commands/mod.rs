//! The commands other than `produce` and `consume`, a file or directory each; `drop` is in `init`. [`screen`] is what `demo` and
//! `status --watch` draw on.

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

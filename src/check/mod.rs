//! One check of one host, whatever it is: what is asked for, what was seen, and what that means.
//!
//! `target`, `pattern` and `outcome` are pure. [`http`] is the one kind of check there is; `resolver`, `tls`, `progress` and `fault`
//! are what others would use too.

pub mod fault;
pub mod http;
pub mod outcome;
pub mod pattern;
mod progress;
pub mod resolver;
mod socket;
pub mod target;
mod tls;

//! One check of one host, whatever it is: what is asked for, what was seen, and what that means.
//!
//! `target`, `pattern` and `outcome` are pure. [`http`] is the one kind of check there is; `resolver`, `tls`,
//! `certificates`, `progress` and `fault` are what others would use too.

mod certificates;
pub mod fault;
pub mod http;
pub mod outcome;
mod p521;
pub mod pattern;
mod progress;
pub mod resolver;
mod socket;
pub mod target;
mod tls;
mod tls_fault;

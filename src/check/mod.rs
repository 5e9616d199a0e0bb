//! One check of one host: what is checked, what the check observed, and what went wrong.
//!
//! [`http`] is the only kind of check. The other files could serve further kinds as well. `target`, `pattern`, `json`
//! and `observation` are pure.

mod chain_verifier;
pub mod details;
pub mod fault;
pub mod http;
pub mod json;
pub mod observation;
mod p521;
pub mod pattern;
mod progress;
pub mod resolver;
pub mod secret;
pub mod target;
mod tls;
mod tls_fault;

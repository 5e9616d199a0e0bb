//! The wire: one [`Sample`] is the value of one Kafka record, a JSON object.
//!
//! Owns the record's format in both directions: [`encode`] for `produce`, [`decode`] for `consume`, and the rules that
//! readers hold a record to. Of Postgres it only knows what a column cannot hold: a NUL, or a number that is too large. What
//! [`encode`] writes is also described for other programs, in `schema/sample.v1.json`.

mod decode;
mod encode;
pub mod epoch;
mod outcome;
mod record;
mod shortcut;
mod timestamp;

pub use decode::{Rejection, decode};
pub use encode::encode;
pub use outcome::Outcome;
pub use record::{Field, MAX_ADDRESS_BYTES, Sample, VERSION};
pub use timestamp::{Timestamp, TimestampError};

//! A record's value is either a sample or rejected, and a sample survives being written and read again.

#![no_main]

use host_metrics::sample::{decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|value: &[u8]| {
    let Ok(sample) = decode(value) else { return };
    let mut written = Vec::new();
    encode(&sample, &mut written);
    let again = decode(&written).expect("what is written can be read");
    // Writing rounds durations to microseconds, once.
    let mut twice = Vec::new();
    encode(&again, &mut twice);
    assert_eq!(written, twice);
});

//! Whatever happens to consumers, in whatever order, every record is stored once: the simulator with the fuzzer's choices.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[expect(dead_code, unused_imports, reason = "the tests run histories from seeds")]
#[path = "../../tests/it/simulator.rs"]
mod simulator;

fuzz_target!(|bytes: &[u8]| simulator::History::run_bytes(bytes));

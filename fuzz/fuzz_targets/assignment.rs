//! What a member of the group says that it owns is bytes of another program: reading them ends, in bounded memory.

#![no_main]

use std::collections::BTreeSet;

use host_metrics::kafka::group::Watch;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|assignment: &[u8]| {
    let all = BTreeSet::from([("a".to_owned(), 0), ("a".to_owned(), 1)]);
    let mut watch = Watch::default();
    watch.look(&all, [assignment]);
    if let Some(missing) = watch.look(&all, [assignment]) {
        assert!(!missing.is_empty() && missing.is_subset(&all));
    }
});

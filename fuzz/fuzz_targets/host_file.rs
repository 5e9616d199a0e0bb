//! A host file is either targets or errors, and what `validate` prints of a target means the same target again.

#![no_main]

use host_metrics::check::target::Target;
use host_metrics::produce::host_file::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|contents: &[u8]| {
    match parse("hosts", contents) {
        Ok(hosts) => {
            let targets = hosts.targets;
            assert!(!targets.is_empty());
            let printed: String = targets.iter().map(|target| format!("{target}\n")).collect();
            let again = parse("hosts", printed.as_bytes()).expect("what is printed can be read");
            assert_eq!(shown(&targets), shown(&again.targets));
        }
        Err(error) => assert!(error.to_string().starts_with("hosts:")),
    }
});

fn shown(targets: &[Target]) -> Vec<String> {
    targets.iter().map(|target| format!("{target:?}")).collect()
}

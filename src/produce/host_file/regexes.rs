//! Compiles the regexes of a host file, within a limit of memory.

use std::collections::HashMap;
use std::sync::Arc;

use super::report::LineFault;
use crate::check::pattern::Pattern;

/// The longest text of a REGEX. A longer one means that the file is not a host file.
pub(super) const MAX_REGEX_BYTES: usize = 16 << 10;

/// The memory that all compiled regexes of a file may take: 40 of the largest kind, or many thousands of usual ones.
const MAX_COMPILED_BYTES_OF_A_FILE: usize = 64 << 20;

/// The compiled regexes: one for each text, however many lines use it.
#[derive(Default)]
pub(super) struct Regexes<'a> {
    compiled: HashMap<&'a str, Arc<Pattern>>,
    bytes: usize,
}

impl<'a> Regexes<'a> {
    pub(super) fn compile(&mut self, text: &'a str) -> Result<Arc<Pattern>, LineFault> {
        if let Some(pattern) = self.compiled.get(text) {
            return Ok(Arc::clone(pattern));
        }
        // Checked before compiling too, because that takes time.
        self.check_memory()?;
        let pattern = compile(text)?;
        self.bytes += pattern.compiled_bytes();
        self.check_memory()?;
        self.compiled.insert(text, Arc::clone(&pattern));
        Ok(pattern)
    }

    fn check_memory(&self) -> Result<(), LineFault> {
        if self.bytes <= MAX_COMPILED_BYTES_OF_A_FILE {
            return Ok(());
        }
        let what = format!(
            "the compiled regexes of the file, up to this one, take more than {} MiB; use the same REGEX on several lines, \
             which is stored once, or smaller ones: `(?-u:\\w)` and `[0-9]` take a hundredth of `\\w` and `\\d`, which \
             include all of Unicode",
            MAX_COMPILED_BYTES_OF_A_FILE >> 20
        );
        Err(LineFault::new(0, what))
    }
}

pub(super) fn compile(text: &str) -> Result<Arc<Pattern>, LineFault> {
    if text.len() > MAX_REGEX_BYTES {
        let what = format!(
            "the REGEX is {} bytes long; the limit is {MAX_REGEX_BYTES}",
            text.len()
        );
        return Err(LineFault::new(0, what));
    }
    Pattern::new(text).map(Arc::new).map_err(|error| {
        let why = error.why.split_whitespace().collect::<Vec<_>>().join(" ");
        LineFault::new(error.at, format!("the REGEX is not valid: {why}"))
    })
}

//! Everything that is wrong with the variables, collected; and the readers that make a value of one variable or say
//! what is wrong with it.
//!
//! A reader returns `None` both for an unset and for a wrong variable: the caller goes on with a default and finds the
//! next problem; [`Problems::finish`] then throws the half-right configuration away.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::{Secret, WrongInput, pem};
use crate::duration;

/// How much of a wrong value is shown.
const MAX_SHOWN_CHARS: usize = 100;

/// Whole bundles of certificate authorities have some 250 KB.
const MAX_PEM_BYTES: u64 = 4 << 20;

const MAX_SECRET_BYTES: u64 = 64 << 10;

/// One line each.
#[derive(Clone, Default)]
pub(super) struct Problems(Vec<String>);

/// A variable and what it came with.
#[derive(Clone, Copy)]
pub(super) struct Variable<'a> {
    pub name: &'static str,
    pub value: Option<&'a str>,
}

impl<'a> Variable<'a> {
    pub fn new(name: &'static str, value: &'a Option<String>) -> Self {
        Self {
            name,
            value: value.as_deref(),
        }
    }
}

impl Problems {
    pub fn push(&mut self, problem: String) {
        self.0.push(problem);
    }

    /// # Errors
    /// There were problems: all of them.
    pub fn finish<T>(self, config: T) -> Result<T, WrongInput> {
        match self.0.as_slice() {
            [] => Ok(config),
            problems => Err(WrongInput(problems.join("\n"))),
        }
    }

    pub fn wrong(&mut self, variable: Variable<'_>, expected: impl Display) {
        let Variable { name, value } = variable;
        self.push(match value {
            Some(value) => format!("{name}={}: expected {expected}", shown(value)),
            None => format!("{name} is not set: expected {expected}; set it in the environment, in .env or by -e {name}=VALUE"),
        });
    }

    /// What `read` makes of the value, if it can.
    pub fn read<T>(
        &mut self,
        variable: Variable<'_>,
        expected: impl Display,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let read = read(variable.value?);
        if read.is_none() {
            self.wrong(variable, expected);
        }
        read
    }

    pub fn number<T>(&mut self, variable: Variable<'_>, bounds: RangeInclusive<T>, default: T) -> T
    where
        T: FromStr + PartialOrd + Display,
    {
        let expected = format!(
            "a whole number from {} to {}; correct it, or leave it unset for {default}",
            bounds.start(),
            bounds.end()
        );
        // `FromStr` takes a plus sign too.
        let digits = |text: &&str| text.bytes().all(|byte| byte.is_ascii_digit());
        self.read(variable, expected, |text| {
            Some(text)
                .filter(digits)?
                .parse()
                .ok()
                .filter(|number| bounds.contains(number))
        })
        .unwrap_or(default)
    }

    pub fn duration(
        &mut self,
        variable: Variable<'_>,
        bounds: RangeInclusive<Duration>,
        example: &str,
    ) -> Option<Duration> {
        let expected = format!(
            "a whole number with {}, from {} to {}, e.g. {example}",
            duration::UNITS,
            duration::text(*bounds.start()),
            duration::text(*bounds.end())
        );
        self.read(variable, expected, |text| {
            duration::parse(text).filter(|duration| bounds.contains(duration))
        })
    }

    /// One line of text.
    pub fn line(&mut self, variable: Variable<'_>, max_bytes: usize) -> Option<String> {
        let expected = format!("one line without control characters, {max_bytes} bytes at most");
        self.read(variable, expected, |text| {
            is_line(text, max_bytes).then(|| text.to_owned())
        })
    }

    /// The value, or a problem and nothing where it is not set.
    pub fn required(
        &mut self,
        variable: Variable<'_>,
        expected: &str,
        is_fit: impl FnOnce(&str) -> bool,
    ) -> String {
        match variable.value {
            Some(value) if is_fit(value) => value.to_owned(),
            _ => {
                self.wrong(variable, expected);
                String::new()
            }
        }
    }

    /// A readable file with a PEM block of this kind.
    pub fn pem_file(&mut self, variable: Variable<'_>, kind: PemKind) -> Option<PathBuf> {
        let Variable { name, value } = variable;
        let path = PathBuf::from(value?);
        let contents = match read_file(&path, MAX_PEM_BYTES) {
            Ok(contents) => contents,
            Err(error) => {
                self.push(format!(
                    "{name}={path:?}: cannot read the file: {error}; correct the path or the file's permissions"
                ));
                return None;
            }
        };
        let fault = match kind {
            PemKind::Certificate => pem::certificates(&contents).err(),
            PemKind::PrivateKey => pem::private_key_fault(&contents),
        };
        if let Some(fault) = fault {
            self.push(format!(
                "{name}={path:?}: {fault}; expected a PEM file with a {}",
                kind.text()
            ));
        }
        Some(path)
    }

    /// A secret, given as it is or in a file (one line end at its end does not count).
    pub fn secret(&mut self, variable: Variable<'_>, file: Variable<'_>) -> Option<Secret> {
        let text = match (variable.value, file.value) {
            (Some(_), Some(_)) => {
                self.push(format!(
                    "{} and {} are both set: unset one of them",
                    variable.name, file.name
                ));
                return None;
            }
            (Some(text), None) => text.to_owned(),
            (None, Some(path)) => self.secret_file(file.name, Path::new(path))?,
            (None, None) => return None,
        };
        if text.contains('\0') {
            self.push(format!("{}=***: expected text without NUL", variable.name));
        }
        Some(Secret::new(text))
    }

    fn secret_file(&mut self, name: &str, path: &Path) -> Option<String> {
        let problem = match read_file(path, MAX_SECRET_BYTES).map(String::from_utf8) {
            Ok(Ok(text)) => {
                let text = text.strip_suffix('\n').unwrap_or(&text);
                let text = text.strip_suffix('\r').unwrap_or(text);
                if !text.is_empty() {
                    return Some(text.to_owned());
                }
                "the file is empty".to_owned()
            }
            Ok(Err(_)) => "the file is not UTF-8".to_owned(),
            Err(error) => format!("cannot read the file: {error}"),
        };
        self.push(format!(
            "{name}={path:?}: {problem}; expected a file that holds the value and nothing else"
        ));
        None
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PemKind {
    Certificate,
    PrivateKey,
}

impl PemKind {
    fn text(self) -> &'static str {
        match self {
            Self::Certificate => "certificate (-----BEGIN CERTIFICATE-----)",
            Self::PrivateKey => "private key (-----BEGIN PRIVATE KEY-----)",
        }
    }
}

pub(super) fn is_line(text: &str, max_bytes: usize) -> bool {
    text.len() <= max_bytes && !text.contains(char::is_control)
}

fn shown(value: &str) -> String {
    match value.char_indices().nth(MAX_SHOWN_CHARS) {
        Some((end, _)) => format!("{:?}…", &value[..end]),
        None => format!("{value:?}"),
    }
}

fn read_file(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    // Opening a pipe would wait for its writer, and whoever reads the file after us would find it empty.
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut contents = Vec::new();
    File::open(path)?.take(max_bytes + 1).read_to_end(&mut contents)?;
    if contents.len() as u64 > max_bytes {
        return Err(io::Error::other(format!("it is longer than {max_bytes} bytes")));
    }
    Ok(contents)
}

//! The reader that turns variables into values and collects everything that is wrong with them.
//!
//! A read returns `None` for an unset and for a wrong variable. In both cases the caller continues with a default, so that the
//! next problem is found too. If there are problems, [`Reader::finish`] returns them instead of the configuration.

use std::fmt::Display;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::form::{host_and_port, is_plain_line, is_quoted, port, slip};
use super::pem;
use super::problem::{Problem, WrongVariables};
use super::secret::{Secret, shown, shown_path};
use super::variables::Variables;
use crate::{duration, files};

/// A system's bundle of certificate authorities has about 250 KB.
const MAX_PEM_BYTES: u64 = 4 << 20;

/// Far above any password or list of logins.
const MAX_SECRET_BYTES: u64 = 64 << 10;

const SECRETS: [&str; 2] = ["DB_PASSWORD", "KAFKA_SASL_PASSWORD"];

/// Reads variables and collects their problems.
pub(super) struct Reader<'a> {
    variables: &'a Variables,
    problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(variables: &'a Variables) -> Self {
        let problems = variables.problems.clone();
        Self { variables, problems }
    }

    pub(super) fn get(&self, name: &str) -> Option<&'a str> {
        self.variables.get(name)
    }

    pub(super) fn is_set(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    pub(super) fn push(&mut self, problem: Problem) {
        self.problems.push(problem);
    }

    pub(super) fn conflict(&mut self, name: &'static str, what: String) {
        self.push(Problem::Conflict { name, what });
    }

    pub(super) fn finish<T>(self, config: T) -> Result<T, WrongVariables> {
        match self.problems.is_empty() {
            true => Ok(config),
            false => Err(WrongVariables(self.problems)),
        }
    }

    /// The address in a variable. `example` shows a right one.
    pub(super) fn socket_addr(&mut self, name: &'static str, example: &str) -> Option<SocketAddr> {
        let text = self.get(name)?;
        let address = text.parse().ok();
        if address.is_none() {
            let expected = format!("an IP address and a port, e.g. {example}");
            self.wrong(name, expected, socket_addr_remedy(text));
        }
        address
    }

    /// Adds a problem. `remedy` is what to do about this variable in particular; without it, a mistake that any variable can
    /// have, such as quotes around the value, is named.
    pub(super) fn wrong(&mut self, name: &'static str, expected: impl Display, remedy: Option<String>) {
        let expected = expected.to_string();
        self.push(match self.get(name) {
            None => Problem::NotSet { name, expected },
            Some(value) => Problem::Wrong {
                name,
                value: self.shown(value),
                expected,
                remedy: remedy.or(slip(value).map(str::to_owned)).unwrap_or_default(),
            },
        });
    }

    /// The value without anything that may be a secret, and without the known secrets.
    fn shown(&self, value: &str) -> String {
        let secrets = SECRETS.into_iter().filter_map(|name| self.get(name));
        // A shorter secret is part of many words, and hiding it would make the message useless.
        let secrets = secrets.filter(|secret| secret.len() >= 6);
        shown(&secrets.fold(value.to_owned(), |text, secret| text.replace(secret, "***")))
    }

    /// As [`Self::wrong`], for a value that contains a secret.
    pub(super) fn wrong_secret(&mut self, name: &'static str, expected: &str, remedy: String) {
        self.push(Problem::Wrong {
            name,
            value: "***".to_owned(),
            expected: expected.to_owned(),
            remedy,
        });
    }

    /// The result of `read` for the value; a problem if there is none.
    pub(super) fn read<T>(
        &mut self,
        name: &'static str,
        expected: impl Display,
        read: impl FnOnce(&'a str) -> Option<T>,
    ) -> Option<T> {
        let read = read(self.get(name)?);
        if read.is_none() {
            self.wrong(name, expected, None);
        }
        read
    }

    /// The value; a problem and an empty text if it is not set or not right.
    pub(super) fn required(
        &mut self,
        name: &'static str,
        expected: &str,
        is_right: impl FnOnce(&str) -> bool,
    ) -> String {
        match self.get(name) {
            Some(value) if is_right(value) => value.to_owned(),
            _ => {
                self.wrong(name, expected, None);
                String::new()
            }
        }
    }

    pub(super) fn number<T>(&mut self, name: &'static str, bounds: RangeInclusive<T>, default: T) -> T
    where
        T: FromStr + PartialOrd + Display,
    {
        let expected = format!(
            "a whole number from {} to {}; correct it, or leave it unset for {default}",
            bounds.start(),
            bounds.end()
        );
        // `FromStr` accepts a plus sign too.
        let digits = |text: &&str| text.bytes().all(|byte| byte.is_ascii_digit());
        self.read(name, expected, |text| {
            Some(text)
                .filter(digits)?
                .parse()
                .ok()
                .filter(|number| bounds.contains(number))
        })
        .unwrap_or(default)
    }

    /// `on` or `off`; `on` unless it is set.
    pub(super) fn switch(&mut self, name: &'static str) -> bool {
        let is_on = self.read(name, "on or off", |text| match text {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        });
        is_on.unwrap_or(true)
    }

    pub(super) fn duration(
        &mut self,
        name: &'static str,
        bounds: RangeInclusive<Duration>,
        example: &str,
    ) -> Option<Duration> {
        let expected = format!(
            "a whole number with {}, from {} to {}, e.g. {example}",
            duration::UNITS,
            duration::text(*bounds.start()),
            duration::text(*bounds.end())
        );
        self.read(name, expected, |text| {
            duration::parse(text).filter(|duration| bounds.contains(duration))
        })
    }

    /// One line of text.
    pub(super) fn line(&mut self, name: &'static str, max_bytes: usize) -> Option<String> {
        let expected = format!(
            "one line of at most {max_bytes} bytes, without control characters, and without spaces or quotes around it"
        );
        self.read(name, expected, |text| {
            is_plain_line(text, max_bytes).then(|| text.to_owned())
        })
    }

    /// The path of a readable file with a PEM block of this kind.
    pub(super) fn pem_file(&mut self, name: &'static str, kind: PemKind) -> Option<PathBuf> {
        let path = PathBuf::from(self.get(name)?);
        let problem = match files::read(&path, MAX_PEM_BYTES) {
            Ok(contents) => match kind.problem(&contents) {
                Some(problem) => problem,
                None => return Some(path),
            },
            Err(error) => {
                let remedy = match slip(self.get(name)?) {
                    Some(slip) => slip,
                    None if path.starts_with("~") => "`~` is not expanded here: write the whole path",
                    None => "correct the path or the file's permissions",
                };
                format!("cannot read the file: {error}; {remedy}")
            }
        };
        self.push(Problem::File {
            name,
            path: self.shown(self.get(name)?),
            what: problem,
        });
        None
    }

    /// A secret from a variable or from a file, without one line break at the end of the file.
    pub(super) fn secret(&mut self, name: &'static str, file: &'static str) -> Option<Secret> {
        let text = match (self.get(name), self.get(file)) {
            (Some(_), Some(_)) => {
                self.push(Problem::SetTwice { name });
                // Reports a problem with the file too, because either variable may stay.
                self.secret_file(file);
                return None;
            }
            (Some(text), None) => text.to_owned(),
            (None, _) => self.secret_file(file)?,
        };
        if text.contains('\0') {
            self.wrong_secret(name, "text without NUL", String::new());
        }
        Some(Secret::new(text))
    }

    /// The text of a file with secrets, without one line break at its end.
    pub(super) fn secret_file(&mut self, name: &'static str) -> Option<String> {
        let path = Path::new(self.get(name)?);
        let problem = match files::read(path, MAX_SECRET_BYTES).map(String::from_utf8) {
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
        let shown = shown_path(path);
        let what = match (&shown, path.to_str().is_some_and(is_quoted)) {
            (Some(_), _) => format!("{problem}; expected a file that holds only the value"),
            (None, true) => format!("{problem}; the quotes are part of the path: remove them"),
            (None, false) => format!(
                "{problem}; expected the path of a file that holds only the value (the path is not shown, because it may \
                 be the secret itself)"
            ),
        };
        let path = shown.unwrap_or_default();
        self.push(Problem::File { name, path, what });
        None
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PemKind {
    Certificate,
    PrivateKey,
}

impl PemKind {
    fn problem(self, contents: &[u8]) -> Option<String> {
        let (fault, expected) = match self {
            Self::Certificate => (
                pem::certificates(contents).err(),
                "certificate (-----BEGIN CERTIFICATE-----)",
            ),
            Self::PrivateKey => (
                pem::private_key_fault(contents),
                "private key (-----BEGIN PRIVATE KEY-----)",
            ),
        };
        fault.map(|fault| format!("{fault}; expected a PEM file with a {expected}"))
    }
}

fn socket_addr_remedy(text: &str) -> Option<String> {
    let is_port = |text: &str| port(text).is_some();
    if let Some(port) = text
        .strip_prefix("*:")
        .or(text.strip_prefix(':'))
        .or(Some(text))
        .filter(|port| is_port(port))
    {
        return Some(format!("write 0.0.0.0:{port} for every address of this machine"));
    }
    let (name, port) = host_and_port(text)?;
    (name == "localhost").then(|| format!("write 127.0.0.1:{port}"))
}

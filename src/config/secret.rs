//! Secrets: a type that nothing prints, and functions that hide secrets in other text.

use std::fmt;
use std::path::Path;

use super::variables::{Servers, Variables};
use crate::files;

/// The most characters of a value in a message.
const MAX_SHOWN_CHARS: usize = 100;

const HIDDEN: &str = "***";

/// A secret. It has neither `Debug` nor `Display`, so no text can contain it by accident.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

// With one of the two, the call would be ambiguous and this would not compile.
const _: fn() = || {
    trait Shown<T> {
        fn is_not() {}
    }
    impl<T> Shown<()> for T {}
    impl<T: fmt::Debug> Shown<u8> for T {}
    impl<T: fmt::Display> Shown<u16> for T {}
    <Secret as Shown<_>>::is_not();
};

impl Secret {
    pub fn new(value: String) -> Self {
        Self(value)
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }
}

/// A wrong value for a message: quoted, shortened, with `***` for every part that may be a secret.
///
/// A secret may be in the wrong variable. Hidden are therefore the text before an `@`, the text after a word such as
/// `password=`, a port that is not a number, and the contents of a key.
pub(super) fn shown(value: &str) -> String {
    if value.contains("-----BEGIN") {
        return "(the contents of a PEM file)".to_owned();
    }
    let mut text = value.to_owned();
    if let Some(start) = named_secret(&text) {
        text.replace_range(start.., HIDDEN);
    }
    hide_user(&mut text);
    match text.char_indices().nth(MAX_SHOWN_CHARS) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// The index of the text after `password=`, `api_key: ` and the like.
fn named_secret(text: &str) -> Option<usize> {
    let lower = text.to_ascii_lowercase();
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    lower.match_indices(['=', ':']).find_map(|(sign, _)| {
        let before = lower[..sign].trim_end();
        let name = &before[before.trim_end_matches(is_name).len()..];
        let is_secret = ["pass", "pwd", "secret", "token", "credential", "key"]
            .iter()
            .any(|word| name.contains(word));
        let value = lower[sign + 1..].trim_start();
        // `pass://` is the scheme of a URL.
        (is_secret && !value.starts_with("//")).then(|| lower.len() - value.len())
    })
}

/// Hides the text before the host of a URL, or of anything that may be a part of a URL.
fn hide_user(text: &mut String) {
    let first_at = text.find('@').unwrap_or(text.len());
    let scheme = text[..first_at].find("://");
    let start = scheme.map_or(0, |colon| colon + 3);
    let rest = &text[start..];
    // `%40` is an `@` that is escaped for a URL.
    if let Some(at) = rest.rfind('@').or_else(|| rest.rfind("%40")) {
        // After a `?`, the `@` may belong to the password, whose rest then follows it.
        let is_doubtful = rest[..at].contains(['?', '#']);
        let end = if is_doubtful { text.len() } else { start + at };
        text.replace_range(start..end, HIDDEN);
        return;
    }
    // A port that is not a number may be the password of a URL that was cut off before its `@`.
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    if let Some((host, port)) = rest[..end].rsplit_once(':')
        && !host.contains(|c: char| c.is_whitespace() || ":,;".contains(c))
        && !port
            .trim_end_matches([',', ';', ' '])
            .bytes()
            .all(|byte| byte.is_ascii_digit())
    {
        let port = start + host.len() + 1;
        text.replace_range(port..start + end, HIDDEN);
    }
}

/// The path of a file with a secret, for a message; `None` if the text may be the secret itself.
pub(super) fn shown_path(path: &Path) -> Option<String> {
    let is_place = |directory: &Path| directory.parent().is_some() && directory.is_dir();
    (path.exists() || path.parent().is_some_and(is_place)).then(|| format!("{path:?}"))
}

/// A warning for each file with a secret for these servers that every user of the machine can read.
///
/// It is not an error, because containers mount secrets that way. A file that a group can read is not reported, because keys
/// are shared that way on purpose.
pub fn exposed_secrets(variables: &Variables, servers: Servers) -> Vec<String> {
    let kafka: &[&str] = &[
        "KAFKA_SSL_KEY_FILE",
        "KAFKA_SASL_USERNAME_FILE",
        "KAFKA_SASL_PASSWORD_FILE",
    ];
    let database: &[&str] = &["DB_PASSWORD_FILE", "PAGE_AUTH_FILE"];
    let kafka = kafka.iter().filter(|_| servers.kafka);
    let names = kafka.chain(database.iter().filter(|_| servers.database));
    names.filter_map(|name| exposed(variables, name)).collect()
}

fn exposed(variables: &Variables, name: &'static str) -> Option<String> {
    let path = variables.get(name)?;
    let mode = files::mode_if_exposed(Path::new(path))?;
    Some(format!(
        "{name}={path:?}: every user of this machine can read the file (mode {mode:04o}); `chmod o-r` prevents that"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_shown_without_parts_that_may_be_secret() {
        let cases = [
            ("db:5432", r#""db:5432""#),
            ("h1,h2", r#""h1,h2""#),
            ("a\r", r#""a\r""#),
            ("postgres://db:5432/metrics", r#""postgres://db:5432/metrics""#),
            (
                "postgres://me:hunter2@db/metrics",
                r#""postgres://***@db/metrics""#,
            ),
            (
                "postgres://me:hun@ter2@db/metrics",
                r#""postgres://***@db/metrics""#,
            ),
            (
                "postgres://me:hun/ter2@db/metrics",
                r#""postgres://***@db/metrics""#,
            ),
            ("postgres://me:hun?ter2@db/metrics", r#""postgres://***""#),
            ("postgres://db/m?pw=hun@ter2", r#""postgres://***""#),
            ("me:hunter2", r#""me:***""#),
            ("kafka:9092,", r#""kafka:9092,""#),
            ("tcp://10.0.0.7:5432", r#""tcp://10.0.0.7:5432""#),
            ("postgres://me:hunter2%40db", r#""postgres://***%40db""#),
            ("postgres://me:hunter2", r#""postgres://me:***""#),
            ("https://[::1]/", r#""https://[::1]/""#),
            ("me:hunter2@db", r#""***@db""#),
            ("me:hunter2@h1:1,SASL_SSL://me:hunter2@h2:1", r#""***@h2:1""#),
            ("host=db password=hunter2 port=1", r#""host=db password=***""#),
            ("host=db PGPASSWORD = 'hunter 2'", r#""host=db PGPASSWORD = ***""#),
            (
                "postgres://db/m?user=me&password=hunter2",
                r#""postgres://db/m?user=me&password=***""#,
            ),
            (
                "-----BEGIN PRIVATE KEY-----\nhunter2",
                "(the contents of a PEM file)",
            ),
        ];
        for (value, expected) in cases {
            assert_eq!(shown(value), expected);
        }
        let long = shown(&"x".repeat(101));
        assert_eq!(long, format!("\"{}\"…", "x".repeat(100)));
    }
}

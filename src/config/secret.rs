//! Values that must not be seen: the type that hides them, and how text that may hold one is shown.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::{Servers, Variables};

/// How much of a value is shown.
const MAX_SHOWN_CHARS: usize = 100;

const HIDDEN: &str = "***";

/// A value that no log line, error or `Debug` output shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: String) -> Self {
        Self(value)
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

/// A wrong value for a message: quoted, cut, and with `***` for everything in it that may be a secret.
///
/// A value ends up in the wrong variable as easily as it is mistyped, so every part that could be a password is hidden:
/// what stands before an `@`, what follows a word like `password=`, a port that is not a number, the contents of a key.
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

/// Where what follows `password=` or `api_key: ` begins.
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
        // `pass://` is a scheme.
        (is_secret && !value.starts_with("//")).then(|| lower.len() - value.len())
    })
}

/// Hides what stands before the host in a URL, or in anything that may be a part of one.
fn hide_user(text: &mut String) {
    let first_at = text.find('@').unwrap_or(text.len());
    let scheme = text[..first_at].find("://");
    let start = scheme.map_or(0, |colon| colon + 3);
    let rest = &text[start..];
    // `%40` is an `@` that was escaped for a URL.
    if let Some(at) = rest.rfind('@').or_else(|| rest.rfind("%40")) {
        // Behind a `?` it may be the password's own, and what follows the rest of the password.
        let is_doubtful = rest[..at].contains(['?', '#']);
        let end = if is_doubtful { text.len() } else { start + at };
        text.replace_range(start..end, HIDDEN);
        return;
    }
    // What should be a port and is not a number may be the password of a URL that was cut before its `@`.
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

/// The path of a file with a secret, for a message; `None` where it may be the secret itself, set without a file.
pub(super) fn shown_path(path: &Path) -> Option<String> {
    let is_place = |directory: &Path| directory.parent().is_some() && directory.is_dir();
    (path.exists() || path.parent().is_some_and(is_place)).then(|| format!("{path:?}"))
}

/// A line for each file with a secret, among those that reach these servers, that every user of the machine can read.
///
/// This deserves a warning and no more, because containers mount secrets so. Reading by a group is not reported: that is
/// how a key is shared on purpose.
pub fn exposed_secrets(variables: &Variables, servers: Servers) -> Vec<String> {
    let kafka: &[&str] = &[
        "KAFKA_SSL_KEY_FILE",
        "KAFKA_SASL_USERNAME_FILE",
        "KAFKA_SASL_PASSWORD_FILE",
    ];
    let database: &[&str] = &["DB_PASSWORD_FILE"];
    let kafka = kafka.iter().filter(|_| servers.kafka);
    let names = kafka.chain(database.iter().filter(|_| servers.database));
    names.filter_map(|name| exposed(variables, name)).collect()
}

fn exposed(variables: &Variables, name: &'static str) -> Option<String> {
    let path = variables.get(name)?;
    let mode = std::fs::metadata(path).ok()?.permissions().mode() & 0o7777;
    (mode & 0o004 != 0).then(|| {
        format!(
            "{name}={path:?}: every user of this machine can read the file (mode {mode:04o}); `chmod o-r` prevents that"
        )
    })
}

/// A line for each secret in quotes, among those for these servers: a shell or Compose would have removed them.
pub fn quoted_secrets(variables: &Variables, servers: Servers) -> Vec<String> {
    let kafka: &[&str] = &["KAFKA_SASL_USERNAME", "KAFKA_SASL_PASSWORD"];
    let database: &[&str] = &["DB_PASSWORD"];
    let kafka = kafka.iter().filter(|_| servers.kafka);
    let names = kafka.chain(database.iter().filter(|_| servers.database));
    let quoted = names.filter(|name| variables.get(name).is_some_and(super::form::is_quoted));
    quoted
        .map(|name| {
            format!(
                "{name}: the value begins and ends with a quote, and the quotes are sent as part of it; remove them \
                 where they are not (Docker's --env-file and Kubernetes do not remove quotes)"
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_shown_without_what_may_be_a_secret() {
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

//! What several variables share: bounds, the syntax of `host:port`, and common mistakes in a value.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::time::Duration;

pub(super) const SECOND: Duration = Duration::from_secs(1);
pub(super) const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The longest value of a variable that has no limit of its own, such as a name. Names of
/// hosts and groups are shorter.
pub(super) const MAX_LINE_BYTES: usize = 255;

/// At least a day, because tables are partitioned by day. The upper bound keeps the arithmetic in range.
pub(super) const RETENTIONS: RangeInclusive<Duration> = DAY..=DAY.saturating_mul(36_500);

/// A mistake that any variable can have, such as quotes or a line end that the source of the value has left in it.
pub(super) fn slip(value: &str) -> Option<&'static str> {
    let is_quote = |c: char| "\"'`“”‘’".contains(c);
    Some(if value.contains("-----BEGIN") {
        "write the contents to a file, and set the variable to the file's path"
    } else if value.trim_end() != value && value.ends_with(['\r', '\n']) {
        "it ends with a line break: remove it (it may come from a file with Windows line ends)"
    } else if value.trim() != value {
        "it begins or ends with a space: remove it"
    } else if value.contains(" #") {
        "the comment is part of the value: move the comment to its own line (Docker's --env-file and Kubernetes do not remove it)"
    } else if value.starts_with(is_quote) || value.ends_with(is_quote) {
        "the quotes are part of the value: remove them (a shell and Compose remove quotes, Docker's --env-file and Kubernetes do not)"
    } else if value.contains("${") || value.starts_with('$') {
        "variables are not expanded here: write the value itself"
    } else {
        return None;
    })
}

pub(super) fn is_quoted(value: &str) -> bool {
    [("\"", "\""), ("'", "'"), ("`", "`"), ("“", "”"), ("‘", "’")]
        .iter()
        .any(|(open, close)| value.strip_prefix(open).is_some_and(|rest| rest.ends_with(close)))
}

/// Whether the text is one line without control characters, and without spaces or quotes around it.
pub(super) fn is_plain_line(text: &str, max_bytes: usize) -> bool {
    is_line(text, max_bytes) && text.trim() == text && !is_quoted(text)
}

pub(super) fn is_line(text: &str, max_bytes: usize) -> bool {
    text.len() <= max_bytes && !text.contains(char::is_control)
}

/// The name or IP address of a host, without the brackets that an IPv6 address may have.
pub(super) fn host(text: &str) -> Option<&str> {
    match text.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').filter(|address| is_ipv6(address)),
        None => (is_ipv6(text) || is_host_name(text)).then_some(text),
    }
}

/// A port from 1 to 65535.
pub(super) fn port(text: &str) -> Option<u16> {
    // `FromStr` accepts a plus sign too.
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| is_number && *port > 0)
}

/// `host:port`, with brackets around an IPv6 address.
pub(super) fn host_and_port(text: &str) -> Option<(&str, u16)> {
    let (name, digits) = text.rsplit_once(':')?;
    let has_brackets = name.starts_with('[');
    let is_bare_ipv6 = name.contains(':') && !has_brackets;
    (host(name).filter(|_| !is_bare_ipv6)).zip(port(digits))
}

/// The host of a URL, unless it is ambiguous.
pub(super) fn host_of_url(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once("://")?;
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(end);
    // A password may contain `/`, `?` or `#`, so what looks like the host may be a part of it.
    if tail.contains('@') {
        return None;
    }
    let first = authority.rsplit('@').next()?.split(',').next()?;
    host(first).or_else(|| host_and_port(first).map(|(host, _)| host))
}

/// With or without the name of a network interface (`fe80::1%eth0`).
fn is_ipv6(text: &str) -> bool {
    let (address, zone) = text.split_once('%').unwrap_or((text, "0"));
    let is_zone = !zone.is_empty()
        && zone
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    is_zone && address.parse::<Ipv6Addr>().is_ok()
}

/// Whether it can be a host name. The C library reads `5432` and `10.1` as addresses; here they are mistakes.
fn is_host_name(text: &str) -> bool {
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len()) && label.chars().all(|c| c.is_alphanumeric() || c == '-' || c == '_')
    };
    let last = name.rsplit('.').next().unwrap_or(name);
    let is_number = last.bytes().all(|byte| byte.is_ascii_digit());
    name.len() <= 253 && name.split('.').all(is_label) && (!is_number || text.parse::<Ipv4Addr>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_a_name_or_an_address() {
        for (text, expected) in [
            ("db", "db"),
            ("my_db.internal.", "my_db.internal."),
            ("10.0.0.7", "10.0.0.7"),
            ("::1", "::1"),
            ("[::1]", "::1"),
            ("fe80::1%eth0", "fe80::1%eth0"),
            ("bücher.example", "bücher.example"),
        ] {
            assert_eq!(host(text), Some(expected));
        }
        let long = "x".repeat(64);
        for text in [
            "",
            ".",
            "a..b",
            "a b",
            "h:1",
            "h1,h2",
            "5432",
            "10.1",
            "256.1.1.1",
            "[::1",
            "[db]",
            "::g",
            "a/b",
            "\"db\"",
            "user@db",
            "postgres://db",
            "host=db",
            "fe80::1%",
            "$DB",
            &long,
        ] {
            assert_eq!(host(text), None, "{text}");
        }
    }

    #[test]
    fn a_port_follows_a_host() {
        assert_eq!(host_and_port("db:1"), Some(("db", 1)));
        assert_eq!(host_and_port("[::1]:65535"), Some(("::1", 65_535)));
        for text in [
            "db",
            "db:",
            "db:0",
            "db:+1",
            "db:65536",
            "::1:1",
            ":1",
            "h:1:2",
            "http://db:1",
        ] {
            assert_eq!(host_and_port(text), None, "{text}");
        }
    }
}

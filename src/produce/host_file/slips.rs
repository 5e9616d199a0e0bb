//! Finds lines whose REGEX is probably a mistake: it is a unit, or contains a comment, quotes or an option.
//!
//! A unit is refused; the others only cause a warning. A text that is really meant as a REGEX can be written as a group:
//! `(# main)`. Finds secrets in addresses and headers too.

use super::files::Files;
use super::options::Options;
use super::quote::{MAX_QUOTED_CHARS, is_blank, quoted};
use super::regexes::MAX_REGEX_BYTES;
use super::report::LineFault;
use super::words::{Line, OptionWord, option_word, split_word};

/// `5 s` instead of `5s`. The place is relative to the REGEX, as in [`in_regex`].
pub(super) fn lone_unit(line: &Line<'_>) -> Option<LineFault> {
    let (first, rest) = split_word(line.regex);
    let unit = first.to_lowercase();
    let is_number = line.frequency.bytes().all(|byte| byte.is_ascii_digit());
    let is_after_number = line.words.is_empty() && is_number;
    if !["s", "m", "h", "d"].contains(&unit.as_str()) || !(is_after_number || rest.is_empty()) {
        return None;
    }
    let remedy = match is_after_number && line.frequency.len() <= MAX_QUOTED_CHARS {
        true => format!("write `{}{unit}` without a space", line.frequency),
        false => "write the unit directly after its number, as in `5s`".to_owned(),
    };
    let what = format!("{} is separated from its number; {remedy}", quoted(first));
    Some(LineFault::new(0, what).or_regex(first))
}

/// The probable mistake in a REGEX, if there is one.
pub(super) fn in_regex(text: &str) -> Option<LineFault> {
    // A REGEX that is too long is refused anyway.
    if text.is_empty() || text.len() > MAX_REGEX_BYTES {
        return None;
    }
    comment(text)
        .or_else(|| delimiters(text))
        .or_else(|| late_option(text))
}

fn comment(text: &str) -> Option<LineFault> {
    let (first, _) = split_word(text);
    let begins = ["//", "--", ";", "/*", "<!--"].contains(&first) || first.starts_with('#');
    let at = match begins {
        true => 0,
        false => text.find(" #").or_else(|| text.find("\t#"))? + 1,
    };
    let what = format!(
        "{} is part of the REGEX; write a comment on a line of its own",
        quoted(&text[at..])
    );
    Some(LineFault::new(at, what))
}

/// `"text"`, `'text'`, `/text/`.
fn delimiters(text: &str) -> Option<LineFault> {
    let pairs = [
        ("\"", "\""),
        ("'", "'"),
        ("`", "`"),
        ("“", "”"),
        ("/", "/"),
        ("/", "/i"),
    ];
    let (open, _) = pairs.into_iter().find(|(open, close)| {
        let inner = text.strip_prefix(open).and_then(|rest| rest.strip_suffix(close));
        // `"status":"ok"` is JSON, and its quotes are meant.
        inner.is_some_and(|inner| !inner.is_empty() && !inner.contains(open))
    })?;
    let sign = if open == "/" { "slashes" } else { "quotes" };
    let what = format!(
        "the {sign} around {} are part of the REGEX; remove them unless the page contains them",
        quoted(text)
    );
    Some(LineFault::new(0, what))
}

/// `Add to basket timeout=3s`.
fn late_option(text: &str) -> Option<LineFault> {
    // In HTML these are attributes.
    let is_html = |name: &str| ["name", "group", "body"].contains(&name);
    let is_meant = |word: &&str| match option_word(word) {
        // A secret or a body from a file is not looked for.
        Some((option, "")) if !is_html(option.name) => {
            Options::default().set(&option, &Files::new(None, None)).is_ok()
        }
        _ => false,
    };
    let word = text.split(is_blank).skip(1).find(is_meant)?;
    let what = format!("{} is part of the REGEX; write options before it", quoted(word));
    let at = word.as_ptr().addr() - text.as_ptr().addr();
    Some(LineFault::new(at, what))
}

/// `?token=…` in an address. Its value is not repeated.
pub(super) fn secret_in_address(address: &str) -> Option<LineFault> {
    let query = address.find('?')? + 1;
    let end = address.find('#').unwrap_or(address.len()).max(query);
    let mut at = query;
    for parameter in address[query..end].split('&') {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        if !value.is_empty() && (names_a_secret(name) || looks_random(value)) {
            let what = format!(
                "the value of {} looks like a secret, and the address is in every record, row and page; if the site accepts \
                 it in a header, write header=\"NAME: @FILE\" with a file in SECRETS_DIR",
                quoted(name)
            );
            return Some(LineFault::new(at, what));
        }
        at += parameter.len() + 1;
    }
    None
}

fn names_a_secret(name: &str) -> bool {
    let name = name.to_lowercase().replace(['-', '_', '.'], "");
    let is_word = ["key", "sig", "auth", "code", "pw", "sid"].contains(&name.as_str());
    let parts = [
        "token",
        "secret",
        "passw",
        "pwd",
        "apikey",
        "accesskey",
        "signature",
        "credential",
        "sessionid",
    ];
    is_word || parts.iter().any(|part| name.contains(part))
}

/// Long, and of mixed letters and digits, as generated secrets are.
fn looks_random(value: &str) -> bool {
    let has = |is: fn(&u8) -> bool| value.bytes().any(|byte| is(&byte));
    let is_token = value
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-_.~+/=%".contains(&byte));
    let is_mixed = has(u8::is_ascii_uppercase) && has(u8::is_ascii_lowercase) && value.len() >= 20;
    let is_hex = value.bytes().all(|byte| byte.is_ascii_hexdigit()) && value.len() >= 32;
    is_token && has(u8::is_ascii_digit) && (is_mixed || is_hex)
}

/// `header="Authorization: …"` with the secret itself.
pub(super) fn secret_in_option(option: &OptionWord<'_>) -> Option<LineFault> {
    let (name, value) = option.value.split_once(':').filter(|_| option.name == "header")?;
    let is_secret =
        ["authorization", "cookie"].contains(&name.to_lowercase().as_str()) || names_a_secret(name);
    let is_file = value
        .split(is_blank)
        .next_back()
        .is_some_and(|word| word.starts_with('@'));
    (is_secret && !is_file && !value.trim().is_empty()).then(|| {
        let what = format!(
            "the value of {} looks like a secret; keep it in a file in SECRETS_DIR and write header=\"{name}: @FILE\"",
            quoted(name)
        );
        LineFault::new(0, what)
    })
}

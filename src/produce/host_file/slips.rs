//! Finds lines whose REGEX is probably a mistake: it contains a comment, an option or a unit.
//!
//! Some of them are refused, because they are certainly mistakes; the others only cause a warning. A text that is really
//! meant as a REGEX can be written as a group: `(# main)`.

use super::fault::LineFault;
use super::files::Files;
use super::options::{FIRST_OPTIONS, OPTION_NAMES, Options};
use super::quote::{MAX_QUOTED_CHARS, is_blank, quoted};
use super::regexes::MAX_REGEX_BYTES;
use super::words::{Line, OptionWord, option_word, profile_name, split_word};
use crate::duration;

pub(super) enum Slip {
    Refused(LineFault),
    Warned(LineFault),
}

use Slip::{Refused, Warned};

/// The probable mistake in the REGEX of a line, if there is one. Its place is relative to the REGEX.
pub(super) fn in_regex(line: &Line<'_>) -> Option<Slip> {
    let text = line.regex;
    // A REGEX that is too long is refused anyway.
    if text.is_empty() || text.len() > MAX_REGEX_BYTES {
        return None;
    }
    let (first, rest) = split_word(text);
    unit(line, first, rest)
        .or_else(|| comment(text))
        .or_else(|| spaced_option(text, first, rest))
        .or_else(|| delimiters(text))
        .or_else(|| lone_value(text, first, rest))
        .or_else(|| late_option(text))
        .or_else(|| sign(line, first))
}

/// `5 s` and `5 minutes` instead of `5s` and `5m`.
fn unit(line: &Line<'_>, first: &str, rest: &str) -> Option<Slip> {
    let lower = first.to_lowercase();
    let is_letter = ["s", "m", "h", "d"].contains(&lower.as_str());
    let is_word = [
        "sec", "secs", "second", "seconds", "min", "mins", "minute", "minutes", "hr", "hrs", "hour", "hours",
        "day", "days",
    ]
    .contains(&lower.as_str());
    let is_after_frequency = line.words.is_empty();
    if !(is_letter || is_word) || !(is_after_frequency || (is_letter && rest.is_empty())) {
        return None;
    }
    let is_number = line.frequency.bytes().all(|byte| byte.is_ascii_digit());
    let slip = match is_after_frequency && is_number && line.frequency.len() <= MAX_QUOTED_CHARS {
        true => format!("write `{}{}` without a space", line.frequency, &lower[..1]),
        false => "write the unit directly after its number, as in `5s`".to_owned(),
    };
    let fault = LineFault::new(
        0,
        format!("{} is separated from its number; {slip}", quoted(first)),
    )
    .or_regex(first);
    // `minutes ago` can be a text to search for.
    let is_option = |word: &str| option(word).is_some_and(|name| FIRST_OPTIONS.contains(&name));
    let (next, _) = split_word(rest);
    match is_letter || rest.is_empty() || next.starts_with('#') || is_option(next) {
        true => Some(Refused(fault)),
        false => Some(Warned(fault)),
    }
}

fn comment(text: &str) -> Option<Slip> {
    let explained = |at: usize| {
        let what = format!(
            "{} is part of the REGEX; write a comment on a line of its own",
            quoted(&text[at..])
        );
        LineFault::new(at, what)
    };
    let (first, _) = split_word(text);
    if ["//", "--", ";", "/*", "<!--"].contains(&first) || first.starts_with('#') {
        return Some(Warned(explained(0)));
    }
    let blank = text.find(" #").or_else(|| text.find("\t#"))?;
    Some(Warned(explained(blank + 1)))
}

/// `timeout = 3s`, `timeout: 3s`, `--timeout=3s`.
fn spaced_option(text: &str, first: &str, rest: &str) -> Option<Slip> {
    let bare = first.trim_start_matches('-');
    let name_end = bare
        .find(|c: char| !c.is_alphanumeric() && c != '-')
        .unwrap_or(bare.len());
    let (name, sign) = (bare[..name_end].to_lowercase(), &bare[name_end..]);
    if !OPTION_NAMES.contains(&name.as_str()) {
        return None;
    }
    let value = match sign {
        "" => rest
            .strip_prefix('=')
            .unwrap_or(rest)
            .trim_start_matches(is_blank),
        sign => match sign.strip_prefix(['=', ':'])? {
            "" => rest,
            value => value,
        },
    };
    let (value, _) = split_word(value);
    let meant = format!("{name}={value}");
    let is_equal = sign.starts_with('=') || (sign.is_empty() && rest.starts_with('='));
    let is_meant = is_valid_option(&meant);
    if !is_equal && !(is_meant && (sign.is_empty() || sign.starts_with(':'))) {
        return None;
    }
    let what = match is_meant {
        true => format!(
            "write the option as {}, without spaces and dashes",
            quoted(&meant)
        ),
        false => format!("write the option as `{name}=VALUE`, without spaces and dashes"),
    };
    Some(match is_equal && FIRST_OPTIONS.contains(&name.as_str()) {
        true => Refused(LineFault::new(0, what).or_regex(text)),
        false => Warned(LineFault::new(
            0,
            format!(
                "{} is read as the REGEX; if an option was meant, {what}",
                quoted(text)
            ),
        )),
    })
}

/// `"text"`, `'text'`, `/text/`.
fn delimiters(text: &str) -> Option<Slip> {
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
    Some(Warned(LineFault::new(0, what)))
}

/// A REGEX that is only a status, a method or a time, or that is a second host.
fn lone_value(text: &str, first: &str, rest: &str) -> Option<Slip> {
    let (second, _) = split_word(rest);
    if first.contains("://") && duration::parse_interval(second).is_some() {
        let what = format!(
            "{} is read as the REGEX; write each host on a line of its own",
            quoted(text)
        );
        return Some(Warned(LineFault::new(0, what)));
    }
    let name = ["status", "method", "timeout"]
        .into_iter()
        .find(|name| is_valid_option(&format!("{name}={text}")))?;
    let what = format!(
        "{} is read as the REGEX; the option is written {}",
        quoted(text),
        quoted(&format!("{name}={text}"))
    );
    Some(Warned(LineFault::new(0, what)))
}

/// `Add to basket timeout=3s`.
fn late_option(text: &str) -> Option<Slip> {
    // In HTML these are attributes.
    let is_html = |word: &str| option(word).is_some_and(|name| ["name", "group", "body"].contains(&name));
    let is_meant = |word: &&str| is_valid_option(word) && !is_html(word);
    let word = text.split(is_blank).skip(1).find(is_meant)?;
    let what = format!("{} is part of the REGEX; write options before it", quoted(word));
    let at = word.as_ptr().addr() - text.as_ptr().addr();
    Some(Warned(LineFault::new(at, what)))
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

/// `!error` instead of `! error`, and `@shop` in a file without profiles.
fn sign(line: &Line<'_>, first: &str) -> Option<Slip> {
    if line.regex_absent {
        return None;
    }
    let what = match first.strip_prefix('!').filter(|text| !text.is_empty()) {
        Some(text) => format!(
            "the `!` is part of the REGEX; to require that the body does not match, write `! {}`",
            quoted(text).trim_matches('`')
        ),
        None => {
            profile_name(first)?;
            format!(
                "{} is read as the REGEX, because the file does not define a profile",
                quoted(first)
            )
        }
    };
    Some(Warned(LineFault::new(0, what)))
}

fn option(word: &str) -> Option<&str> {
    let (option, rest) = option_word(word)?;
    rest.is_empty().then_some(option.name)
}

fn is_valid_option(word: &str) -> bool {
    let Some((option, "")) = option_word(word) else {
        return false;
    };
    // A secret or a body from a file is not looked for.
    Options::default().set(&option, &Files::new(None, None)).is_ok()
}

//! Reads the options that say what a request contains: headers, body, secrets, proxy.

use url::Url;

use super::files::{Files, MAX_REQUEST_BODY_BYTES};
use super::quote::{is_blank, quoted};
use super::report::LineFault;
use super::words::{OptionWord, profile_name};
use crate::check::target::{Header, HeaderValue, Proxy, RequestBody, bare};

/// The headers that the client sets itself, because they describe the connection and how it reads the response.
const OWNED: [&str; 12] = [
    "Accept-Encoding",
    "Connection",
    "Content-Length",
    "Expect",
    "HTTP2-Settings",
    "Keep-Alive",
    "Proxy-Authorization",
    "Proxy-Connection",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
];

/// Most servers refuse longer ones.
const MAX_HEADER_BYTES: usize = 8 << 10;

const SECRET_RULE: &str = "expected `@NAME` with the name of a file in SECRETS_DIR";

/// `header="NAME: VALUE"`. The messages do not repeat the value, which may be secret.
pub(super) fn read_header(option: &OptionWord<'_>, files: &Files<'_>) -> Result<Header, LineFault> {
    let form = "write header=\"NAME: VALUE\" with the quotes";
    let Some((name, value)) = option.value.split_once(':') else {
        return Err(option.fault(format!("there is no `:` in the header; {form}")));
    };
    let value = value.trim_matches(is_blank);
    if !option.is_quoted && (value.is_empty() || option.value.contains('"')) {
        return Err(option.fault(format!("the header ends at the first space; {form}")));
    }
    // A token of RFC 9110, section 5.6.2.
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    if name.is_empty() || !name.chars().all(is_of_name) {
        return Err(option.fault(format!("{} is not a header's name; {form}", quoted(name))));
    }
    if OWNED.iter().any(|owned| owned.eq_ignore_ascii_case(name)) {
        return Err(option.fault(format!("the client sets the header {name} itself; remove it")));
    }
    if !value.chars().all(|c| c == ' ' || c.is_ascii_graphic()) {
        return Err(option.fault(format!(
            "the value of {name} has characters that are not printable ASCII"
        )));
    }
    if value.len() > MAX_HEADER_BYTES {
        return Err(option.fault(format!(
            "the value of {name} is longer than {MAX_HEADER_BYTES} bytes"
        )));
    }
    let last_word = value.rfind(is_blank).map_or(0, |blank| blank + 1);
    let (prefix, word) = value.split_at(last_word);
    let value = match word.starts_with('@') {
        true => HeaderValue::Secret(
            prefix.to_owned(),
            read_secret(option, word, |name| files.header(name))?,
        ),
        false => HeaderValue::Plain(value.to_owned()),
    };
    Ok(Header {
        name: name.to_owned(),
        value,
    })
}

/// `body="TEXT"`, or `body=@FILE` without quotes.
pub(super) fn read_body(option: &OptionWord<'_>, files: &Files<'_>) -> Result<RequestBody, LineFault> {
    let is_quoted = option.word[option.name.len() + 1..].starts_with('"');
    if let Some(path) = option.value.strip_prefix('@').filter(|_| !is_quoted) {
        let bytes = files.body(path).map_err(|why| option.fault(why))?;
        return Ok(RequestBody {
            file: Some(path.to_owned()),
            bytes,
        });
    }
    if option.value.len() as u64 > MAX_REQUEST_BODY_BYTES {
        return Err(option.fault(format!("the body is longer than {MAX_REQUEST_BODY_BYTES} bytes")));
    }
    Ok(RequestBody {
        file: None,
        bytes: option.value.as_bytes().into(),
    })
}

/// The secret that `word`, a part of the option, names.
pub(super) fn read_secret<T>(
    option: &OptionWord<'_>,
    word: &str,
    read: impl FnOnce(&str) -> Result<T, String>,
) -> Result<T, LineFault> {
    // The text is not repeated: it may be the secret itself.
    let name = profile_name(word).ok_or_else(|| option.fault(SECRET_RULE))?;
    read(name).map_err(|why| option.fault(format!("the secret @{name}: {why}")))
}

pub(super) fn read_proxy(text: &str) -> Option<Proxy> {
    let url = Url::parse(text).ok()?;
    let is_plain = url.scheme() == "http"
        && url.username().is_empty()
        && url.password().is_none()
        && url.path() == "/"
        && url.query().is_none()
        && url.fragment().is_none();
    Some(Proxy {
        host: bare(url.host_str()?).to_owned(),
        port: url
            .port_or_known_default()
            .filter(|port| is_plain && *port != 0)?,
    })
}

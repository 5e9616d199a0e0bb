//! Reads ADDRESS: a URL, or a domain that is short for one.

use std::fmt::Display;
use std::net::Ipv6Addr;

use url::{Host, Url};

use super::quote::{is_blank, quoted, userinfo};
use super::report::LineFault;
use crate::check::target::{NOT_NAMED, can_be_named};
use crate::sample::MAX_ADDRESS_BYTES;

pub(super) fn read_address(text: &str) -> Result<Url, LineFault> {
    check_text(text)?;
    let authority_end = text.find(['/', '?', '#']).unwrap_or(text.len());
    let (before, after) = text.split_at(authority_end);
    let scheme = before.strip_suffix(':').filter(|_| after.starts_with("//"));
    let url = match scheme {
        Some(scheme)
            if ["http", "https"]
                .iter()
                .any(|known| known.eq_ignore_ascii_case(scheme)) =>
        {
            Url::parse(text)
        }
        Some(scheme) => {
            let what = format!(
                "expected http:// or https://, not {}",
                quoted(&format!("{scheme}://"))
            );
            return Err(LineFault::new(0, what));
        }
        None if before.parse::<Ipv6Addr>().is_ok() => {
            let what = format!("put an IPv6 address in brackets: `[{before}]`");
            return Err(LineFault::new(0, what));
        }
        None => Url::parse(&format!("https://{text}")),
    };
    // Browsers skip further slashes and take what follows as the host.
    let has_no_host = match scheme {
        Some(_) => after.starts_with("///"),
        None => before.is_empty(),
    };
    let not_a_url = |why: &dyn Display| {
        let what = format!(
            "{} is not an address: {why}; expected a URL like https://example.com/ or a domain",
            quoted(text)
        );
        LineFault::new(0, what)
    };
    if has_no_host {
        return Err(not_a_url(&"it has no host"));
    }
    // `http:/host` would be read as a host named `http`.
    if scheme.is_none() && before.ends_with(':') {
        return Err(not_a_url(&"the port after the `:` is missing"));
    }
    let mut url = url.map_err(|error| not_a_url(&error))?;
    if let Some(why) = host_fault(&url, scheme.is_none(), text) {
        return Err(not_a_url(&why));
    }
    url.set_fragment(None);
    Ok(url)
}

/// What is wrong with the text, whatever URL it is.
fn check_text(text: &str) -> Result<(), LineFault> {
    if text.len() > MAX_ADDRESS_BYTES {
        let what = format!(
            "the address is {} bytes long; the limit is {MAX_ADDRESS_BYTES}",
            text.len()
        );
        return Err(LineFault::new(0, what));
    }
    if let Some(at) = text.find(|c: char| c.is_control() || c.is_whitespace()) {
        let what = match text[at..].starts_with(is_blank) {
            // Only in an argument of `check`: in a host file the word ends at a blank.
            true => "there is a space or a tab in the address; write a space as %20",
            false => "there is a control character or an unusual space; separate words with spaces or tabs",
        };
        return Err(LineFault::new(at, what));
    }
    if let Some(userinfo) = userinfo(text) {
        let what = format!(
            "remove the credentials from the address ({}): every record would contain them",
            quoted(text)
        );
        return Err(LineFault::new(userinfo.start, what));
    }
    // Browsers read a backslash as a slash, and `http:\\host` would be read as the host `http`.
    let path_end = text.find(['?', '#']).unwrap_or(text.len());
    if let Some(at) = text[..path_end].find('\\') {
        return Err(LineFault::new(
            at,
            "there is a backslash in the address; write `/`",
        ));
    }
    Ok(())
}

/// Why a host of this URL cannot be checked.
fn host_fault(url: &Url, has_no_scheme: bool, text: &str) -> Option<String> {
    match url.host() {
        None | Some(Host::Domain("")) => Some("it has no host".to_owned()),
        Some(Host::Domain(domain)) if !is_host_name(domain) => {
            Some(format!("{} is not a valid host name", quoted(domain)))
        }
        // As in `https://https://example.com/` and `https//example.com`.
        Some(Host::Domain(domain)) if ["http", "https"].contains(&domain) => Some(format!(
            "`{domain}` is a protocol, not a host; write `{domain}://` once"
        )),
        Some(Host::Domain(domain)) if !can_be_named(url) => Some(format!("{}: {NOT_NAMED}", quoted(domain))),
        // Browsers read `5` and `10.1` as IP addresses. Here it is more likely that the address is missing: the next column
        // is a number.
        Some(Host::Ipv4(ip)) if has_no_scheme && !text.starts_with(&ip.to_string()) => {
            Some("it is a number".to_owned())
        }
        Some(_) => (url.port() == Some(0)).then(|| "0 is not a valid port".to_owned()),
    }
}

/// Whether DNS can hold the name: the lengths and characters of RFC 1035, and the underscore, which is common.
fn is_host_name(domain: &str) -> bool {
    let domain = domain.strip_suffix('.').unwrap_or(domain);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    domain.len() <= 253 && domain.split('.').all(is_label)
}

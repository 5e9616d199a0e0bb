//! What a check shows to a person beyond its record. Only the `check` command asks for it.

use std::time::Duration;

/// What was seen on the way to the final response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// Every request that was answered, in order.
    pub exchanges: Vec<Exchange>,
    /// Of the last response.
    pub protocol: Option<&'static str>,
    /// Version and cipher suite of the last handshake that succeeded.
    pub tls: Option<String>,
    /// Of the last server, even if it was refused.
    pub certificate: Option<Certificate>,
    /// The status line and the headers of the last request's response, as they came.
    pub head: String,
    /// The decoded body as far as it was read, or its beginning if the check does not read it.
    pub body: String,
    /// How long the check took, whatever came of it.
    pub took: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    pub url: String,
    pub status: u16,
    /// From the name lookup to the response's headers.
    pub took: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    pub subject: String,
    pub issuer: String,
    /// The names and addresses that it is for.
    pub names: Vec<String>,
    /// The common names of all certificates that the server sent, this one first.
    pub chain: Vec<String>,
}

impl Details {
    /// Every text in it that comes from a server.
    pub(super) fn texts(&mut self) -> impl Iterator<Item = &mut String> {
        let urls = self.exchanges.iter_mut().map(|exchange| &mut exchange.url);
        urls.chain([&mut self.head, &mut self.body])
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut fields = self.head.lines().filter_map(|line| line.split_once(':'));
        let found = fields.find(|(known, _)| known.trim_end().eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.trim())
    }
}

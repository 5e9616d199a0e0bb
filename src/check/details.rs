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
    pub content_type: Option<String>,
    pub content_length: Option<String>,
    /// The decoded body, as far as it was read.
    pub body: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    pub url: String,
    pub status: u16,
    /// From the name look-up to the response's headers.
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
        urls.chain(&mut self.content_type).chain([&mut self.body])
    }
}

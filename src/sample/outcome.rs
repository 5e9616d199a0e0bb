//! The outcomes of a tick: the closed set of words that a record's `outcome` can be.

use crate::words::words;

words! {
    /// What became of one tick of one host.
    Outcome,
    /// The record's `outcome`.
    as_str:
    Ok "ok",
    BadStatus "bad_status",
    RegexMismatch "regex_mismatch",
    JsonMismatch "json_mismatch",
    BodyTooLarge "body_too_large",
    DnsNotFound "dns_not_found",
    DnsError "dns_error",
    DnsTimeout "dns_timeout",
    ConnectRefused "connect_refused",
    ConnectUnreachable "connect_unreachable",
    ConnectTimeout "connect_timeout",
    ConnectError "connect_error",
    TlsCertExpired "tls_cert_expired",
    TlsCertName "tls_cert_name",
    TlsCertUntrusted "tls_cert_untrusted",
    TlsCertExpiring "tls_cert_expiring",
    TlsError "tls_error",
    TlsTimeout "tls_timeout",
    ResponseTimeout "response_timeout",
    BodyTimeout "body_timeout",
    ConnectionClosed "connection_closed",
    ProtocolError "protocol_error",
    TooManyRedirects "too_many_redirects",
    ProxyError "proxy_error",
    AgentError "agent_error",
    AgentOffline "agent_offline",
    Missed "missed",
}

impl Outcome {
    /// Whether a check found something wrong with the host. A missed tick or a fault of the checking machine says nothing about
    /// the host.
    pub fn is_failed_check(self) -> bool {
        !matches!(
            self,
            Self::Ok | Self::Missed | Self::AgentError | Self::AgentOffline
        )
    }
}

//! What an outcome means, and what to try next, in a sentence or two for a person. Pure.

use crate::sample::Outcome;

/// `None` if the check was valid. STATUS and URL stand for those of the check.
#[expect(clippy::too_many_lines, reason = "a text for each outcome")]
pub(super) fn advice(outcome: Outcome) -> Option<&'static str> {
    Some(match outcome {
        Outcome::Ok => return None,
        Outcome::BadStatus => {
            "The server answered, but with a status that counts as a failure. If this status is expected, name it: \
             -o status=STATUS. If a redirect led there, -o follow=0 takes the redirect itself as the answer."
        }
        Outcome::RegexMismatch => {
            "The server answered, but its body does not meet the REGEX. Compare with the body itself: curl -sL URL. Text \
             that JavaScript adds later is not part of it."
        }
        Outcome::BodyTooLarge => {
            "The text was not in the part of the body that was read. To read more: -e MAX_BODY_BYTES=10485760."
        }
        Outcome::JsonMismatch => {
            "The server answered, but a value in its JSON was not the expected one. Compare with the body itself: curl -sL URL."
        }
        Outcome::DnsNotFound => {
            "The name server says that there is no such name, or no address of the requested family. Check the spelling; \
             to ask the name server yourself: getent ahosts NAME."
        }
        Outcome::DnsError | Outcome::DnsTimeout => {
            "This machine's name server failed or did not answer. Check /etc/resolv.conf, and whether other names are \
             found: getent ahosts example.com."
        }
        Outcome::ConnectRefused => {
            "The machine answered, but no program accepts connections at this port. Check that the service runs, that it \
             listens at this port, and that no firewall refuses the connection."
        }
        Outcome::ConnectUnreachable => {
            "There is no route to this address. Check this machine's network, and for an IPv6 address whether the network \
             has IPv6; -o ip=4 uses IPv4 only."
        }
        Outcome::ConnectTimeout => {
            "The machine did not answer. It may be down, or a firewall may drop the packets. Try it from another network."
        }
        Outcome::ConnectError => "The connection could not be made; the error above says why.",
        Outcome::TlsCertExpired => {
            "The certificate is not valid at this time. Renew it on the server; if it looks valid, check this machine's \
             clock."
        }
        Outcome::TlsCertName => {
            "The certificate belongs to another name. Check that the server sends the certificate of this name, or use an \
             address that the certificate names."
        }
        Outcome::TlsCertUntrusted => {
            "No authority that this machine trusts has signed the certificate. If the site has its own authority, name its \
             file: -e CHECK_CA_FILE=ca.pem. Often the server does not send its intermediate certificate."
        }
        Outcome::TlsCertExpiring => {
            "The site works, but its certificate expires within the days of cert-days=. Renew it on the server."
        }
        Outcome::TlsError => {
            "The server and this client could not agree on an encrypted connection. Check that the port speaks TLS (1.2 or \
             newer), and not plain HTTP."
        }
        Outcome::TlsTimeout => {
            "The server accepted the connection but did not finish the TLS handshake. It may be overloaded, or the port may \
             not speak TLS."
        }
        Outcome::ResponseTimeout => {
            "The server accepted the request but did not answer in time. To wait longer: -o timeout=30s."
        }
        Outcome::BodyTimeout => {
            "The server began to answer, but the body did not end in time. To wait longer: -o timeout=30s."
        }
        Outcome::ConnectionClosed => {
            "The server closed the connection before its answer was complete. Check that the address has the right \
             protocol, http or https; then look into the server's log, and that of a proxy in front of it."
        }
        Outcome::ProtocolError => {
            "The answer is not valid HTTP. Check that the port speaks HTTP, and that the address has the right protocol, \
             http or https."
        }
        Outcome::TooManyRedirects => {
            "The redirects did not end. Look at them: curl -sIL URL. If there really are that many: -o follow=20."
        }
        Outcome::ProxyError => "The proxy of proxy= failed; the site itself was not reached.",
        Outcome::AgentError => {
            "This machine could not make the check: it has no room for more open files, threads or memory."
        }
        Outcome::AgentOffline => "The network of this machine was down.",
        Outcome::Missed => "The host was not checked.",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_advice_in_whole_sentences() {
        for outcome in Outcome::ALL {
            let advice = advice(outcome);
            assert_eq!(advice.is_none(), outcome == Outcome::Ok);
            assert!(advice.is_none_or(|advice| advice.ends_with('.')), "{outcome:?}");
        }
    }
}

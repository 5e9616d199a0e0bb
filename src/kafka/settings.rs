//! The librdkafka properties that all our clients share: servers, encryption, login. The only file that knows their names;
//! what only one client sets (batching, a consumer group) is in that client's file.

use rdkafka::config::ClientConfig;

use crate::config::{KafkaConfig, KafkaSecurity};

/// The shared properties; the caller adds its own.
pub fn client_config(kafka: &KafkaConfig) -> ClientConfig {
    let mut config = ClientConfig::new();
    for (name, value) in kafka.client_properties() {
        config.set(name, value);
    }
    // librdkafka would wait up to 10 s, longer than a producer's session, so that it would lose its shares.
    config
        .set("reconnect.backoff.ms", "100")
        .set("reconnect.backoff.max.ms", "1000");
    config
}

impl KafkaConfig {
    /// librdkafka's properties, each with its value.
    pub fn client_properties(&self) -> Vec<(&'static str, String)> {
        let KafkaSecurity { tls, sasl } = &self.security;
        let protocol = match (tls, sasl) {
            (None, None) => "plaintext",
            (Some(_), None) => "ssl",
            (None, Some(_)) => "sasl_plaintext",
            (Some(_), Some(_)) => "sasl_ssl",
        };
        let mut properties = vec![
            ("bootstrap.servers", self.bootstrap_servers.clone()),
            ("client.id", "host-metrics".to_owned()),
            ("security.protocol", protocol.to_owned()),
            // The kernel then notices that the path to the broker silently drops packets.
            ("socket.keepalive.enable", "true".to_owned()),
            // If the name of a server has several addresses, try all of them.
            ("client.dns.lookup", "use_all_dns_ips".to_owned()),
        ];
        if let Some(tls) = tls {
            properties.push(("enable.ssl.certificate.verification", "true".to_owned()));
            properties.push(("ssl.endpoint.identification.algorithm", "https".to_owned()));
            let files = [
                ("ssl.ca.location", &tls.ca_file),
                ("ssl.certificate.location", &tls.cert_file),
                ("ssl.key.location", &tls.key_file),
            ];
            for (property, file) in files {
                if let Some(file) = file {
                    properties.push((property, file.display().to_string()));
                }
            }
        }
        if let Some(sasl) = sasl {
            properties.push(("sasl.mechanism", sasl.mechanism.clone()));
            properties.push(("sasl.username", sasl.username.reveal().to_owned()));
            properties.push(("sasl.password", sasl.password.reveal().to_owned()));
        }
        properties
    }
}

//! The header of the batch at an offset, whether or not librdkafka can read its records.
//!
//! Owns a few requests of Kafka's protocol: the login, and a Fetch of one batch, of whose response only the beginning is
//! read. librdkafka does not report a batch that it cannot decompress, and a batch that expands hugely must not be
//! decompressed only to learn where it ends.

use std::io::{self, Read, Write};
use std::time::Duration;

use openssl::base64::{decode_block, encode_block};
use openssl::error::ErrorStack;
use openssl::hash::{MessageDigest, hash};
use openssl::pkcs5::pbkdf2_hmac;
use openssl::pkey::PKey;
use openssl::rand::rand_bytes;
use openssl::sign::Signer;
use openssl::ssl::SslVerifyMode;
use rdkafka::consumer::Consumer as _;
use rdkafka::error::RDKafkaErrorCode;

use super::client::small_client;
use super::connection::{connect, tls_session};
use super::topics::partitions;
use crate::clock::instant_now;
use crate::config::{KafkaConfig, KafkaSasl};
use crate::terminal::counted;

/// The bound on all requests to the broker together. With `skip` a person waits; in `consume` a thread of its own does.
const WITHIN: Duration = Duration::from_secs(10);

/// How much of a response is read. The header of the batch comes at its beginning.
const MAX_RESPONSE_BYTES: usize = 64 << 10;

/// RFC 7677 requires at least 4,096; Kafka uses 4,096 or 8,192. A million iterations take half a second.
const MAX_SCRAM_ITERATIONS: usize = 1_000_000;

/// A batch, as its header in the log describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchHead {
    pub first_offset: i64,
    pub last_offset: i64,
    pub records: i32,
    pub compression: &'static str,
    /// The size in the log, compressed.
    pub bytes: u64,
}

impl std::fmt::Display for BatchHead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "offsets {} to {}, {}, {}, {} bytes",
            self.first_offset,
            self.last_offset,
            counted(self.records, "record"),
            self.compression,
            self.bytes
        )
    }
}

/// Asks the partition's leader for the header of the batch that holds `offset`.
///
/// # Errors
/// There is no batch at the offset, or the leader does not answer, refuses the login or does not know the request. The
/// text is for a person.
pub fn batch_head(
    kafka: &KafkaConfig,
    topic: &str,
    partition: i32,
    offset: i64,
) -> Result<BatchHead, String> {
    let server = leader(kafka, topic, partition)?;
    let ask = || -> io::Result<BatchHead> {
        let mut broker = Broker::connect(kafka, &server)?;
        if let Some(sasl) = &kafka.security.sasl {
            broker.log_in(sasl)?;
        }
        broker.fetch_head(topic, partition, offset)
    };
    ask().map_err(|error| format!("{server}: {error}"))
}

fn leader(kafka: &KafkaConfig, topic: &str, partition: i32) -> Result<String, String> {
    let client = small_client(kafka).map_err(|error| error.to_string())?;
    let found = partitions(client.client(), topic, WITHIN).map_err(|error| {
        let cause = client.context().last().map(|(_, cause)| cause);
        let cause = cause.unwrap_or_else(|| client.context().explain(&error));
        format!("Kafka at {}: {cause}", kafka.bootstrap_servers)
    })?;
    found
        .into_iter()
        .find(|found| found.number == partition)
        .ok_or_else(|| format!("Kafka has no partition {topic}/{partition}"))?
        .leader
        .ok_or_else(|| format!("{topic}/{partition} has no leader at the moment"))
}

/// A connection with or without TLS.
trait Wire: Read + Write {}
impl<T: Read + Write> Wire for T {}

struct Broker(Box<dyn Wire>);

impl Broker {
    fn connect(kafka: &KafkaConfig, server: &str) -> io::Result<Self> {
        let connection = connect(server, instant_now() + WITHIN)?;
        let Some(tls) = &kafka.security.tls else {
            return Ok(Self(Box::new(connection)));
        };
        let mut session = tls_session(server, Some(tls))?;
        session.set_verify(SslVerifyMode::PEER);
        let session = session.connect(connection).map_err(io::Error::other)?;
        Ok(Self(Box::new(session)))
    }

    /// Sends a request and returns the beginning of the response, after its correlation number.
    fn request(&mut self, api: i16, version: i16, body: &[u8]) -> io::Result<Vec<u8>> {
        let mut request = Vec::new();
        request.extend(api.to_be_bytes());
        request.extend(version.to_be_bytes());
        request.extend(0_i32.to_be_bytes());
        put_text(&mut request, "host-metrics");
        request.extend(body);
        let length = u32::try_from(request.len()).map_err(io::Error::other)?;
        request.splice(..0, length.to_be_bytes());
        self.0.write_all(&request)?;
        let length = self.read(4)?;
        let length = usize::try_from(Response(&length).i32()?).map_err(io::Error::other)?;
        let response = self.read(length.min(MAX_RESPONSE_BYTES))?;
        Ok(response.get(4..).unwrap_or_default().to_vec())
    }

    fn read(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.0
            .read_exact(&mut bytes)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => {
                    io::Error::other("it closed the connection without an answer")
                }
                _ => error,
            })?;
        Ok(bytes)
    }

    fn log_in(&mut self, sasl: &KafkaSasl) -> io::Result<()> {
        let mut body = Vec::new();
        put_text(&mut body, &sasl.mechanism);
        let response = self.request(SASL_HANDSHAKE, 1, &body)?;
        Response(&response).code()?;
        let (user, password) = (sasl.username.reveal(), sasl.password.reveal());
        let digest = match sasl.mechanism.as_str() {
            "SCRAM-SHA-256" => MessageDigest::sha256(),
            "SCRAM-SHA-512" => MessageDigest::sha512(),
            _ => {
                self.authenticate(format!("\0{user}\0{password}").as_bytes())?;
                return Ok(());
            }
        };
        let mut nonce = [0; 24];
        rand_bytes(&mut nonce)?;
        let scram = Scram {
            digest,
            password,
            first: format!(
                "n={},r={}",
                user.replace('=', "=3D").replace(',', "=2C"),
                encode_block(&nonce)
            ),
            nonce: encode_block(&nonce),
        };
        let challenge = self.authenticate(format!("n,,{}", scram.first).as_bytes())?;
        let (answer, proof_of_server) = scram.answer(&String::from_utf8_lossy(&challenge))?;
        match self.authenticate(answer.as_bytes())? == proof_of_server.as_bytes() {
            true => Ok(()),
            false => Err(io::Error::other("it cannot prove that it knows the password")),
        }
    }

    fn authenticate(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        put_bytes(&mut body, bytes);
        let response = self.request(SASL_AUTHENTICATE, 0, &body)?;
        let mut response = Response(&response);
        response.code()?;
        response.text()?;
        Ok(response.bytes()?.to_vec())
    }

    fn fetch_head(&mut self, topic: &str, partition: i32, offset: i64) -> io::Result<BatchHead> {
        const WAIT_MILLIS: i32 = 1_000;
        const READ_COMMITTED: u8 = 1;
        let mut body = Vec::new();
        let put = |body: &mut Vec<u8>, number: i32| body.extend(number.to_be_bytes());
        put(&mut body, -1); // a consumer, not a replica
        put(&mut body, WAIT_MILLIS);
        put(&mut body, 1); // minimum bytes
        put(&mut body, 1); // maximum bytes; the first batch comes whole
        body.push(READ_COMMITTED);
        put(&mut body, 0); // no fetch session
        put(&mut body, -1);
        put(&mut body, 1); // one topic
        put_text(&mut body, topic);
        put(&mut body, 1); // one partition
        put(&mut body, partition);
        put(&mut body, -1); // any leader epoch
        body.extend(offset.to_be_bytes());
        body.extend((-1_i64).to_be_bytes());
        put(&mut body, 1); // maximum bytes of the partition
        put(&mut body, 0); // no topics to remove from a session
        // Version 10 is the first that returns zstd; Kafka has it since 2.1.
        let response = self.request(FETCH, 10, &body)?;
        let mut response = Response(&response);
        response.take(4)?; // throttle time
        response.code()?;
        response.take(4 + 4)?; // session, topics
        response.text()?;
        response.take(4 + 4)?; // partitions, number
        let no_batch = || io::Error::other(format!("there is no batch at offset {offset}"));
        match response.i16()? {
            OFFSET_OUT_OF_RANGE => return Err(no_batch()),
            code => no_error(code)?,
        }
        response.take(3 * 8)?; // high watermark, last stable offset, beginning
        for _ in 0..response.i32()?.max(0) {
            response.take(2 * 8)?; // an aborted transaction
        }
        if response.i32()? <= 0 {
            return Err(no_batch());
        }
        response.head()
    }
}

/// Kafka's protocol guide, "Api Keys".
const FETCH: i16 = 1;
const SASL_HANDSHAKE: i16 = 17;
const SASL_AUTHENTICATE: i16 = 36;

/// Kafka's protocol guide, "Error Codes".
const OFFSET_OUT_OF_RANGE: i16 = 1;

struct Scram<'a> {
    digest: MessageDigest,
    password: &'a str,
    first: String,
    nonce: String,
}

impl Scram<'_> {
    /// RFC 5802: the answer to the server's challenge, and what a server that knows the password sends next.
    fn answer(&self, challenge: &str) -> io::Result<(String, String)> {
        let wrong = || io::Error::other("its challenge is not valid SCRAM");
        let field = |name: &str| challenge.split(',').find_map(|field| field.strip_prefix(name));
        let nonce = field("r=")
            .filter(|nonce| nonce.starts_with(&self.nonce))
            .ok_or_else(wrong)?;
        let salt = decode_block(field("s=").ok_or_else(wrong)?)?;
        let iterations = field("i=").and_then(|number| number.parse().ok());
        let iterations = iterations
            .filter(|number| *number <= MAX_SCRAM_ITERATIONS)
            .ok_or_else(wrong)?;
        let mut salted = vec![0; self.digest.size()];
        pbkdf2_hmac(
            self.password.as_bytes(),
            &salt,
            iterations,
            self.digest,
            &mut salted,
        )?;
        let client_key = self.hmac(&salted, b"Client Key")?;
        let without_proof = format!("c=biws,r={nonce}");
        let signed = format!("{},{challenge},{without_proof}", self.first);
        let signature = self.hmac(&hash(self.digest, &client_key)?, signed.as_bytes())?;
        let proof: Vec<u8> = client_key.iter().zip(&signature).map(|(a, b)| a ^ b).collect();
        let server_key = self.hmac(&salted, b"Server Key")?;
        let of_server = self.hmac(&server_key, signed.as_bytes())?;
        Ok((
            format!("{without_proof},p={}", encode_block(&proof)),
            format!("v={}", encode_block(&of_server)),
        ))
    }

    fn hmac(&self, key: &[u8], text: &[u8]) -> Result<Vec<u8>, ErrorStack> {
        let key = PKey::hmac(key)?;
        Signer::new(self.digest, &key)?.sign_oneshot_to_vec(text)
    }
}

fn no_error(code: i16) -> io::Result<()> {
    if code == 0 {
        return Ok(());
    }
    let known = rdkafka::types::RDKafkaRespErr::try_from(i32::from(code)).map(RDKafkaErrorCode::from);
    Err(io::Error::other(known.map_or_else(
        |_| format!("Kafka's error code {code}"),
        |error| error.to_string(),
    )))
}

fn put_text(into: &mut Vec<u8>, text: &str) {
    // All texts written here are far shorter than 32 KiB.
    into.extend(i16::try_from(text.len()).unwrap_or(i16::MAX).to_be_bytes());
    into.extend(text.as_bytes());
}

fn put_bytes(into: &mut Vec<u8>, bytes: &[u8]) {
    into.extend(i32::try_from(bytes.len()).unwrap_or(i32::MAX).to_be_bytes());
    into.extend(bytes);
}

/// The part of a response that is not read yet.
struct Response<'a>(&'a [u8]);

impl<'a> Response<'a> {
    fn take(&mut self, length: usize) -> io::Result<&'a [u8]> {
        let (taken, rest) = self
            .0
            .split_at_checked(length)
            .ok_or_else(|| io::Error::other("its answer is cut off"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn number<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        self.take(N)?.try_into().map_err(io::Error::other)
    }

    fn i16(&mut self) -> io::Result<i16> {
        self.number().map(i16::from_be_bytes)
    }

    fn i32(&mut self) -> io::Result<i32> {
        self.number().map(i32::from_be_bytes)
    }

    fn i64(&mut self) -> io::Result<i64> {
        self.number().map(i64::from_be_bytes)
    }

    fn text(&mut self) -> io::Result<()> {
        let length = self.i16()?;
        self.take(usize::try_from(length).unwrap_or(0)).map(|_| ())
    }

    fn bytes(&mut self) -> io::Result<&'a [u8]> {
        let length = self.i32()?;
        self.take(usize::try_from(length).unwrap_or(0))
    }

    fn code(&mut self) -> io::Result<()> {
        no_error(self.i16()?)
    }

    /// The header of a batch in Kafka's message format 2 (0.11 and newer).
    fn head(&mut self) -> io::Result<BatchHead> {
        let first_offset = self.i64()?;
        let length = self.i32()?;
        self.take(4)?; // the leader's epoch
        if self.take(1)? != [2] {
            return Err(io::Error::other(
                "the batch has a format older than Kafka 0.11, which does not tell where it ends",
            ));
        }
        self.take(4)?; // checksum
        let attributes = self.i16()?;
        let last_delta = self.i32()?;
        self.take(8 + 8 + 8 + 2 + 4)?; // times, producer, its epoch, sequence
        Ok(BatchHead {
            first_offset,
            last_offset: first_offset.saturating_add(i64::from(last_delta.max(0))),
            records: self.i32()?,
            compression: match attributes & 7 {
                0 => "not compressed",
                1 => "gzip",
                2 => "snappy",
                3 => "lz4",
                4 => "zstd",
                _ => "unknown compression",
            },
            // The length does not count the offset and itself.
            bytes: u64::try_from(length).unwrap_or(0) + 12,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7677, section 3.
    #[test]
    fn a_challenge_of_scram_is_answered_as_its_rfc_shows() {
        let nonce = "rOprNGfwEbeRWgbNEkqO";
        let scram = Scram {
            digest: MessageDigest::sha256(),
            password: "pencil",
            first: format!("n=user,r={nonce}"),
            nonce: nonce.to_owned(),
        };
        let challenge =
            "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
        let (answer, of_server) = scram.answer(challenge).unwrap();
        assert_eq!(
            answer,
            "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
        );
        assert_eq!(of_server, "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
        for other in [
            "r=other,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096".to_owned(),
            challenge.replace("4096", "4096000000"),
            challenge.replace("s=W", "s=-"),
            "e=other-error".to_owned(),
            String::new(),
        ] {
            assert!(scram.answer(&other).is_err(), "{other}");
        }
    }

    #[test]
    fn a_header_that_is_cut_off_or_of_another_format_is_an_error() {
        let mut head = Vec::new();
        head.extend(7_i64.to_be_bytes());
        head.extend(100_i32.to_be_bytes());
        head.extend([0; 4]);
        head.push(2);
        head.extend([0; 4]);
        head.extend(4_i16.to_be_bytes());
        head.extend(3_i32.to_be_bytes());
        head.extend([0; 30]);
        head.extend(4_i32.to_be_bytes());
        let read = Response(&head).head().unwrap();
        assert_eq!(read.to_string(), "offsets 7 to 10, 4 records, zstd, 112 bytes");
        for length in 0..head.len() {
            assert!(Response(&head[..length]).head().is_err(), "{length}");
        }
        head[16] = 1;
        assert!(Response(&head).head().is_err());
    }
}

//! What the batch at an offset says of itself, whether librdkafka can read its records or not.
//!
//! Owns a request or two of Kafka's protocol: a Fetch of one batch, of which only the beginning of the answer is read, and
//! in front of it the login. Needed because librdkafka hides a batch that it cannot decompress, and because one that
//! expands hugely must not be decompressed to learn where it ends.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use openssl::base64::{decode_block, encode_block};
use openssl::error::ErrorStack;
use openssl::hash::{MessageDigest, hash};
use openssl::pkcs5::pbkdf2_hmac;
use openssl::pkey::PKey;
use openssl::rand::rand_bytes;
use openssl::sign::Signer;
use openssl::ssl::{SslStream, SslVerifyMode};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::RDKafkaErrorCode;

use super::{Listener, client_config, connect, tls_session};
use crate::config::{KafkaConfig, KafkaSasl};

/// All questions to the broker together.
const WITHIN: Duration = Duration::from_secs(10);

/// Of an answer no more is read: a batch's head comes at the beginning.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// RFC 7677 asks for 4,096 at least, Kafka refuses less and makes 4,096 or 8,192; a million take half a second.
const MAX_SCRAM_ITERATIONS: usize = 1_000_000;

/// A batch, by the head that it has in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchHead {
    pub first_offset: i64,
    pub last_offset: i64,
    pub records: i32,
    pub compression: &'static str,
    /// As it lies in the log, compressed.
    pub bytes: u64,
}

impl std::fmt::Display for BatchHead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "offsets {} to {}, {} records, {}, {} bytes",
            self.first_offset, self.last_offset, self.records, self.compression, self.bytes
        )
    }
}

/// Asks the partition's leader for the head of the batch that holds `offset`.
///
/// # Errors
/// No batch is there, or the leader does not answer, does not let us in or does not know the request: why, for a person.
pub fn batch_head(
    kafka: &KafkaConfig,
    topic: &str,
    partition: i32,
    offset: i64,
) -> Result<BatchHead, String> {
    let deadline = now() + WITHIN;
    let server = leader(kafka, topic, partition)?;
    let ask = || -> io::Result<BatchHead> {
        let mut broker = Broker::connect(kafka, &server, deadline)?;
        if let Some(sasl) = &kafka.security.sasl {
            broker.log_in(sasl)?;
        }
        broker.fetch_head(topic, partition, offset)
    };
    ask().map_err(|error| format!("{server}: {error}"))
}

fn leader(kafka: &KafkaConfig, topic: &str, partition: i32) -> Result<String, String> {
    let client: BaseConsumer<Listener> = client_config(kafka)
        .create_with_context(Listener::new(kafka))
        .map_err(|error| error.to_string())?;
    let metadata = client.fetch_metadata(Some(topic), WITHIN).map_err(|error| {
        let said = client.context().last().map(|(_, reason)| reason);
        format!(
            "Kafka at {}: {}",
            kafka.bootstrap_servers,
            said.unwrap_or_else(|| client.context().explain(&error))
        )
    })?;
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    let partitions = found.map(|found| found.partitions()).unwrap_or_default();
    let found = partitions.iter().find(|found| found.id() == partition);
    let leader = found
        .ok_or_else(|| format!("Kafka has no partition {topic}/{partition}"))?
        .leader();
    let brokers = metadata.brokers();
    let broker = brokers.iter().find(|broker| broker.id() == leader);
    let broker = broker.ok_or_else(|| format!("{topic}/{partition} has no leader at the moment"))?;
    Ok(match broker.host() {
        host if host.contains(':') => format!("[{host}]:{}", broker.port()),
        host => format!("{host}:{}", broker.port()),
    })
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<SslStream<TcpStream>>),
}

struct Broker {
    stream: Stream,
    deadline: Instant,
}

impl Broker {
    fn connect(kafka: &KafkaConfig, server: &str, deadline: Instant) -> io::Result<Self> {
        let stream = connect(server).ok_or_else(|| io::Error::other("it does not take a connection"))?;
        let stream = match &kafka.security.tls {
            None => Stream::Plain(stream),
            Some(tls) => {
                let mut session = tls_session(server, Some(tls))?;
                session.set_verify(SslVerifyMode::PEER);
                let session = session.connect(stream).map_err(io::Error::other)?;
                Stream::Tls(Box::new(session))
            }
        };
        Ok(Self { stream, deadline })
    }

    /// The beginning of the answer, behind its correlation number.
    fn ask(&mut self, api: i16, version: i16, body: &[u8]) -> io::Result<Vec<u8>> {
        let mut request = Vec::new();
        request.extend(api.to_be_bytes());
        request.extend(version.to_be_bytes());
        request.extend(0_i32.to_be_bytes());
        put_text(&mut request, "host-metrics");
        request.extend(body);
        let length = u32::try_from(request.len()).map_err(io::Error::other)?;
        request.splice(..0, length.to_be_bytes());
        match &mut self.stream {
            Stream::Plain(stream) => stream.write_all(&request)?,
            Stream::Tls(stream) => stream.write_all(&request)?,
        }
        let length = self.read(4)?;
        let length = usize::try_from(Answer(&length).i32()?).map_err(io::Error::other)?;
        let answer = self.read(length.min(MAX_ANSWER_BYTES))?;
        Ok(answer.get(4..).unwrap_or_default().to_vec())
    }

    /// Every single read has a bound of its own (see [`connect`]); this is the one of all together.
    fn read(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let mut unread = bytes.as_mut_slice();
        while !unread.is_empty() {
            let read = match &mut self.stream {
                Stream::Plain(stream) => stream.read(unread)?,
                Stream::Tls(stream) => stream.read(unread)?,
            };
            if read == 0 {
                return Err(io::Error::other("it ended the connection instead of an answer"));
            }
            if now() > self.deadline {
                return Err(io::Error::other("it did not answer in time"));
            }
            unread = unread.get_mut(read..).unwrap_or_default();
        }
        Ok(bytes)
    }

    fn log_in(&mut self, sasl: &KafkaSasl) -> io::Result<()> {
        let mut body = Vec::new();
        put_text(&mut body, &sasl.mechanism);
        let answer = self.ask(SASL_HANDSHAKE, 1, &body)?;
        Answer(&answer).code()?;
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
            false => Err(io::Error::other("it does not know our password itself")),
        }
    }

    fn authenticate(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        put_bytes(&mut body, bytes);
        let answer = self.ask(SASL_AUTHENTICATE, 0, &body)?;
        let mut answer = Answer(&answer);
        answer.code()?;
        answer.text()?;
        Ok(answer.bytes()?.to_vec())
    }

    fn fetch_head(&mut self, topic: &str, partition: i32, offset: i64) -> io::Result<BatchHead> {
        const WAIT_MILLIS: i32 = 1_000;
        const READ_COMMITTED: u8 = 1;
        let mut body = Vec::new();
        let put = |body: &mut Vec<u8>, number: i32| body.extend(number.to_be_bytes());
        put(&mut body, -1); // no replica
        put(&mut body, WAIT_MILLIS);
        put(&mut body, 1); // bytes at least
        put(&mut body, 1); // and at most, but for the first batch, which comes whole
        body.push(READ_COMMITTED);
        put(&mut body, 0); // no session
        put(&mut body, -1);
        put(&mut body, 1); // topic
        put_text(&mut body, topic);
        put(&mut body, 1); // partition
        put(&mut body, partition);
        put(&mut body, -1); // whatever the epoch
        body.extend(offset.to_be_bytes());
        body.extend((-1_i64).to_be_bytes());
        put(&mut body, 1); // bytes at most, as above
        put(&mut body, 0); // nothing to forget
        // Version 10 is the first for zstd; every Kafka from 2.1 on has it.
        let answer = self.ask(FETCH, 10, &body)?;
        let mut answer = Answer(&answer);
        answer.take(4)?; // throttled
        answer.code()?;
        answer.take(4 + 4)?; // session, topics
        answer.text()?;
        answer.take(4 + 4)?; // partitions, number
        let no_batch = || io::Error::other(format!("there is no batch at offset {offset}"));
        match answer.i16()? {
            OFFSET_OUT_OF_RANGE => return Err(no_batch()),
            code => no_error(code)?,
        }
        answer.take(3 * 8)?; // high watermark, last stable offset, beginning
        for _ in 0..answer.i32()?.max(0) {
            answer.take(2 * 8)?; // an aborted transaction
        }
        if answer.i32()? <= 0 {
            return Err(no_batch());
        }
        answer.head()
    }
}

/// Kafka's protocol.html, "Api Keys".
const FETCH: i16 = 1;
const SASL_HANDSHAKE: i16 = 17;
const SASL_AUTHENTICATE: i16 = 36;

/// And "Error Codes".
const OFFSET_OUT_OF_RANGE: i16 = 1;

struct Scram<'a> {
    digest: MessageDigest,
    password: &'a str,
    first: String,
    nonce: String,
}

impl Scram<'_> {
    /// RFC 5802: what we say to the server's challenge, and what it then says if it knows the password too.
    fn answer(&self, challenge: &str) -> io::Result<(String, String)> {
        let wrong = || io::Error::other("its challenge is none of SCRAM's");
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
        |_| format!("error {code} of Kafka's protocol"),
        |error| error.to_string(),
    )))
}

fn put_text(into: &mut Vec<u8>, text: &str) {
    // Topics, mechanisms and our name are short.
    into.extend(i16::try_from(text.len()).unwrap_or(i16::MAX).to_be_bytes());
    into.extend(text.as_bytes());
}

fn put_bytes(into: &mut Vec<u8>, bytes: &[u8]) {
    into.extend(i32::try_from(bytes.len()).unwrap_or(i32::MAX).to_be_bytes());
    into.extend(bytes);
}

/// What of an answer is not read yet.
struct Answer<'a>(&'a [u8]);

impl<'a> Answer<'a> {
    fn take(&mut self, length: usize) -> io::Result<&'a [u8]> {
        let (taken, rest) = self
            .0
            .split_at_checked(length)
            .ok_or_else(|| io::Error::other("its answer is cut"))?;
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

    /// A batch's, of Kafka's message format 2 (0.11 and newer).
    fn head(&mut self) -> io::Result<BatchHead> {
        let first_offset = self.i64()?;
        let length = self.i32()?;
        self.take(4)?; // the leader's epoch
        if self.take(1)? != [2] {
            return Err(io::Error::other(
                "the batch has a format of before Kafka 0.11: where it ends is not known",
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
                _ => "of an unknown compression",
            },
            // Offset and length stand in front of what is counted.
            bytes: u64::try_from(length).unwrap_or(0) + 12,
        })
    }
}

#[expect(clippy::disallowed_methods, reason = "an edge: the answers have their time")]
fn now() -> Instant {
    Instant::now()
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
    fn a_head_that_is_cut_or_of_another_format_is_an_error() {
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
        let read = Answer(&head).head().unwrap();
        assert_eq!(read.to_string(), "offsets 7 to 10, 4 records, zstd, 112 bytes");
        for length in 0..head.len() {
            assert!(Answer(&head[..length]).head().is_err(), "{length}");
        }
        head[16] = 1;
        assert!(Answer(&head).head().is_err());
    }
}

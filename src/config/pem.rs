//! PEM files, read as OpenSSL's `X509_load_cert_file` reads them, which curl's `--cacert` uses too.
//!
//! Text around the blocks, a byte-order mark and blocks of other kinds are ignored.

use std::io::Cursor;

use openssl::pkey::PKey;
use openssl::x509::X509;
use x509_parser::asn1_rs::{Any, Class, FromDer, Oid, Tag, oid};
use x509_parser::error::PEMError;
use x509_parser::pem::Pem;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The certificates of a file, in their order; at least one.
///
/// # Errors
/// The file has no certificate, or one cannot be read. The text names the block and the reason.
pub(crate) fn certificates(file: &[u8]) -> Result<Vec<X509>, String> {
    let text = file.strip_prefix(BYTE_ORDER_MARK).unwrap_or(file);
    let mut certificates = Vec::new();
    let mut rest = text;
    let mut is_refused = false;
    loop {
        let block = match Pem::read(Cursor::new(rest)) {
            Err(PEMError::MissingHeader) => break,
            block => block,
        };
        let wrong = |what| {
            let begin = b"-----BEGIN ";
            let skipped = rest.windows(begin.len()).position(|bytes| bytes == begin);
            let before = &text[..text.len() - rest.len() + skipped.unwrap_or(0)];
            let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
            format!("the PEM block at line {line} {what}")
        };
        let (block, bytes_read) = block.map_err(|error| {
            wrong(match error {
                PEMError::IncompletePEM => "is cut off: it has no END line",
                PEMError::InvalidHeader => "has no valid BEGIN line",
                _ => "is not valid base64",
            })
        })?;
        if matches!(
            block.label.as_str(),
            "CERTIFICATE" | "X509 CERTIFICATE" | "TRUSTED CERTIFICATE"
        ) {
            let certificate =
                X509::from_der(&block.contents).map_err(|_| wrong("does not hold an X.509 certificate"))?;
            // In a TRUSTED CERTIFICATE, the purposes that it is trusted for follow the certificate.
            let behind = Any::from_der(&block.contents).map_or(&[][..], |(behind, _)| behind);
            if block.label.starts_with("TRUSTED") && !is_for_servers(behind) {
                is_refused = true;
            } else {
                certificates.push(certificate);
            }
        }
        rest = &rest[bytes_read..];
    }
    match (certificates.is_empty(), is_refused) {
        (false, _) => Ok(certificates),
        (true, true) => Err("the file marks all its certificates as not trusted for servers".into()),
        (true, false) if X509::from_der(file).is_ok() => Err(
            "the file holds a certificate in DER format; convert it: openssl x509 -inform DER -in FILE -out NEWFILE"
                .into(),
        ),
        (true, false) => Err("the file holds no certificate".into()),
    }
}

/// Why a file is not a private key without a passphrase; `None` if it is one.
pub(crate) fn private_key_fault(file: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(file);
    if !text.contains("PRIVATE KEY-----") {
        return Some("the file holds no private key".into());
    }
    if text.contains("ENCRYPTED") {
        return Some(
            "the key is encrypted, and an agent cannot ask for its passphrase; \
             decrypt it: openssl pkey -in FILE -out NEWFILE"
                .into(),
        );
    }
    let text = file.strip_prefix(BYTE_ORDER_MARK).unwrap_or(file);
    let key = PKey::private_key_from_pem_callback(text, |_| Ok(0));
    key.is_err()
        .then(|| "the private key cannot be read: it is damaged or of an unknown type".into())
}

/// Whether a trusted certificate may identify servers. `settings` is `X509_CERT_AUX` of OpenSSL's x_x509a.c: a list of the
/// purposes that the certificate is trusted for, then a list of those that it is rejected for, both optional.
fn is_for_servers(settings: &[u8]) -> bool {
    let Ok((_, settings)) = Any::from_der(settings) else {
        return true;
    };
    let lists = elements(settings.data);
    lists.iter().all(|list| {
        let purposes = elements(list.data);
        let names_servers = purposes.iter().any(|purpose| {
            let servers = [oid!(1.3.6.1.5.5.7.3.1), oid!(2.5.29.37.0)];
            servers.contains(&Oid::new(purpose.data.into()))
        });
        match (list.class(), list.tag()) {
            (Class::Universal, Tag::Sequence) => names_servers || purposes.is_empty(),
            (Class::ContextSpecific, Tag(0)) => !names_servers,
            _ => true,
        }
    })
}

fn elements(mut der: &[u8]) -> Vec<Any<'_>> {
    let mut elements = Vec::new();
    while let Ok((rest, element)) = Any::from_der(der) {
        elements.push(element);
        der = rest;
    }
    elements
}

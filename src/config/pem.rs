//! PEM files. Text around the blocks, a byte-order mark and blocks of other kinds are ignored; TRUSTED CERTIFICATE blocks are refused.

use openssl::pkey::PKey;
use openssl::x509::X509;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The certificates of a file, in their order; at least one.
///
/// # Errors
/// The file has no certificate, or one cannot be read.
pub(crate) fn certificates(file: &[u8]) -> Result<Vec<X509>, String> {
    let text = file.strip_prefix(BYTE_ORDER_MARK).unwrap_or(file);
    // OpenSSL's reader would leave them out without a word.
    if String::from_utf8_lossy(text).contains("-----BEGIN TRUSTED CERTIFICATE-----") {
        return Err(
            "the file holds a certificate in OpenSSL's own format (TRUSTED CERTIFICATE); convert it: openssl x509 -in FILE -out NEWFILE"
                .into(),
        );
    }
    match X509::stack_from_pem(text) {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) if X509::from_der(file).is_ok() => Err(
            "the file holds a certificate in DER format; convert it: openssl x509 -inform DER -in FILE -out NEWFILE"
                .into(),
        ),
        Ok(_) => Err("the file holds no certificate".into()),
        Err(error) => {
            let reason = error.errors().last().and_then(|error| error.reason());
            Err(format!(
                "a certificate of the file is damaged ({})",
                reason.unwrap_or("no reason")
            ))
        }
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

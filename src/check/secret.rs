//! Secrets of the host file: files in SECRETS_DIR, which are read again when they change.
//!
//! A target holds the files, not their contents. The contents are read when the host file is read, so that a missing or
//! broken secret is an error of its line, and again when a check finds that a file has changed.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use openssl::base64;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use crate::config::{Secret, pem};
use crate::files;
use crate::lock::lock;

/// The longest secret. It must fit into the header of a request.
const MAX_SECRET_BYTES: u64 = 8 << 10;
/// A long chain of certificates has 20 KiB.
const MAX_PEM_BYTES: u64 = 1 << 20;

/// A secret as it is sent.
pub struct SecretHeader {
    value: Secret,
    /// What must not be in any text: the secret in all forms in which a server could send it back.
    forms: Vec<Secret>,
}

impl SecretHeader {
    /// For the request only.
    pub fn header_value(&self) -> &str {
        self.value.reveal()
    }

    /// Replaces the secret by `***` in a text that a server may have sent.
    pub fn hide_in(&self, text: &mut String) {
        for form in self.forms.iter().map(Secret::reveal) {
            if text.contains(form) {
                *text = text.replace(form, "***");
            }
        }
    }

    fn new(value: String, forms: &[&str]) -> Self {
        let forms = forms.iter().filter(|form| !form.is_empty());
        Self {
            value: Secret::new(value),
            forms: forms.map(|form| Secret::new((*form).to_owned())).collect(),
        }
    }

    fn of_header([file]: [&[u8]; 1]) -> Result<Self, String> {
        let text = as_header(read_text(file)?)?;
        Ok(Self::new(text.to_owned(), &[text]))
    }

    /// The Authorization header (RFC 7617 and RFC 6750).
    fn of_auth([file]: [&[u8]; 1]) -> Result<Self, String> {
        let text = read_text(file)?;
        let bearer = text
            .split_once(' ')
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("Bearer"));
        if let Some((_, token)) = bearer {
            return Ok(Self::new(as_header(text)?.to_owned(), &[token.trim()]));
        }
        let Some((_, password)) = text.split_once(':') else {
            return Err("expected `user:password` or `Bearer TOKEN` in the file".to_owned());
        };
        let encoded = base64::encode_block(text.as_bytes());
        Ok(Self::new(format!("Basic {encoded}"), &[text, &encoded, password]))
    }
}

/// The text of a secret without the line break at its end.
fn read_text(file: &[u8]) -> Result<&str, String> {
    let text = std::str::from_utf8(file).map_err(|_| "the file is not UTF-8".to_owned())?;
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.trim().is_empty() {
        return Err("the file is empty".to_owned());
    }
    if text.contains(char::is_control) {
        return Err("expected one line without control characters in the file".to_owned());
    }
    Ok(text)
}

fn as_header(text: &str) -> Result<&str, String> {
    let is_printable = |c: char| c == ' ' || c.is_ascii_graphic();
    match text.chars().all(is_printable) {
        true => Ok(text),
        false => Err("expected ASCII in the file, because headers hold nothing else".to_owned()),
    }
}

/// A client certificate with its key, from `NAME.crt` and `NAME.key`.
pub struct ClientCertificate(pub Arc<CertifiedKey>);

impl ClientCertificate {
    fn read([certificates, key]: [&[u8]; 2]) -> Result<Self, String> {
        let certificates: Vec<CertificateDer<'static>> = pem::certificates(certificates)
            .map_err(|why| format!("{why} (.crt)"))?
            .iter()
            .filter_map(|certificate| certificate.to_der().ok())
            .map(CertificateDer::from)
            .collect();
        if let Some(why) = pem::private_key_fault(key) {
            return Err(format!("{why} (.key)"));
        }
        let unusable =
            || "the key is of a type that is not supported (.key); use RSA, P-256 or P-384".to_owned();
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| unusable())?;
        let key = rustls::crypto::ring::default_provider()
            .key_provider
            .load_private_key(key)
            .map_err(|_| unusable())?;
        let certified = CertifiedKey::new(certificates, key);
        certified
            .keys_match()
            .map_err(|_| "the key (.key) does not belong to the certificate (.crt)".to_owned())?;
        Ok(Self(Arc::new(certified)))
    }
}

/// What `N` files hold, read again when one of them has changed.
pub struct Watched<T, const N: usize> {
    name: String,
    paths: [PathBuf; N],
    max_bytes: u64,
    read: fn([&[u8]; N]) -> Result<T, String>,
    current: Mutex<Current<T, N>>,
}

struct Current<T, const N: usize> {
    states: [Option<files::FileState>; N],
    value: Arc<T>,
}

pub type SecretFile = Watched<SecretHeader, 1>;
pub type CertificateFiles = Watched<ClientCertificate, 2>;

impl SecretFile {
    /// The secret of `auth=@NAME`.
    pub fn auth(folder: &Path, name: &str) -> Result<Self, String> {
        Self::open(name, [folder.join(name)], MAX_SECRET_BYTES, SecretHeader::of_auth)
    }

    /// The secret of `header="NAME: @NAME"`.
    pub fn header(folder: &Path, name: &str) -> Result<Self, String> {
        Self::open(
            name,
            [folder.join(name)],
            MAX_SECRET_BYTES,
            SecretHeader::of_header,
        )
    }
}

impl CertificateFiles {
    /// The client certificate of `cert=@NAME`.
    pub fn certificate(folder: &Path, name: &str) -> Result<Self, String> {
        let paths = ["crt", "key"].map(|extension| folder.join(format!("{name}.{extension}")));
        Self::open(name, paths, MAX_PEM_BYTES, ClientCertificate::read)
    }
}

impl<T, const N: usize> Watched<T, N> {
    fn open(
        name: &str,
        paths: [PathBuf; N],
        max_bytes: u64,
        read: fn([&[u8]; N]) -> Result<T, String>,
    ) -> Result<Self, String> {
        // Before the reading: a change in between is then noticed at the next look.
        let states = states(&paths);
        let value = Arc::new(read_all(&paths, max_bytes, read)?);
        Ok(Self {
            name: name.to_owned(),
            paths,
            max_bytes,
            read,
            current: Mutex::new(Current { states, value }),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// What the files hold now. If they cannot be used, the last good value stays, and this is logged once.
    pub fn value(&self) -> Arc<T> {
        let states = states(&self.paths);
        // A panic cannot leave it half changed.
        let mut current = lock(&self.current);
        if current.states != states {
            match read_all(&self.paths, self.max_bytes, self.read) {
                Ok(value) => current.value = Arc::new(value),
                Err(why) => log::warn!(
                    "the secret @{} has changed, but {why}; its last value stays in use",
                    self.name
                ),
            }
            current.states = states;
        }
        Arc::clone(&current.value)
    }
}

/// Two are equal if they are the same files.
impl<T, const N: usize> PartialEq for Watched<T, N> {
    fn eq(&self, other: &Self) -> bool {
        self.paths == other.paths
    }
}

impl<T, const N: usize> fmt::Debug for Watched<T, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "@{}", self.name)
    }
}

fn states<const N: usize>(paths: &[PathBuf; N]) -> [Option<files::FileState>; N] {
    paths.each_ref().map(|path| files::state(path))
}

fn read_all<T, const N: usize>(
    paths: &[PathBuf; N],
    max_bytes: u64,
    read: fn([&[u8]; N]) -> Result<T, String>,
) -> Result<T, String> {
    let mut contents = [const { Vec::new() }; N];
    for (path, content) in paths.iter().zip(&mut contents) {
        *content =
            files::read(path, max_bytes).map_err(|error| format!("{path:?} cannot be read: {error}"))?;
    }
    read(contents.each_ref().map(Vec::as_slice))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auth(text: &str) -> Result<String, String> {
        SecretHeader::of_auth([text.as_bytes()]).map(|header| header.header_value().to_owned())
    }

    #[test]
    fn a_user_with_a_password_or_a_bearer_token_becomes_an_authorization_header() {
        let good = [
            // The example of RFC 7617, section 2.
            ("Aladdin:open sesame", "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
            ("Aladdin:open sesame\n", "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
            ("u:p:q\r\n", "Basic dTpwOnE="),
            ("Bearer abc.def\n", "Bearer abc.def"),
            ("bearer abc", "bearer abc"),
        ];
        for (text, expected) in good {
            assert_eq!(auth(text).as_deref(), Ok(expected), "{text:?}");
        }
        for text in [
            "",
            "\n",
            " ",
            "token",
            "Basic dTpw",
            "u:p\nv:q",
            "u:p\n\n",
            "u:\0",
            "Bearer ü",
        ] {
            assert!(auth(text).is_err(), "{text:?}");
        }
        assert!(SecretHeader::of_header([b"\xff"]).is_err());
        assert!(SecretHeader::of_header(["ü".as_bytes()]).is_err());
        assert!(auth("ü:p").is_ok());
    }

    #[test]
    fn a_secret_is_hidden_in_every_form_in_which_a_server_may_send_it_back() {
        let basic = SecretHeader::of_auth([b"me:hunter2"]).unwrap();
        let mut text = "got bWU6aHVudGVyMg== of me:hunter2, hunter2!".to_owned();
        basic.hide_in(&mut text);
        assert_eq!(text, "got *** of ***, ***!");
        let bearer = SecretHeader::of_auth([b"Bearer abc"]).unwrap();
        let mut text = "Bearer abc".to_owned();
        bearer.hide_in(&mut text);
        assert_eq!(text, "Bearer ***");
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_broken_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let write = |text: &str| {
            // As Kubernetes and editors do: a new file takes the place of the old one.
            std::fs::write(folder.path().join("new"), text).unwrap();
            std::fs::rename(folder.path().join("new"), &path).unwrap();
        };
        write("one\n");
        let file = SecretFile::header(folder.path(), "key").unwrap();
        let value = || file.value().header_value().to_owned();
        assert_eq!(value(), "one");
        write("two");
        assert_eq!(value(), "two");
        write("");
        assert_eq!(value(), "two");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(value(), "two");
        write("three");
        assert_eq!(value(), "three");
        assert_eq!(format!("{file:?}"), "@key");
    }
}

//! The files that a host file names: secrets and bodies.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::Hash;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::check::secret::{CertificateFiles, SecretFile};
use crate::files;

/// The longest body of a request. It stays in memory, and a check is no upload.
pub(super) const MAX_REQUEST_BODY_BYTES: u64 = 1 << 20;

/// Where a host file's secrets and bodies come from. Each file is read once, however many hosts use it. The errors say why one
/// cannot be used.
pub struct Files<'a> {
    /// SECRETS_DIR.
    secrets: Option<&'a Path>,
    /// The folder to which the paths of bodies are relative; `None` if no body may be read from a file.
    bodies: Option<&'a Path>,
    auths: Known<String, Arc<SecretFile>>,
    headers: Known<String, Arc<SecretFile>>,
    certificates: Known<String, Arc<CertificateFiles>>,
    texts: Known<String, Arc<[u8]>>,
}

type Known<K, V> = RefCell<HashMap<K, Result<V, String>>>;

impl<'a> Files<'a> {
    pub fn new(secrets: Option<&'a Path>, bodies: Option<&'a Path>) -> Self {
        Self {
            secrets,
            bodies,
            auths: Known::default(),
            headers: Known::default(),
            certificates: Known::default(),
            texts: Known::default(),
        }
    }

    /// A warning for each secret that was read and that every user of the machine can read too.
    pub fn warnings(&self) -> Vec<String> {
        let mut paths: Vec<PathBuf> = Vec::new();
        for known in [&self.auths, &self.headers] {
            let known = known.borrow();
            paths.extend(known.values().flatten().flat_map(|file| file.paths()).cloned());
        }
        let certificates = self.certificates.borrow();
        paths.extend(
            certificates
                .values()
                .flatten()
                .filter_map(|file| file.paths().last())
                .cloned(),
        );
        paths.sort();
        paths.dedup();
        let exposed = paths
            .iter()
            .filter_map(|path| Some((path, files::mode_if_exposed(path)?)));
        exposed
            .map(|(path, mode)| {
                format!(
                    "every user of this machine can read the secret {path:?} (mode {mode:04o}); `chmod o-r` prevents that"
                )
            })
            .collect()
    }

    pub(super) fn auth(&self, name: &str) -> Result<Arc<SecretFile>, String> {
        let folder = self.secrets()?;
        known(&self.auths, name.to_owned(), || {
            SecretFile::auth(folder, name).map(Arc::new)
        })
    }

    pub(super) fn header(&self, name: &str) -> Result<Arc<SecretFile>, String> {
        let folder = self.secrets()?;
        known(&self.headers, name.to_owned(), || {
            SecretFile::header(folder, name).map(Arc::new)
        })
    }

    pub(super) fn certificate(&self, name: &str) -> Result<Arc<CertificateFiles>, String> {
        let folder = self.secrets()?;
        known(&self.certificates, name.to_owned(), || {
            CertificateFiles::certificate(folder, name).map(Arc::new)
        })
    }

    pub(super) fn body(&self, path: &str) -> Result<Arc<[u8]>, String> {
        let folder = self
            .bodies
            .ok_or("a body can be read from a file only for the hosts of a host file")?;
        known(&self.texts, path.to_owned(), || {
            let path = folder.join(path);
            let contents = files::read(&path, MAX_REQUEST_BODY_BYTES)
                .map_err(|error| format!("{path:?} cannot be read: {error}"))?;
            Ok(contents.into())
        })
    }

    fn secrets(&self) -> Result<&'a Path, String> {
        self.secrets
            .ok_or_else(|| "set SECRETS_DIR to the directory with the files of secrets".to_owned())
    }
}

fn known<K: Hash + Eq, V: Clone>(
    known: &Known<K, V>,
    key: K,
    read: impl FnOnce() -> Result<V, String>,
) -> Result<V, String> {
    known.borrow_mut().entry(key).or_insert_with(read).clone()
}

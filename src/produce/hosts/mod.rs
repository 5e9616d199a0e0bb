//! Where the hosts come from: files, standard input and the table of hosts.
//!
//! Owns the first reading, and the threads that notice later changes: one for each source, because a database that does not
//! answer must not delay a file. `rows` reads rows, `table` asks Postgres, `list` compares lists, and `host_file` reads lines.
//! Each source keeps its last good list, so an error in one changes nothing of the others.

pub mod list;
pub mod rows;
mod table;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};

use crate::check::target::Target;
use crate::clock::instant_now;
use crate::config::{HostsConfig, WrongInput};
use crate::lock::lock;
use crate::outage::Outage;
use crate::postgres::{Fault, Kind};
use crate::produce::host_file::{self, Files, HostFileError, Hosts};
use crate::produce::hosts::list::{Changes, HostList};
use crate::produce::hosts::rows::{TableHosts, read_rows};
use crate::produce::hosts::table::Table;
use crate::thread::start_thread;

/// What `-c` names the table of hosts.
pub const TABLE: &str = "postgres:";

/// A change of a file is noticed within this time, and read when it has been the same for as long; a change of the table is
/// read within this time.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A table is read that often even if its version stays the same: it may have been renamed, or filled without its triggers.
const READ_TABLE_EVERY: Duration = Duration::from_secs(60);

/// The wait before a database that did not answer is asked again.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// The sources of the hosts.
#[derive(Default)]
pub struct Sources(Vec<Source>);

struct Source {
    origin: Origin,
    /// Of the file's content, or of the table's rows, when they were first read.
    hash: Option<u64>,
    /// The last good list. Empty if there is only one source.
    targets: Vec<Target>,
    /// Whether there was no error since that list.
    is_current: bool,
}

#[derive(Clone)]
enum Origin {
    /// Cannot be read again.
    Stdin,
    File(PathBuf),
    Table(Arc<HostsConfig>),
}

impl Sources {
    /// One file, which was read just now; `None`: standard input.
    pub fn of_file(path: Option<&Path>) -> Self {
        Self(vec![Source {
            origin: path.map_or(Origin::Stdin, |path| Origin::File(path.to_owned())),
            hash: path
                .filter(|path| !is_special(path))
                .map(|path| hash_of(&host_file::contents(path))),
            targets: Vec::new(),
            is_current: true,
        }])
    }

    /// Reads the files among the arguments of `-c`. `secrets` is SECRETS_DIR.
    pub fn read_files(names: &[PathBuf], secrets: Option<&Path>) -> Result<(Self, Hosts), HostFileError> {
        let mut sources = Vec::new();
        let mut all = Hosts::default();
        let mut errors = Vec::new();
        let files: Vec<&PathBuf> = names.iter().filter(|name| !is_table(name)).collect();
        let is_only_one = names.len() == 1;
        for path in files {
            let origin = match host_file::is_stdin(path) {
                true => Origin::Stdin,
                false => Origin::File(path.clone()),
            };
            let contents = host_file::contents(path);
            let hash = Some(hash_of(&contents));
            match host_file::parse_contents(path, contents, secrets) {
                Ok(hosts) => {
                    let targets = if is_only_one {
                        Vec::new()
                    } else {
                        hosts.targets.clone()
                    };
                    sources.push(Source {
                        origin,
                        hash,
                        targets,
                        is_current: true,
                    });
                    all.targets.extend(hosts.targets);
                    all.profiles.extend(hosts.profiles);
                    all.warnings.extend(hosts.warnings);
                }
                Err(error) => errors.push(error.0),
            }
        }
        if errors.is_empty() {
            check_addresses(&sources)?;
            return Ok((Self(sources), all));
        }
        Err(HostFileError(errors.join("\n")))
    }

    /// Reads the table as well. A table that cannot be read is waited for, unless `is_needed`; until then the hosts are those of
    /// HOSTS_CACHE_FILE.
    ///
    /// # Errors
    /// There is no such table, or it may not be read. [`WrongInput`]: an address is also in a file.
    pub fn add_table(
        &mut self,
        config: &HostsConfig,
        secrets: Option<&Path>,
        hosts: &mut Hosts,
        is_needed: bool,
    ) -> anyhow::Result<()> {
        let mut table = Table::new(config).context("cannot read the table of hosts")?;
        let read = table.rows();
        let (hash, of_table) = match read {
            Ok(rows) => {
                let read =
                    read_with_secrets(&table.name(), &rows, secrets).map_err(|error| WrongInput(error.0))?;
                keep(&mut table, config, &read);
                (Some(hash_of_rows(&rows)), read.hosts)
            }
            Err(fault) => (None, cached(config, secrets, &fault, is_needed)?),
        };
        self.push_table(config, hash, of_table, hosts);
        check_addresses(&self.0).map_err(|error| WrongInput(error.0))?;
        Ok(())
    }

    /// Reads the table as well, but changes nothing there: for `validate`.
    ///
    /// # Errors
    /// The table cannot be read. [`WrongInput`]: rows are wrong, or addresses are also in a file.
    pub fn validate_table(
        &mut self,
        config: &HostsConfig,
        secrets: Option<&Path>,
        hosts: &mut Hosts,
    ) -> anyhow::Result<()> {
        let mut table = Table::new(config).context("cannot read the table of hosts")?;
        let name = table.name();
        let rows = table
            .rows()
            .map_err(|fault| anyhow!("{name} cannot be read: {fault}"))?;
        let read = read_with_secrets(&name, &rows, secrets).map_err(|error| WrongInput(error.0))?;
        self.push_table(config, None, read.hosts, hosts);
        let mut errors = rows::messages(&name, &read.wrong);
        errors.extend(check_addresses(&self.0).err().map(|error| error.0));
        match errors.is_empty() {
            true => Ok(()),
            false => Err(WrongInput(errors.join("\n")).into()),
        }
    }

    fn push_table(&mut self, config: &HostsConfig, hash: Option<u64>, of_table: Hosts, hosts: &mut Hosts) {
        hosts.warnings.extend(of_table.warnings);
        let targets = match self.0.is_empty() {
            true => Vec::new(),
            false => of_table.targets.clone(),
        };
        hosts.targets.extend(of_table.targets);
        self.0.push(Source {
            origin: Origin::Table(Arc::new(config.clone())),
            hash,
            targets,
            is_current: hash.is_some(),
        });
    }

    /// Watches all sources except standard input, each on a thread of its own. `hosts` is what they had. `put` takes what a new
    /// list changes; `has_error` tells whether the newest list of a source is not in use. The threads end after the result is
    /// dropped.
    pub(super) fn watch(
        self,
        hosts: HostList,
        secrets: Option<PathBuf>,
        has_error: Arc<AtomicBool>,
        put: impl Fn(Changes) + Send + Sync + 'static,
    ) -> io::Result<Watch> {
        let sources = self.0.iter();
        let origins: Vec<_> = sources
            .map(|source| (source.origin.clone(), source.hash))
            .collect();
        let shared = Arc::new(Shared {
            lists: Mutex::new(Lists {
                sources: self.0,
                all: hosts,
                are_in_conflict: false,
            }),
            requests: Mutex::default(),
            requested: Condvar::new(),
            secrets,
            has_error,
            put: Box::new(put),
        });
        shared.note_errors(&shared.lists());
        let has_stdin = origins.iter().any(|(origin, _)| matches!(origin, Origin::Stdin));
        for (index, (origin, hash)) in origins.into_iter().enumerate() {
            let shared = Arc::clone(&shared);
            match origin {
                Origin::Stdin => continue,
                Origin::File(path) => start_thread("hosts", move || shared.watch_file(index, &path, hash))?,
                Origin::Table(config) => {
                    start_thread("hosts", move || shared.watch_table(index, &config, hash))?
                }
            };
        }
        Ok(Watch { shared, has_stdin })
    }
}

/// The threads that watch the sources.
pub(super) struct Watch {
    shared: Arc<Shared>,
    has_stdin: bool,
}

impl Watch {
    /// Has every source read again, whether it has changed or not.
    pub(super) fn reload(&self) {
        if self.has_stdin {
            log::warn!(
                "reload: the host file was read from standard input and cannot be read again; its hosts stay as they were"
            );
        }
        self.shared.requests().reloads += 1;
        self.shared.requested.notify_all();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.requests().is_over = true;
        self.shared.requested.notify_all();
    }
}

struct Shared {
    lists: Mutex<Lists>,
    requests: Mutex<Requests>,
    requested: Condvar,
    /// SECRETS_DIR.
    secrets: Option<PathBuf>,
    has_error: Arc<AtomicBool>,
    put: Box<dyn Fn(Changes) + Send + Sync>,
}

struct Lists {
    sources: Vec<Source>,
    /// The hosts that are checked.
    all: HostList,
    /// Two sources have the same address.
    are_in_conflict: bool,
}

#[derive(Default)]
struct Requests {
    reloads: u64,
    is_over: bool,
}

impl Shared {
    fn watch_file(&self, index: usize, path: &Path, mut known: Option<u64>) {
        let mut last = None;
        let mut reloads = 0;
        let look_every = if is_special(path) {
            Duration::MAX
        } else {
            LOOK_EVERY
        };
        while let Some(is_requested) = self.wait(&mut reloads, look_every) {
            let begun_at = instant_now();
            let contents = match look_every {
                // A pipe that has replaced the file would block.
                LOOK_EVERY if is_special(path) => Err(io::Error::other("it is not a regular file any more")),
                _ => host_file::contents(path),
            };
            let hash = Some(hash_of(&contents));
            // A program that writes a file in parts pauses for less than the time between two looks.
            let is_complete = std::mem::replace(&mut last, hash) == hash;
            if !is_requested && (!is_complete || hash == known) {
                continue;
            }
            known = hash;
            match host_file::parse_contents(path, contents, self.secrets.as_deref()) {
                Ok(hosts) => self.take(index, begun_at, hosts),
                Err(error) => self.refuse(index, &error.0),
            }
        }
    }

    fn watch_table(&self, index: usize, config: &HostsConfig, mut hash: Option<u64>) {
        let mut table = match Table::new(config) {
            Ok(table) => table,
            Err(error) => return self.refuse(index, &format!("the table of hosts cannot be read: {error}")),
        };
        let name = table.name();
        // Its version before the last reading, and the time of that.
        let mut last: Option<(Option<i64>, Instant)> = None;
        // Whether the newest list that was read is in use.
        let mut is_good = hash.is_some();
        let (mut outage, mut reloads, mut wait) = (Outage::default(), 0, LOOK_EVERY);
        while let Some(is_requested) = self.wait(&mut reloads, wait) {
            let begun_at = instant_now();
            let read = table.version().and_then(|version| {
                let is_known = last.is_some_and(|(known, read_at)| {
                    version.is_some() && version == known && begun_at - read_at < READ_TABLE_EVERY
                });
                if is_known && !is_requested {
                    return Ok(None);
                }
                let rows = table.rows()?;
                last = Some((version, begun_at));
                Ok(Some(rows))
            });
            wait = LOOK_EVERY;
            let rows = match read {
                Ok(rows) => {
                    if let Some(lasted) = outage.end(instant_now()) {
                        log::info!("{name} can be read again after {} s", lasted.as_secs());
                        self.set_current(index, is_good);
                    }
                    rows
                }
                Err(fault) => {
                    wait = RETRY_AFTER;
                    outage.begin(instant_now(), fault.text);
                    if let Some((reason, _)) = outage.take_report(instant_now()) {
                        log::error!("{name} cannot be read, so its hosts stay as they were: {reason}");
                        self.set_current(index, false);
                    }
                    continue;
                }
            };
            let Some(rows) = rows else { continue };
            let new = hash_of_rows(&rows);
            if hash == Some(new) && !is_requested {
                continue;
            }
            match read_with_secrets(&name, &rows, self.secrets.as_deref()) {
                Ok(read) => {
                    (hash, is_good) = (Some(new), true);
                    keep(&mut table, config, &read);
                    self.take(index, begun_at, read.hosts);
                }
                Err(error) => {
                    is_good = false;
                    if hash.replace(new) != Some(new) {
                        self.refuse(index, &error.0);
                    }
                }
            }
        }
    }

    /// Waits for a reload, or that long. True: a reload was requested. `None`: it is over.
    fn wait(&self, reloads: &mut u64, within: Duration) -> Option<bool> {
        let requests = self.requests();
        let is_idle = |requests: &mut Requests| !requests.is_over && requests.reloads == *reloads;
        let waited = self.requested.wait_timeout_while(requests, within, is_idle);
        let (requests, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let is_requested = requests.reloads != *reloads;
        *reloads = requests.reloads;
        (!requests.is_over).then_some(is_requested)
    }

    /// A source has a new list, which was read since then.
    fn take(&self, index: usize, begun_at: Instant, hosts: Hosts) {
        let Hosts {
            targets, warnings, ..
        } = hosts;
        let mut lists = self.lists();
        let Lists {
            sources,
            all,
            are_in_conflict,
        } = &mut *lists;
        sources[index].targets = targets;
        sources[index].is_current = true;
        let targets = match sources.as_mut_slice() {
            [only] => std::mem::take(&mut only.targets),
            sources => {
                let checked = check_addresses(sources);
                *are_in_conflict = checked.is_err();
                if let Err(error) = checked {
                    self.note_errors(&lists);
                    log::error!("reload: the hosts stay as they were: {error}");
                    return;
                }
                let targets = sources.iter().flat_map(|source| &source.targets);
                targets.cloned().collect()
            }
        };
        let changes = all.replace(begun_at, targets, warnings);
        self.note_errors(&lists);
        // While the lists are locked, because the changes have an order.
        (self.put)(changes);
    }

    /// A source has an error.
    fn refuse(&self, index: usize, error: &str) {
        self.set_current(index, false);
        log::error!("reload: the hosts stay as they were: {error}");
    }

    fn set_current(&self, index: usize, is_current: bool) {
        let mut lists = self.lists();
        lists.sources[index].is_current = is_current;
        self.note_errors(&lists);
    }

    fn note_errors(&self, lists: &Lists) {
        let has_error = lists.are_in_conflict || !lists.sources.iter().all(|source| source.is_current);
        self.has_error.store(has_error, Ordering::Relaxed);
    }

    fn lists(&self) -> MutexGuard<'_, Lists> {
        lock(&self.lists)
    }

    fn requests(&self) -> MutexGuard<'_, Requests> {
        lock(&self.requests)
    }
}

/// Whether an argument of `-c` is the table.
pub fn is_table(name: &Path) -> bool {
    name == Path::new(TABLE)
}

/// The rows cannot name files with bodies, because there is no folder to which the paths could be relative.
fn read_with_secrets(
    table: &str,
    rows: &[rows::HostRow],
    secrets: Option<&Path>,
) -> Result<TableHosts, HostFileError> {
    let files = Files::new(secrets, None);
    let mut read = read_rows(table, rows, &files)?;
    read.hosts.warnings.extend(files.warnings());
    Ok(read)
}

/// A pipe or a device. It may block, and its content is gone when it has been read.
fn is_special(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| !found.is_file())
}

/// The hosts of HOSTS_CACHE_FILE, or none, instead of those of a table that cannot be read.
fn cached(
    config: &HostsConfig,
    secrets: Option<&Path>,
    fault: &Fault,
    is_needed: bool,
) -> anyhow::Result<Hosts> {
    let name = table::name(config);
    let cache = config.cache_file.as_deref().filter(|path| path.exists());
    match cache {
        Some(path) => {
            let hosts =
                host_file::read(path, secrets).map_err(|error| anyhow!("HOSTS_CACHE_FILE: {error}"))?;
            log::warn!(
                "{name} cannot be read: {fault}; until it can, the {} hosts of {} are checked",
                hosts.targets.len(),
                path.display()
            );
            Ok(hosts)
        }
        None if fault.kind == Kind::Passing && !is_needed => {
            log::warn!("{name} cannot be read: {fault}; until it can, none of its hosts are checked");
            Ok(Hosts::default())
        }
        None => Err(anyhow!("{name} cannot be read: {fault}")),
    }
}

/// What is done with every list that was read: wrong rows are logged and noted in the table, the others are cached.
fn keep(table: &mut Table, config: &HostsConfig, read: &TableHosts) {
    let name = table.name();
    table.log(&read.wrong);
    table.write_errors(&read.wrong);
    if let Some(path) = &config.cache_file
        && let Err(error) = table::write_cache(path, &name, &read.lines)
    {
        log::error!("HOSTS_CACHE_FILE {}: cannot be written: {error}", path.display());
    }
}

/// Whether each address is in one source only.
fn check_addresses(sources: &[Source]) -> Result<(), HostFileError> {
    const MAX_NAMED: usize = 100;
    if sources.len() < 2 {
        return Ok(());
    }
    let mut known = HashMap::new();
    let mut twice = Vec::new();
    for Source { origin, targets, .. } in sources {
        for target in targets {
            match known.entry(target.address.as_str()) {
                Entry::Vacant(entry) => drop(entry.insert(origin)),
                Entry::Occupied(entry) => twice.push((target.address.as_str(), *entry.get(), origin)),
            }
        }
    }
    if twice.is_empty() {
        return Ok(());
    }
    let mut errors: Vec<String> = twice
        .iter()
        .take(MAX_NAMED)
        .map(|(address, first, second)| {
            let (first, second) = (first.place(address), second.place(address));
            format!("{first}: the address {address:?} is also in {second}; remove one of the two")
        })
        .collect();
    if twice.len() > MAX_NAMED {
        errors.push(format!("and {} more addresses", twice.len() - MAX_NAMED));
    }
    Err(HostFileError(errors.join("\n")))
}

impl Origin {
    /// Where the address is, for a person.
    fn place(&self, address: &str) -> String {
        match self {
            Self::Stdin => "<stdin>".to_owned(),
            Self::Table(config) => table::name(config),
            Self::File(path) => {
                let text = host_file::contents(path).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                let has_address = |line: &str| line.split_whitespace().next() == Some(address);
                match text.lines().position(has_address) {
                    Some(index) => format!("{}:{}", path.display(), index + 1),
                    None => path.display().to_string(),
                }
            }
        }
    }
}

/// An error counts as content, so that a file that cannot be read is reported once.
fn hash_of(contents: &io::Result<Vec<u8>>) -> u64 {
    let mut hasher = DefaultHasher::new();
    match contents {
        Ok(bytes) => (true, bytes).hash(&mut hasher),
        Err(error) => (false, error.to_string()).hash(&mut hasher),
    }
    hasher.finish()
}

fn hash_of_rows(rows: &[rows::HostRow]) -> u64 {
    let mut hasher = DefaultHasher::new();
    rows.hash(&mut hasher);
    hasher.finish()
}

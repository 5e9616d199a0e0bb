//! `host-metrics page`: serves the status page, or writes its files.
//!
//! Reads, renders and publishes the page every ten seconds, whatever the number of visitors. While Postgres is away, the last
//! snapshot is rendered again with its age.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use futures_util::future::{Either, select};
use tokio::sync::Notify;
use tokio_postgres::error::SqlState;

use crate::clock::{instant_now, wall_micros};
use crate::config::PageConfig;
use crate::http::server::Server;
use crate::outage::Outage;
use crate::page::reader::Reader;
use crate::page::server::{LIMITS, PublishedFiles};
use crate::page::snapshot::Snapshot;
use crate::page::{Files, render};
use crate::postgres::{self, Kind};
use crate::shutdown::{Shutdown, Wake};

/// Often enough for a page of minutes, and a small load for the database.
const ROUND: Duration = Duration::from_secs(10);

/// The same until there is a page, so that it appears soon after the tables.
const FIRST_ROUND: Duration = Duration::from_secs(1);

/// A page whose server listens.
pub struct Page {
    config: PageConfig,
    files: PublishedFiles,
    server: Server,
}

impl Page {
    /// Listens. There is no page before the first round of [`Page::run`].
    pub fn start(config: PageConfig) -> anyhow::Result<Self> {
        let files = PublishedFiles::new(&config.logins);
        let server = Server::start("page", "PAGE_ADDR", config.addr, LIMITS, files.clone().service())?;
        log::info!("page at http://{}/", server.address());
        Ok(Self {
            config,
            files,
            server,
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Reads, renders and publishes until a stop is requested.
    ///
    /// # Errors
    /// The first login is refused. Later errors of the database are waited out.
    pub fn run(&self, shutdown: &Shutdown) -> anyhow::Result<()> {
        rounds(&self.config, &self.files, shutdown)
    }
}

fn rounds(config: &PageConfig, files: &PublishedFiles, shutdown: &Shutdown) -> anyhow::Result<()> {
    let runtime = postgres::runtime()?;
    let mut reader = Reader::new(config.database.clone());
    let mut outage = Outage::default();
    let mut last: Option<Snapshot> = None;
    let mut next = instant_now();
    let woken = Arc::new(Notify::new());
    shutdown.on_request({
        let woken = Arc::clone(&woken);
        move || woken.notify_one()
    });
    loop {
        match shutdown.wait_until(next) {
            Wake::Stop => return Ok(()),
            Wake::Reload => continue,
            Wake::Due => {}
        }
        let begun = instant_now();
        let Some(read) = runtime.block_on(read_unless_stopped(&mut reader, shutdown, &woken)) else {
            return Ok(());
        };
        match read {
            Ok(snapshot) => {
                if let Some(lasted) = outage.end(instant_now()) {
                    log::info!("Postgres is back after {:.0} s", lasted.as_secs_f64());
                }
                last = Some(snapshot);
            }
            // `init` or `consume` may still create the tables.
            Err(fault)
                if fault.kind != Kind::Passing
                    && last.is_none()
                    && fault.code != Some(SqlState::UNDEFINED_TABLE) =>
            {
                return Err(anyhow!("{fault}"));
            }
            Err(fault) => outage.begin(begun, fault.text),
        }
        if let Some((reason, lasts)) = outage.take_report(instant_now()) {
            log::warn!(
                "waiting for Postgres: {reason} (for {:.0} s)",
                lasts.as_secs_f64()
            );
        }
        if let Some(snapshot) = &last {
            files.put(render(snapshot, &config.options, wall_micros()));
        }
        files.set_ready(match outage.reason() {
            None => Ok(()),
            Some(reason) => Err(format!("waiting for Postgres: {reason}")),
        });
        // A slow round leaves the database and this machine as much time as it took.
        let pause = if last.is_some() { ROUND } else { FIRST_ROUND };
        next = (begun + pause).max(instant_now() + begun.elapsed());
    }
}

/// A database that does not answer must not delay a stop.
async fn read_unless_stopped(
    reader: &mut Reader,
    shutdown: &Shutdown,
    woken: &Notify,
) -> Option<Result<Snapshot, postgres::Fault>> {
    let stop = async {
        while !shutdown.requested() {
            woken.notified().await;
        }
    };
    match select(pin!(reader.read()), pin!(stop)).await {
        Either::Left((read, _)) => Some(read),
        Either::Right(_) => None,
    }
}

/// Writes the files once, for another server.
pub fn write(config: &PageConfig, directory: &Path) -> anyhow::Result<()> {
    let snapshot = postgres::runtime()?
        .block_on(Reader::new(config.database.clone()).read())
        .map_err(|fault| anyhow!("{fault}"))?;
    let files = render(&snapshot, &config.options, wall_micros());
    write_files(&files, directory)?;
    log::info!("{} files written to {}", files.len(), directory.display());
    Ok(())
}

/// Each file is replaced as a whole, so that a visitor never gets a part of one.
fn write_files(files: &Files, directory: &Path) -> anyhow::Result<()> {
    for (name, file) in files {
        let path = directory.join(name);
        let parent = path.parent().unwrap_or(directory);
        let write = || -> anyhow::Result<()> {
            fs::create_dir_all(parent)?;
            let mut temporary = tempfile::Builder::new().prefix(".page-").tempfile_in(parent)?;
            std::io::Write::write_all(&mut temporary, &file.body)?;
            // The web server, which is another user, reads the file. Only its owner may read a temporary file.
            let mode = fs::Permissions::from_mode(0o644);
            temporary.as_file().set_permissions(mode)?;
            temporary.persist(&path)?;
            Ok(())
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

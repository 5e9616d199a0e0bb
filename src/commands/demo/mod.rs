//! `host-metrics demo`: the whole pipeline in one process.
//!
//! Owns the order in which the parts start and stop, the live display and the ledger. The agents are the real ones, each on
//! its own thread. Kafka is librdkafka's in-process broker, and Postgres is a temporary cluster.

pub mod postgres;
pub mod site;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use log::LevelFilter;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;

use self::postgres::ThrowAwayPostgres;
use self::site::SampleSite;
use crate::check::target::Target;
use crate::clock::instant_now;
use crate::commands::page::Page;
use crate::commands::screen::{Notices, Screen, first_lines};
use crate::commands::{audit, status};
use crate::config::{
    self, CheckConfig, ConsumeConfig, DatabaseConfig, ProduceConfig, StatusConfig, Variables,
};
use crate::produce::counters::Counters;
use crate::produce::hosts::Sources;
use crate::produce::{Rounds, host_file};
use crate::shutdown::{Shutdown, Wake};
use crate::tables::names::Object;
use crate::terminal::{self, fit};
use crate::thread::start_thread;
use crate::{consume, logging, produce};

const TOPIC: &str = "host-metrics";
const PARTITIONS: i32 = 4;

/// How often the live table is drawn, and how often a line is written if there is no terminal. With many rows the queries
/// take longer; the pause after them is then at least [`PAUSE_PER_QUERY`] times as long.
const DRAW_EVERY: Duration = Duration::from_millis(500);
const LINE_EVERY: Duration = Duration::from_secs(3);
const PAUSE_PER_QUERY: u32 = 9;

/// How long to wait, after `produce` has stopped, until `consume` has written all records. It takes a second; a person waits.
const CATCH_UP_WITHIN: Duration = Duration::from_secs(20);

/// The options from the command line and the variables.
pub struct Options<'a> {
    pub check: CheckConfig,
    /// The user's hosts and their file (`None`: standard input). Without it, the sample site is checked.
    pub hosts: Option<(Vec<Target>, Option<&'a Path>)>,
    /// `None`: run until a stop is requested.
    pub how_long: Option<Duration>,
    pub log_level: LevelFilter,
}

const NEXT: &str = "\
Try next
  host-metrics check https://example.com/    one check of your site, drawn as a timeline
  host-metrics demo -c FILE                  this demo with your own hosts, one per line: ADDRESS FREQUENCY
  host-metrics --help                        all commands; docs/tutorial.md starts with your own servers";

/// Runs the demo. Returns whether the ledger balances.
pub fn run(options: Options<'_>, shutdown: &Shutdown) -> anyhow::Result<bool> {
    let mut screen = Screen::new();
    let notices = start_logging(options.log_level, &screen)?;
    screen.print(
        "host-metrics demo: checks hosts, sends every result through Kafka and stores it in Postgres exactly once.\n",
    )?;

    let password = random_password()?;
    let postgres = ThrowAwayPostgres::start_with(&postgres::Settings {
        password: Some(password.clone()),
        ..postgres::Settings::default()
    })?;
    let kafka = start_kafka()?;
    let ca_file = postgres.directory().join("sample-site-ca.pem");
    let sample_file = postgres.directory().join("producer_config");
    let (mut check, how_long) = (options.check, options.how_long);
    let site;
    let (targets, host_file) = match options.hosts {
        Some(hosts) => hosts,
        None => {
            site = SampleSite::start(&ca_file).context("cannot start the sample site")?;
            fs::write(&sample_file, site.host_file()).context("cannot write the host file")?;
            check.ca_file = Some(ca_file);
            let name = sample_file.display().to_string();
            let hosts = host_file::parse(&name, site.host_file().as_bytes())?;
            (hosts.targets, Some(sample_file.as_path()))
        }
    };
    let hosts = targets.len();
    let servers = kafka.bootstrap_servers();
    let variables = variables(&servers, &postgres, &password);
    let (produce, consume) = configure(&variables, check, &targets)?;
    let (audit, mut status) = (config::audit(&variables)?, config::status(&variables)?);
    // The demo shows no lag.
    status.kafka = None;
    let page = Page::start(config::page(&variables)?).context("cannot serve the status page")?;
    screen.print(&introduction(&servers, &postgres, &page, host_file))?;
    let mut page = AgentThread::start("page", shutdown, move |stop| page.run(stop))?;
    let pipeline = Pipeline::start(produce, consume, targets, host_file, shutdown)?;

    let mut view = View {
        screen,
        status,
        hosts,
        notices,
        start: instant_now(),
    };
    view.watch(how_long, shutdown, &pipeline.produce.stop)?;
    view.screen
        .print("\nStopping: the running checks end, then all their results are sent and stored ...")?;
    let (ledger, ended) = pipeline.stop()?;
    view.finish(&ledger)?;
    ended.and(page.end())?;
    if ledger.acknowledged == 0 {
        // Stopped before the first record, so there is nothing to audit.
        return Ok(ledger.balances());
    }
    let audit = audit::run(&audit)?;
    view.screen
        .print(&format!("\nhost-metrics audit\n{}", audit::text(&audit)))?;
    view.screen.print(NEXT)?;
    Ok(ledger.balances() && audit.holds())
}

fn start_kafka() -> anyhow::Result<MockCluster<'static, DefaultProducerContext>> {
    let kafka = MockCluster::new(1).context("cannot start the in-process Kafka")?;
    let created = kafka.create_topic(TOPIC, PARTITIONS, 1);
    created.context("cannot create the topic")?;
    Ok(kafka)
}

fn start_logging(level: LevelFilter, screen: &Screen) -> anyhow::Result<Notices> {
    // At most warnings, so that the display stays readable. LOG_LEVEL can lower this.
    let level = level.min(LevelFilter::Warn);
    let notices = Notices::default();
    if screen.is_terminal() && io::stderr().is_terminal() {
        logging::start_to(level, notices.clone())?;
    } else {
        logging::start(level)?;
    }
    Ok(notices)
}

/// A password, because the machine may have other users.
fn random_password() -> anyhow::Result<String> {
    let mut bytes = [0; 12];
    openssl::rand::rand_bytes(&mut bytes).context("cannot get random bytes")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The variables of the agents.
fn variables(bootstrap_servers: &str, postgres: &ThrowAwayPostgres, password: &str) -> Variables {
    let is_free = TcpListener::bind("127.0.0.1:9480").is_ok();
    Variables::from_pairs([
        ("KAFKA_BOOTSTRAP_SERVERS", bootstrap_servers),
        ("KAFKA_TOPIC", TOPIC),
        ("PRODUCE_GROUP", "host-metrics-produce"),
        ("DB_HOST", postgres.host()),
        ("DB_PORT", &postgres.port().to_string()),
        ("DB_USER", postgres.superuser()),
        ("DB_PASSWORD", password),
        ("DB_NAME", postgres.database()),
        ("DB_SSLMODE", "disable"),
        // The default of 1 s would make the live table lag.
        ("DB_BATCH_SECONDS", "0.2"),
        // If the usual port is taken, any free one.
        (
            "PAGE_ADDR",
            if is_free { "127.0.0.1:9480" } else { "127.0.0.1:0" },
        ),
        ("PAGE_TITLE", "host-metrics demo"),
        // The user's own hosts may have no names.
        ("PAGE_SHOW_ADDRESSES", "yes"),
    ])
}

fn configure(
    variables: &Variables,
    check: CheckConfig,
    targets: &[Target],
) -> anyhow::Result<(ProduceConfig, ConsumeConfig)> {
    let topics = targets.iter().filter_map(|target| target.topic.as_deref());
    let topics: BTreeSet<&str> = topics.chain([TOPIC]).collect();
    let produce = ProduceConfig {
        check,
        ..config::produce(variables)?
    };
    let consume = ConsumeConfig {
        topics: topics.into_iter().map(str::to_owned).collect(),
        ..config::consume(variables)?
    };
    Ok((produce, consume))
}

fn introduction(
    bootstrap_servers: &str,
    postgres: &ThrowAwayPostgres,
    page: &Page,
    host_file: Option<&Path>,
) -> String {
    let hosts = host_file.map_or_else(|| "standard input".to_owned(), |path| path.display().to_string());
    format!(
        "  hosts     {hosts}
  page      http://{}/
  Kafka     {bootstrap_servers}, in this process; topic {TOPIC}
  Postgres  {}:{}, removed at the end. While the demo runs, you can query it:

    {psql} -c 'TABLE host_metrics_latest'
    {psql} -c 'TABLE host_metrics_incidents'
",
        page.address(),
        postgres.host(),
        postgres.port(),
        psql = postgres.psql_command(),
    )
}

/// The display of the running pipeline.
struct View {
    screen: Screen,
    status: StatusConfig,
    /// How many are checked.
    hosts: usize,
    notices: Notices,
    start: Instant,
}

impl View {
    /// Shows the contents of the table until the time is over or a stop is requested.
    fn watch(
        &mut self,
        how_long: Option<Duration>,
        shutdown: &Shutdown,
        produce_stop: &Shutdown,
    ) -> anyhow::Result<()> {
        let end = how_long.and_then(|how_long| self.start.checked_add(how_long));
        let every = if self.screen.is_terminal() {
            DRAW_EVERY
        } else {
            LINE_EVERY
        };
        let mut next_look = self.start;
        loop {
            match shutdown.wait_until(end.map_or(next_look, |end| end.min(next_look))) {
                Wake::Stop => return Ok(()),
                Wake::Reload => {
                    produce_stop.request_reload();
                    continue;
                }
                Wake::Due if end.is_some_and(|end| instant_now() >= end) => return Ok(()),
                Wake::Due => {}
            }
            let queried_at = instant_now();
            self.show()?;
            next_look = instant_now() + every.max(queried_at.elapsed() * PAUSE_PER_QUERY);
        }
    }

    fn show(&mut self) -> anyhow::Result<()> {
        let (summary, mut table) = self.look()?;
        if !self.screen.is_terminal() {
            return Ok(self.screen.print(&summary)?);
        }
        if table.is_empty() {
            table.push(
                "(both agents are joining their groups, which takes 3 s; then the checks begin)".to_owned(),
            );
        }
        // The summary, a notice, and the empty lines before and after the table.
        const OTHER_LINES: usize = 4;
        let mut picture = vec![summary, String::new()];
        picture.extend(first_lines(
            table,
            self.screen.height().saturating_sub(OTHER_LINES),
        ));
        if let Some(notice) = self.notices.newest() {
            picture.extend([String::new(), notice]);
        }
        let width = self.screen.width();
        let picture: Vec<String> = picture.iter().map(|line| fit(line, width)).collect();
        Ok(self.screen.draw(&picture)?)
    }

    /// The totals as a line, and the table of `status` once there are rows.
    fn look(&self) -> anyhow::Result<(String, Vec<String>)> {
        let rows = counted(&self.status.database)?.rows;
        let (mut up, mut down, mut table) = (0, 0, Vec::new());
        if rows > 0 {
            let mut report = status::run(&self.status)?;
            let counted = StatusConfig {
                is_state_on: false,
                ..self.status.clone()
            };
            report.take_trends(status::run(&counted)?);
            (up, down) = report.up_and_down();
            table = status::hosts(&report, self.screen.is_terminal().then(|| self.screen.width()));
        }
        let seconds = self.start.elapsed().as_secs();
        let summary = format!(
            "{:02}:{:02}  {}: {up} up, {down} down; {rows} rows in Postgres",
            seconds / 60,
            seconds % 60,
            terminal::counted(self.hosts, "host")
        );
        Ok((summary, table))
    }

    fn finish(&mut self, ledger: &Ledger) -> anyhow::Result<()> {
        if !self.screen.is_terminal() {
            let (summary, table) = self.look()?;
            self.screen
                .print(&format!("\n{summary}\n\n{}", table.join("\n")))?;
        }
        // The log lines that were held back while the table was shown.
        write!(io::stderr(), "{}", self.notices.text())?;
        Ok(self.screen.print(&format!("\n{}", ledger.text()))?)
    }
}

/// Both running agents. Dropping it stops them.
struct Pipeline {
    produce: AgentThread,
    consume: AgentThread,
    database: DatabaseConfig,
    counters: Arc<Counters>,
}

impl Pipeline {
    fn start(
        produce_config: ProduceConfig,
        consume_config: ConsumeConfig,
        targets: Vec<Target>,
        host_file: Option<&Path>,
        demo: &Shutdown,
    ) -> anyhow::Result<Self> {
        let database = consume_config.database.clone();
        let consume = AgentThread::start("consume", demo, move |stop| consume::run(&consume_config, stop))?;
        let counters = Arc::new(Counters::default());
        let (host_file, counted) = (host_file.map(Path::to_owned), Arc::clone(&counters));
        let produce = AgentThread::start("produce", demo, move |stop| {
            let sources = Sources::of_file(host_file.as_deref());
            produce::run_counted(&produce_config, targets, sources, Rounds::Endless, stop, counted)
        })?;
        Ok(Self {
            produce,
            consume,
            database,
            counters,
        })
    }

    /// Stops the agents cleanly, `produce` first. Returns the ledger of the run, and the error of an agent that failed.
    fn stop(mut self) -> anyhow::Result<(Ledger, anyhow::Result<()>)> {
        let produced = self.produce.end();
        let acknowledged = self.counters.delivered();
        let counted = self.wait_for_rows(acknowledged)?;
        let consumed = self.consume.end();
        let ledger = Ledger {
            due: self.counters.ticks_due.load(Ordering::Relaxed),
            acknowledged,
            counted,
        };
        Ok((ledger, produced.and(consumed)))
    }

    /// Waits until the table has all records that Kafka acknowledged, but not longer than [`CATCH_UP_WITHIN`]. Returns the counts.
    fn wait_for_rows(&self, acknowledged: u64) -> anyhow::Result<Counted> {
        let deadline = instant_now() + CATCH_UP_WITHIN;
        // A new handle, because a stop may have been requested on the program's own, which then no longer waits.
        let pause = Shutdown::new();
        loop {
            let is_over = self.consume.has_ended() || instant_now() >= deadline;
            let counted = counted(&self.database)?;
            let stored = u64::try_from(counted.rows + counted.rejected).unwrap_or_default();
            if stored >= acknowledged || is_over {
                return Ok(counted);
            }
            pause.wait_until(instant_now() + Duration::from_millis(50));
        }
    }
}

/// The counts of the tables, for the summary and the ledger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counted {
    rows: i64,
    rejected: i64,
}

fn counted(database: &DatabaseConfig) -> anyhow::Result<Counted> {
    crate::postgres::once(database, async |session| {
        // `consume` creates this one last, and may not have done it yet.
        let last = session.table.quoted(Object::Certificates.suffix());
        let sql = "SELECT WHERE to_regclass($1) IS NOT NULL";
        let found = session.query("looking for the tables", sql, &[&last]).await?;
        if found.is_empty() {
            return Ok(Counted::default());
        }
        let sql = format!(
            "SELECT (SELECT count(*) FROM {}), (SELECT count(*) FROM {})",
            session.table.quoted(""),
            session.table.quoted(Object::Rejected.suffix())
        );
        let row = session.query_one("counting the rows", &sql, &[]).await?;
        Ok(Counted {
            rows: row.try_get(0)?,
            rejected: row.try_get(1)?,
        })
    })
}

/// An agent on its own thread. Dropping it stops the agent.
struct AgentThread {
    name: &'static str,
    stop: Shutdown,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl AgentThread {
    /// Starts the agent. If it ends by itself, which is an error, the demo ends too.
    fn start(
        name: &'static str,
        demo: &Shutdown,
        run: impl FnOnce(&Shutdown) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let stop = Shutdown::new();
        let (own, ends_demo) = (stop.clone(), RequestOnDrop(demo.clone()));
        let thread = start_thread(name, move || {
            let _ends_demo = ends_demo;
            run(&own)
        })
        .with_context(|| format!("cannot start a thread for {name}"))?;
        Ok(Self {
            name,
            stop,
            thread: Some(thread),
        })
    }

    fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Requests a clean stop and waits for the end of the thread.
    fn end(&mut self) -> anyhow::Result<()> {
        self.stop.request();
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        match thread.join() {
            Ok(result) => result.context(self.name),
            Err(_) => Err(anyhow!("{} panicked, which is a bug", self.name)),
        }
    }
}

impl Drop for AgentThread {
    fn drop(&mut self) {
        // Reached only when the demo fails for another reason, which it reports.
        self.end().ok();
    }
}

/// Requests a stop when it is dropped, also by a panic.
struct RequestOnDrop(Shutdown);

impl Drop for RequestOnDrop {
    fn drop(&mut self) {
        self.0.request();
    }
}

/// The number of ticks at each stage of the pipeline, as that stage counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ledger {
    due: u64,
    acknowledged: u64,
    counted: Counted,
}

impl Ledger {
    fn balances(&self) -> bool {
        self.due == self.acknowledged
            && u64::try_from(self.counted.rows) == Ok(self.acknowledged)
            && self.counted.rejected == 0
    }

    fn text(&self) -> String {
        let Self {
            due,
            acknowledged,
            counted: Counted { rows, rejected },
        } = self;
        let verdict = if self.balances() {
            "It balances: every tick of every host is one row."
        } else {
            "IT DOES NOT BALANCE: every tick of every host should be one row."
        };
        format!(
            "The ledger
  {due:>8}  ticks were due           counted by produce
  {acknowledged:>8}  records were sent        acknowledged by Kafka
  {rows:>8}  rows are in Postgres     SELECT count(*); {rejected} rejected
{verdict}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ledger_balances_only_if_all_counts_agree_and_nothing_is_rejected() {
        let counted = Counted { rows: 7, rejected: 0 };
        let good = Ledger {
            due: 7,
            acknowledged: 7,
            counted,
        };
        assert!(good.balances());
        assert!(good.text().contains("It balances"), "{}", good.text());
        let with = |counted| Ledger { counted, ..good };
        for bad in [
            Ledger { due: 8, ..good },
            Ledger {
                acknowledged: 6,
                ..good
            },
            with(Counted {
                rows: 6,
                ..good.counted
            }),
            with(Counted {
                rejected: 1,
                ..good.counted
            }),
        ] {
            assert!(!bad.balances(), "{bad:?}");
            assert!(bad.text().contains("DOES NOT BALANCE"), "{}", bad.text());
        }
    }
}

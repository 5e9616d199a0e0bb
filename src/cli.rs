//! The command line: the commands, their flags and their help text. What a command does is in its own module.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use crate::commands::skip::Argument;
use crate::duration;
use crate::tables::names::MAX_IDENTIFIER_BYTES;

/// Checks web sites on schedule and stores every result exactly once: HTTP checker -> Kafka -> Postgres.
#[derive(Debug, Parser)]
#[command(
    name = "host-metrics",
    version = VERSION.as_str(),
    propagate_version = true,
    disable_version_flag = true,
    disable_help_subcommand = true,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = EXAMPLES,
    after_long_help = LONG_HELP.as_str(),
    max_term_width = 110
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,

    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check the hosts of a file until stopped, and send a record of every check to Kafka
    #[command(after_help = examples(&[
        "host-metrics produce -c producer_config",
        "host-metrics produce -c shops.hosts -c postgres: --env-file env",
        "host-metrics produce -c producer_config --once -e KAFKA_BOOTSTRAP_SERVERS=localhost:9092",
    ]))]
    Produce(With<Produce>),
    /// Read records from Kafka and write them to Postgres until stopped
    #[command(after_help = examples(&[
        "host-metrics consume --env-file env",
        "host-metrics consume --env-file env -e DB_BATCH_SIZE=10000 -e DB_RETENTION=90d",
    ]))]
    Consume(Common),
    /// Check one address once, without Kafka or a database
    #[command(after_help = examples(&[
        "host-metrics check example.com",
        "host-metrics check https://example.com/ 'Example Domain' -o slow=500ms -o cert-days=14",
        "host-metrics check http://10.0.0.7:8080/health --repeat 10 --every 500ms",
        "host-metrics check https://api.example/health -o json=/status:ok --json",
    ]))]
    Check(With<Check>),
    /// Check a host file and show its hosts and what their checks will cost
    #[command(after_help = examples(&[
        "host-metrics validate -c producer_config",
        "host-metrics validate -c producer_config --try",
    ]))]
    Validate(With<Validate>),
    /// Create the topics and tables that do not exist yet
    #[command(after_help = examples(&[
        "host-metrics init --env-file env",
        "host-metrics init --partitions 24 --replication 3 --retention 7d",
        "host-metrics init --reader status_page",
        "host-metrics init --print-sql",
    ]))]
    Init(With<Init>),
    /// Remove the tables and views that `init` created
    #[command(after_help = examples(&[
        "host-metrics drop --env-file env            # shows what would be removed",
        "host-metrics drop --env-file env --yes",
    ]))]
    Drop(With<Drop>),
    /// Show the state of every host, the lag behind Kafka, and whether the data is stale
    #[command(after_help = examples(&[
        "host-metrics status --env-file env",
        "host-metrics status --watch",
        "host-metrics status --host 'Shop front'",
        "host-metrics status --incidents",
    ]))]
    Status(With<Status>),
    /// Print records as they arrive in Kafka
    #[command(after_help = examples(&[
        "host-metrics tail --failed --since 10m",
        "host-metrics tail --host https://shop.example/ --json",
    ]))]
    Tail(With<Tail>),
    /// Serve the status page until stopped, or write its files
    #[command(after_help = examples(&[
        "host-metrics page -e DB_USER=status_page -e PAGE_TITLE=Status",
        "host-metrics page --out /var/www/status",
    ]))]
    Page(With<Page>),
    /// Skip a Kafka batch that `consume` cannot read, and record which offsets were not read
    #[command(after_help = examples(&[
        "host-metrics skip host-metrics/3             # shows the next batch",
        "host-metrics skip host-metrics/3:41200",
    ]))]
    Skip(With<Skip>),
    /// Change or show the hosts in the database, which `produce -c postgres:` checks
    #[command(subcommand, after_help = examples(&[
        "host-metrics hosts add https://shop.example/ 30s 'Add to basket' -o timeout=3s",
        "host-metrics hosts import producer_config --replace",
        "host-metrics hosts list",
    ]))]
    Hosts(Hosts),
    /// Check that every record is stored exactly once and every tick has exactly one row
    #[command(after_help = examples(&[
        "host-metrics audit --env-file env",
    ]))]
    Audit(Common),
    /// Ask the agent at METRICS_ADDR on this machine whether it is ready
    #[command(after_help = examples(&[
        "host-metrics health -e METRICS_ADDR=127.0.0.1:9464",
    ]))]
    Health(Common),
    /// Run the whole pipeline in one process, with its own Kafka, Postgres and web sites
    #[command(after_help = examples(&[
        "host-metrics demo --for 30s",
        "host-metrics demo -c producer_config",
    ]))]
    Demo(With<Demo>),
    /// Print a script that completes commands and flags in a shell
    #[command(after_help = examples(&[
        "host-metrics completions bash > /etc/bash_completion.d/host-metrics",
    ]))]
    Completions(With<Completions>),
    /// Write the manual pages to a directory
    #[command(after_help = examples(&[
        "host-metrics man /usr/local/share/man/man1",
    ]))]
    Man(With<Man>),
}

/// The flags that every command has, before or after its name.
#[derive(Debug, Args)]
// Without this, `host-metrics produce --version` would print `host-metrics-produce`.
#[command(display_name = "host-metrics")]
pub struct Common {
    /// Set a variable; overrides the environment (repeatable)
    #[arg(short = 'e', value_name = "NAME=VALUE")]
    variables: Vec<String>,

    /// Read variables from FILE instead of .env; the environment overrides FILE
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,

    /// When to use colours; auto: on a terminal, unless NO_COLOR or TERM=dumb is set
    #[arg(long, value_name = "WHEN", value_enum)]
    color: Option<When>,

    /// Print version
    #[arg(short = 'v', long, action = ArgAction::Version)]
    version: Option<bool>,
}

/// The flags of a command, and those of all.
#[derive(Debug, Args)]
pub struct With<T: Args> {
    #[command(flatten)]
    own: T,

    #[command(flatten)]
    common: Common,
}

impl<T: Args> Deref for With<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.own
    }
}

/// The values of `--color`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum When {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Args)]
pub struct Produce {
    /// The hosts to check; `-` is standard input, `postgres:` the table of `hosts` (repeatable)
    #[arg(short = 'c', value_name = "FILE", required = true)]
    pub host_files: Vec<PathBuf>,

    /// Check each host once, immediately, and exit when Kafka has acknowledged every record
    #[arg(long)]
    pub once: bool,
}

#[derive(Debug, Default, Args)]
pub struct Check {
    /// A URL, or a domain or IP address, which is checked over https
    pub address: String,

    /// A regex that must match somewhere in the body
    pub regex: Option<String>,

    /// An option as in the host file: status=404, method=HEAD, … (repeatable)
    #[arg(short = 'o', long = "option", value_name = "NAME=VALUE")]
    pub options: Vec<String>,

    /// Print the record as JSON instead
    #[arg(long)]
    pub json: bool,

    /// Show all headers of the response
    #[arg(long, conflicts_with_all = ["json", "repeat"])]
    pub headers: bool,

    /// Check N times: a line for each, then the latency's minimum, median, p95 and maximum
    #[arg(long, value_name = "N", default_value_t = 1, hide_default_value = true,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub repeat: u32,

    /// With --repeat: the time from one check to the next
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    pub every: Duration,
}

#[derive(Debug, Args)]
pub struct Validate {
    /// The hosts to show; `-` is standard input, `postgres:` the table of `hosts` (repeatable)
    #[arg(short = 'c', value_name = "FILE", required = true)]
    pub host_files: Vec<PathBuf>,

    /// Check each host once, and show the outcome beside it
    #[arg(long = "try")]
    pub tries: bool,
}

#[derive(Debug, Args)]
pub struct Init {
    /// Partitions of a new topic [default: 12]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=100_000))]
    pub partitions: Option<i32>,

    /// Copies of each partition of a new topic [default: the broker's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=i64::from(i16::MAX)))]
    pub replication: Option<i32>,

    /// How long a new topic keeps records, e.g. 7d [default: the broker's]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub retention: Option<Duration>,

    /// Create this database user, if it does not exist, and let it read what `page` shows, and nothing else
    #[arg(long, value_name = "NAME", value_parser = parse_role)]
    pub reader: Option<String>,

    /// Print the SQL without connecting to any server
    #[arg(long)]
    pub print_sql: bool,
}

#[derive(Debug, Args)]
pub struct Drop {
    /// Also remove the topics of KAFKA_TOPIC and KAFKA_TOPIC_FAILURES
    #[arg(long)]
    pub topic: bool,

    /// Confirm the removal; without this flag nothing is removed
    #[arg(long)]
    pub yes: bool,
}

#[derive(Debug, Args)]
pub struct Status {
    /// Show one host, by address or name: its places, latency by hour, outcomes and last incidents
    #[arg(long, value_name = "NAME")]
    pub host: Option<String>,

    /// Show the last incidents, of all hosts or of --host
    #[arg(long)]
    pub incidents: bool,

    /// Show it again every 2 s until stopped; on a terminal, in place
    #[arg(long)]
    pub watch: bool,

    /// Print JSON instead
    #[arg(long, conflicts_with_all = ["host", "incidents", "watch"])]
    pub json: bool,
}

#[derive(Debug, Default, Args)]
pub struct Tail {
    /// Begin with the records of the last TIME, e.g. 10m [default: only new records]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub since: Option<Duration>,

    /// Only records of this host, by address or name (repeatable)
    #[arg(long = "host", value_name = "NAME")]
    pub hosts: Vec<String>,

    /// Only failed checks
    #[arg(long)]
    pub failed: bool,

    /// Print the records as JSON, one per line
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Page {
    /// Write the files of the page to DIR for another web server, and exit
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Skip {
    /// The partition and the offset of the batch to skip; without an offset, only show the next batch
    #[arg(value_name = "TOPIC/PARTITION[:OFFSET]")]
    pub argument: Argument,
}

#[derive(Debug, Subcommand)]
#[command(disable_help_subcommand = true)]
pub enum Hosts {
    /// Add a host
    #[command(after_help = examples(&[
        "host-metrics hosts add https://shop.example/ 30s",
        "host-metrics hosts add https://shop.example/ 30s 'Add to basket' -o timeout=3s --note 'the shop team'",
    ]))]
    Add(With<HostsAdd>),
    /// Remove hosts
    #[command(after_help = examples(&["host-metrics hosts remove https://shop.example/"]))]
    Remove(With<HostsNamed>),
    /// Show all hosts, and what is wrong with them
    #[command(after_help = examples(&["host-metrics hosts list"]))]
    List(Common),
    /// Resume checking disabled hosts
    #[command(after_help = examples(&["host-metrics hosts enable https://shop.example/"]))]
    Enable(With<HostsNamed>),
    /// Stop checking hosts, but keep them in the table
    #[command(after_help = examples(&["host-metrics hosts disable https://shop.example/"]))]
    Disable(With<HostsNamed>),
    /// Add the hosts of a host file, or change them, all at once
    #[command(after_help = examples(&[
        "host-metrics hosts import producer_config             # adds and changes",
        "host-metrics hosts import producer_config --replace   # removes the others, too",
    ]))]
    Import(With<HostsImport>),
    /// Print the hosts as a host file
    #[command(after_help = examples(&["host-metrics hosts export > producer_config"]))]
    Export(Common),
}

#[derive(Debug, Args)]
pub struct HostsAdd {
    /// A URL, or a domain or IP address, which is checked over https
    pub address: String,

    /// How often to check it: minutes, or a number with s, m, h or d, e.g. 30s
    pub frequency: String,

    /// A regex that must match somewhere in the body
    pub regex: Option<String>,

    /// An option as in the host file: status=404, method=HEAD, … (repeatable)
    #[arg(short = 'o', long = "option", value_name = "NAME=VALUE")]
    pub options: Vec<String>,

    /// A note for people
    #[arg(long, value_name = "TEXT")]
    pub note: Option<String>,

    /// Change the host, and enable it, if it is already in the table
    #[arg(long)]
    pub replace: bool,
}

#[derive(Debug, Args)]
pub struct HostsNamed {
    /// The addresses, as in the table
    #[arg(required = true, value_name = "ADDRESS")]
    pub addresses: Vec<String>,
}

#[derive(Debug, Args)]
pub struct HostsImport {
    /// The host file; `-` is standard input
    #[arg(value_name = "FILE")]
    pub host_file: PathBuf,

    /// Remove all hosts that are not in FILE, and enable those that are
    #[arg(long)]
    pub replace: bool,
}

#[derive(Debug, Args)]
pub struct Demo {
    /// Stop after this time, e.g. 30s
    #[arg(long = "for", value_name = "TIME", value_parser = parse_duration)]
    pub how_long: Option<Duration>,

    /// Check the hosts of FILE instead of the sample site
    #[arg(short = 'c', value_name = "FILE")]
    pub host_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Completions {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub struct Man {
    /// The directory, e.g. /usr/local/share/man/man1
    pub directory: PathBuf,
}

impl Cli {
    /// Every `-e`, in order: one after the command's name overrides one before it.
    pub fn variables(&self) -> Vec<String> {
        [&self.common, self.command.common()]
            .iter()
            .flat_map(|common| common.variables.iter().cloned())
            .collect()
    }

    pub fn color(&self) -> When {
        let inner = self.command.common().color;
        inner.or(self.common.color).unwrap_or(When::Auto)
    }

    pub fn env_file(&self) -> Option<&Path> {
        let inner = self.command.common().env_file.as_deref();
        inner.or(self.common.env_file.as_deref())
    }
}

// Not clap's global flags, because there a `-e` after the command's name drops those before it.
impl Command {
    fn common(&self) -> &Common {
        match self {
            Self::Produce(With { common, .. })
            | Self::Consume(common)
            | Self::Check(With { common, .. })
            | Self::Validate(With { common, .. })
            | Self::Init(With { common, .. })
            | Self::Drop(With { common, .. })
            | Self::Status(With { common, .. })
            | Self::Tail(With { common, .. })
            | Self::Page(With { common, .. })
            | Self::Skip(With { common, .. })
            | Self::Hosts(
                Hosts::Add(With { common, .. })
                | Hosts::Remove(With { common, .. })
                | Hosts::Enable(With { common, .. })
                | Hosts::Disable(With { common, .. })
                | Hosts::List(common)
                | Hosts::Export(common)
                | Hosts::Import(With { common, .. }),
            )
            | Self::Audit(common)
            | Self::Health(common)
            | Self::Demo(With { common, .. })
            | Self::Completions(With { common, .. })
            | Self::Man(With { common, .. }) => common,
        }
    }
}

fn parse_role(text: &str) -> Result<String, String> {
    match (1..=MAX_IDENTIFIER_BYTES).contains(&text.len()) && !text.contains(char::is_control) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "expected the name of a user, at most {MAX_IDENTIFIER_BYTES} bytes"
        )),
    }
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    match duration::parse(text) {
        Some(Duration::ZERO | Duration::MAX) | None => Err(format!(
            "expected a whole number above 0 with {}, e.g. 30s",
            duration::UNITS
        )),
        Some(duration) => Ok(duration),
    }
}

/// The version, with the git revision if the build script found one.
static VERSION: LazyLock<String> = LazyLock::new(|| {
    let version = env!("CARGO_PKG_VERSION");
    match option_env!("HOST_METRICS_REVISION") {
        None => version.to_owned(),
        Some(revision) => format!("{version} ({revision})"),
    }
});

/// The end of a command's help.
fn examples(lines: &[&str]) -> String {
    format!(
        "Examples:\n  {}\n\nThe variables are listed by `host-metrics --help`.",
        lines.join("\n  ")
    )
}

static LONG_HELP: LazyLock<String> = LazyLock::new(|| format!("{VARIABLES}\n\n{EXAMPLES}"));

const EXAMPLES: &str = "\
Examples:
  host-metrics demo --for 30s                      everything in one process, without any setup
  host-metrics check https://example.com/ 'Example'
  host-metrics validate -c producer_config
  host-metrics produce -c producer_config -e KAFKA_BOOTSTRAP_SERVERS=localhost:9092
  host-metrics consume --env-file env
  host-metrics status --env-file env
  host-metrics tail --failed --since 10m --env-file env

Exit status: 0 success; 1 failure (check: not valid; status: stale; audit: a violation; health: not ready);
2 an error in the command line, a variable or the host file.";

const VARIABLES: &str = "\
Variables (set with -e, in the environment or in .env; an empty value means the default):
  KAFKA_BOOTSTRAP_SERVERS   host:port,host:port
  KAFKA_TOPIC               [host-metrics]; `consume`, `init`, `drop`, `status` and `tail` accept several,
                            separated by commas; `produce` accepts one
  KAFKA_TOPIC_FAILURES      a topic that gets a copy of every failed check [none]
  KAFKA_SECURITY_PROTOCOL   PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL
                            [SSL if a KAFKA_SSL_* file is set, else PLAINTEXT]
  KAFKA_SSL_CA_FILE, KAFKA_SSL_CERT_FILE, KAFKA_SSL_KEY_FILE    PEM files
  KAFKA_SASL_MECHANISM      PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512
  KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD
  KAFKA_GROUP_ID            consumer group [host-metrics]
  KAFKA_GROUP_INSTANCE_ID   static membership of `consume`, or of `produce` in its PRODUCE_GROUP:
                            a quick restart moves no partitions
  DB_HOST, DB_PORT, DB_NAME, DB_USER, DB_PASSWORD               [port 5432]
  DB_TABLE                  table or schema.table [host_metrics]
  DB_SSLMODE                disable, prefer, require, verify-ca or verify-full [prefer]
  DB_SSLROOTCERT            PEM file of the database's certificate authority, or `system`
  DB_BATCH_SIZE             the maximum number of records in a transaction [100]
  DB_BATCH_SECONDS          how long a smaller batch waits [1]
  DB_SYNCHRONOUS_COMMIT     on or off: whether commits wait for the database's disk [on]
  DB_RETENTION              how long rows are kept, e.g. 90d [no limit]
  DB_ROLLUP_RETENTION       how long totals and incidents are kept, e.g. 400d [no limit]
  STATE                     on or off: whether `consume` keeps the state beside the rows [on]
  DOWN_WHEN                 any, majority, all or a number of places that must see a host down [majority]
  CHECK_TIMEOUT             the longest time for one check [10s]
  MAX_THREADS               the maximum number of concurrent checks [1024]
  MAX_BODY_BYTES            how much of a body is searched for the regex [1048576]
  USER_AGENT                the User-Agent header of the checks
                            [host-metrics/VERSION and the address of this project]
  CHECK_CA_FILE             PEM file of an additional authority for the checked sites
  SECRETS_DIR               directory of the secrets, the files that @NAME means in the host file [none]
  AGENT_NAME                the name of the place that checks, in each record
                            [PRODUCE_GROUP, else the host name]
  PRODUCE_GROUP             producers with the same group share their hosts [none]
  HOSTS_CACHE_FILE          where `produce -c postgres:` keeps the last good list of hosts,
                            so that it can start while the database cannot be reached [none]
  REFERENCE_HOSTS           host:port,host:port: asked whether this machine's own network is down, or `none`
                            [the default gateway]
  PAGE_ADDR                 where `page` serves [127.0.0.1:9480]
  PAGE_TITLE                the title of the page [Status]
  PAGE_SHOW_ADDRESSES       yes or no: whether the page shows addresses and hosts without a name [no]
  PAGE_AUTH_FILE            a file with user:password on each line: who may read the page [everybody]
  METRICS_ADDR              where to serve /metrics, /healthz, /readyz, e.g. 0.0.0.0:9464 [none]
  LOG_LEVEL                 OFF, ERROR, WARN, INFO, DEBUG or TRACE [INFO]
A secret on the command line is visible to every user of the machine. Instead, set
DB_PASSWORD_FILE, KAFKA_SASL_USERNAME_FILE and KAFKA_SASL_PASSWORD_FILE to files with the values.";

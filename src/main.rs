//! The program: reads the command line and the variables, starts the logging and runs the command. Prints every error once.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anstream::ColorChoice;
use anyhow::Context;
use clap::{CommandFactory, Parser};
use signal_hook::consts::SIGHUP;

use host_metrics::check::target::Target;
use host_metrics::cli::{self, Cli, Command};
use host_metrics::commands::screen::can_redraw;
use host_metrics::commands::{self, audit, check, demo, init, page, skip, status, tail, validate};
use host_metrics::config::{self, Servers, Variables, WrongInput, WrongVariables};
use host_metrics::http::health::{self, Health};
use host_metrics::produce::host_file::{self, Files, HostFileError, Hosts};
use host_metrics::produce::hosts::{self, Sources};
use host_metrics::produce::{self, Rounds};
use host_metrics::shutdown::Shutdown;
use host_metrics::{consume, limits, logging, terminal};

const PROGRAM: &str = env!("CARGO_PKG_NAME");
const FAILURE: u8 = 1;
const WRONG_INPUT: u8 = 2;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) => {
            // If standard output or error is closed, there is nowhere to report that.
            let _ = usage.print();
            return ExitCode::from(u8::try_from(usage.exit_code()).unwrap_or(WRONG_INPUT));
        }
    };
    match cli.color() {
        cli::When::Auto => ColorChoice::Auto,
        cli::When::Always => ColorChoice::Always,
        cli::When::Never => ColorChoice::Never,
    }
    .write_global();
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(FAILURE),
        Err(error) => report(&error),
    }
}

/// Prints the error, and returns its exit status.
fn report(error: &anyhow::Error) -> ExitCode {
    let is_wrong_input = error
        .chain()
        .any(|cause| cause.is::<WrongInput>() || cause.is::<WrongVariables>());
    // An error in the input begins with its own place, FILE:LINE:COLUMN or the variable's name.
    let (prefix, status) = match is_wrong_input {
        true => ("", WRONG_INPUT),
        false => ("error: ", FAILURE),
    };
    let text = format!("{prefix}{error:#}");
    // If standard error is closed, there is nowhere to report that.
    let _ = writeln!(io::stderr(), "{}", terminal::plain_lines(&text));
    ExitCode::from(status)
}

/// Runs the command. Returns false for a bad result, such as a check that is not valid, which is not an error.
fn run(cli: &Cli) -> anyhow::Result<bool> {
    let variables = Variables::gather(&cli.variables(), cli.env_file());
    match &cli.command {
        Command::Produce(args) => run_produce(args, &variables),
        Command::Consume(_) => run_consume(&variables),
        Command::Check(args) => run_check(args, &variables),
        Command::Validate(args) => run_validate(args, &variables),
        Command::Init(args) => run_init(args, &variables),
        Command::Drop(args) => run_drop(args, &variables),
        Command::Status(args) => run_status(args, &variables),
        Command::Tail(args) => run_tail(args, &variables),
        Command::Page(args) => run_page(args, &variables),
        Command::Skip(args) => run_skip(args, &variables),
        Command::Hosts(action) => run_hosts(action, &variables),
        Command::Audit(_) => run_audit(&variables),
        Command::Health(_) => run_health(&variables),
        Command::Demo(args) => run_demo(args, &variables),
        Command::Completions(args) => run_completions(args),
        Command::Man(args) => run_man(args),
    }
}

fn run_produce(args: &cli::Produce, variables: &Variables) -> anyhow::Result<bool> {
    // Until the signals are handled below, SIGHUP would end the program; reading a large file takes a while.
    let changed_early = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGHUP, Arc::clone(&changed_early)).context("cannot handle signals")?;
    let rounds = if args.once { Rounds::Once } else { Rounds::Endless };
    let secrets = config::secrets_dir(variables);
    let files = Sources::read_files(&args.host_files, secrets.as_deref());
    let (mut config, sources, hosts) = if args.host_files.iter().any(|name| hosts::is_table(name)) {
        let ((config, table), (mut sources, mut hosts)) = both(config::produce_from_table(variables), files)?;
        start_logging(variables, Servers::BOTH)?;
        sources.add_table(&table, secrets.as_deref(), &mut hosts, rounds == Rounds::Once)?;
        (config, sources, hosts)
    } else {
        let (config, (sources, hosts)) = both(config::produce(variables), files)?;
        start_logging(variables, Servers::KAFKA)?;
        (config, sources, hosts)
    };
    let targets = with_warnings(hosts);
    config.check.max_threads = prepare_limits(&targets, config.check.max_threads);
    let shutdown = listen_to_signals()?;
    if changed_early.load(Ordering::Relaxed) {
        shutdown.request_reload();
    }
    produce::run(&config, targets, sources, rounds, &shutdown)?;
    Ok(true)
}

fn run_consume(variables: &Variables) -> anyhow::Result<bool> {
    let config = config::consume(variables)?;
    start_logging(variables, Servers::BOTH)?;
    limits::raise_open_files();
    consume::run(&config, &listen_to_signals()?)?;
    Ok(true)
}

fn run_check(args: &cli::Check, variables: &Variables) -> anyhow::Result<bool> {
    let secrets = config::secrets_dir(variables);
    let files = Files::new(secrets.as_deref(), Some(Path::new("")));
    let target = host_file::target_with(&args.address, &args.options, args.regex.as_deref(), &files);
    let (config, target) = both(config::check(variables), target)?;
    start_logging(variables, Servers::NONE)?;
    for line in files.warnings() {
        log::warn!("{line}");
    }
    let columns = columns_of_terminal();
    check::run(
        &config,
        &target,
        args,
        columns,
        &listen_to_signals()?,
        print_styled,
    )
}

fn run_validate(args: &cli::Validate, variables: &Variables) -> anyhow::Result<bool> {
    let secrets = config::secrets_dir(variables);
    let files = Sources::read_files(&args.host_files, secrets.as_deref());
    let (config, hosts) = if args.host_files.iter().any(|name| hosts::is_table(name)) {
        let ((config, table), (mut sources, mut hosts)) = both(config::validate_table(variables), files)?;
        start_logging(variables, Servers::DATABASE)?;
        sources.validate_table(&table, secrets.as_deref(), &mut hosts)?;
        (config, hosts)
    } else {
        let (config, (_, hosts)) = both(config::checks(variables), files)?;
        start_logging(variables, Servers::NONE)?;
        (config, hosts)
    };
    // A progress bar replaces itself; elsewhere it would fill a log.
    let shows = can_redraw(&io::stderr());
    let show = |bar: &str| {
        if shows {
            // Without standard error there is nobody to see it.
            let _ = write!(io::stderr(), "\r{bar}");
        }
    };
    let report = validate::run(&config, &hosts, args.tries, columns_of_terminal(), show)?;
    if shows && args.tries {
        let _ = write!(io::stderr(), "\r{:40}\r", "");
    }
    print(&report)?;
    Ok(true)
}

fn run_init(args: &cli::Init, variables: &Variables) -> anyhow::Result<bool> {
    let servers = if args.print_sql {
        Servers::NONE
    } else {
        Servers::BOTH
    };
    let config = config::init(variables, servers)?;
    start_logging(variables, servers)?;
    init::run(&config, args)?;
    Ok(true)
}

fn run_drop(args: &cli::Drop, variables: &Variables) -> anyhow::Result<bool> {
    let servers = Servers {
        kafka: args.topic,
        database: true,
    };
    let config = config::init(variables, servers)?;
    start_logging(variables, servers)?;
    init::drop(&config, args.topic, args.yes)?;
    Ok(true)
}

fn run_status(args: &cli::Status, variables: &Variables) -> anyhow::Result<bool> {
    let config = config::status(variables)?;
    start_logging(variables, Servers::BOTH)?;
    let answer = || {
        let width = columns_of_terminal();
        if args.incidents || args.host.is_some() {
            let history = status::history(&config, args.host.as_deref(), args.incidents, width)?;
            return anyhow::Ok((history, true));
        }
        let report = status::run(&config)?;
        let text = match args.json {
            true => status::json(&report),
            false => status::text(&report, width),
        };
        Ok((text, !report.stale))
    };
    if args.watch {
        status::watch(&listen_to_signals()?, || Ok(answer()?.0))?;
        return Ok(true);
    }
    let (text, is_good) = answer()?;
    print_coloured(&text)?;
    Ok(is_good)
}

fn run_tail(args: &cli::Tail, variables: &Variables) -> anyhow::Result<bool> {
    let config = config::tail(variables)?;
    start_logging(variables, Servers::KAFKA)?;
    // Leaves colours out where standard output is not a terminal, or NO_COLOR or TERM=dumb is set.
    tail::run(&config, args, &listen_to_signals()?, &mut anstream::stdout())?;
    Ok(true)
}

fn run_page(args: &cli::Page, variables: &Variables) -> anyhow::Result<bool> {
    let config = config::page(variables)?;
    start_logging(variables, Servers::DATABASE)?;
    match &args.out {
        Some(directory) => page::write(&config, directory)?,
        None => {
            limits::raise_open_files();
            page::Page::start(config)?.run(&listen_to_signals()?)?;
        }
    }
    Ok(true)
}

fn run_skip(args: &cli::Skip, variables: &Variables) -> anyhow::Result<bool> {
    let config = config::consume(variables)?;
    start_logging(variables, Servers::BOTH)?;
    print(&skip::run(&config, &args.argument)?)?;
    Ok(true)
}

fn run_hosts(action: &cli::Hosts, variables: &Variables) -> anyhow::Result<bool> {
    let config = config::hosts(variables)?.database;
    let secrets = config::secrets_dir(variables);
    let start_logging = || start_logging(variables, Servers::DATABASE);
    match action {
        cli::Hosts::Add(args) => {
            let host = commands::hosts::NewHost::new(args, secrets.as_deref())?;
            start_logging()?;
            commands::hosts::add(&config, &host, args.replace)?;
        }
        cli::Hosts::Import(args) => {
            let import = commands::hosts::Import::read(&args.host_file, secrets.as_deref(), args.replace)?;
            start_logging()?;
            print(&commands::hosts::import(&config, &import)?)?;
        }
        cli::Hosts::Remove(args) => {
            start_logging()?;
            commands::hosts::remove(&config, &args.addresses)?;
        }
        cli::Hosts::Enable(args) => {
            start_logging()?;
            commands::hosts::enable(&config, &args.addresses, true)?;
        }
        cli::Hosts::Disable(args) => {
            start_logging()?;
            commands::hosts::enable(&config, &args.addresses, false)?;
        }
        cli::Hosts::List(_) => {
            start_logging()?;
            print(&commands::hosts::list(&config)?)?;
        }
        cli::Hosts::Export(_) => {
            start_logging()?;
            print(&commands::hosts::export(&config)?)?;
        }
    }
    Ok(true)
}

fn run_audit(variables: &Variables) -> anyhow::Result<bool> {
    let config = config::audit(variables)?;
    start_logging(variables, Servers::BOTH)?;
    let report = audit::run(&config)?;
    print(&audit::text(&report))?;
    Ok(report.holds())
}

fn run_health(variables: &Variables) -> anyhow::Result<bool> {
    let health = health::ask(config::health(variables)?).map_err(anyhow::Error::msg)?;
    print(&match &health {
        Health::Ready => "ready\n".to_owned(),
        Health::NotReady(reason) => format!("not ready: {reason}\n"),
    })?;
    Ok(health == Health::Ready)
}

fn run_demo(args: &cli::Demo, variables: &Variables) -> anyhow::Result<bool> {
    let path = args.host_file.as_deref();
    let hosts = path.map(|path| read_hosts(path, variables)).transpose();
    let (check, hosts) = both(config::checks(variables), hosts)?;
    limits::raise_open_files();
    let options = demo::Options {
        check,
        hosts: hosts.map(|hosts| (hosts.targets, path.filter(|path| !host_file::is_stdin(path)))),
        how_long: args.how_long,
        log_level: config::log_level(variables)?,
    };
    let ended = demo::run(options, &listen_to_signals()?);
    ended.or_else(|error| match error.downcast_ref::<io::Error>() {
        // The reader has closed the pipe.
        Some(closed) if closed.kind() == io::ErrorKind::BrokenPipe => Ok(true),
        _ => Err(error),
    })
}

fn run_completions(args: &cli::Completions) -> anyhow::Result<bool> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), PROGRAM, &mut script);
    print(&String::from_utf8(script)?)?;
    Ok(true)
}

fn run_man(args: &cli::Man) -> anyhow::Result<bool> {
    let directory = &args.directory;
    let mut pages = with_names_of_pages(Cli::command(), PROGRAM);
    pages.build();
    fs::create_dir_all(directory)
        .and_then(|()| write_pages(&pages, directory))
        .with_context(|| format!("cannot write manual pages to {}", directory.display()))?;
    Ok(true)
}

fn write_pages(command: &clap::Command, directory: &Path) -> io::Result<()> {
    for inner in command.get_subcommands() {
        write_pages(inner, directory)?;
    }
    let (page, mut text) = (clap_mangen::Man::new(command.clone()), Vec::new());
    page.render(&mut text)?;
    let text = with_sections(&String::from_utf8_lossy(&text));
    fs::write(directory.join(page.get_filename()), text)
}

/// The manual page with the variables and the examples as sections of their own, whose lines stay as they are.
fn with_sections(page: &str) -> String {
    page.replacen(".SH EXTRA\nExamples:\n", ".SH EXAMPLES\n.nf\n", 1)
        .replacen(".SH EXTRA\n", ".SH VARIABLES\n.nf\n", 1)
        .replacen("\nExamples:\n", "\n.fi\n.SH EXAMPLES\n.nf\n", 1)
        .replacen("\n.SH VERSION\n", "\n.fi\n.SH VERSION\n", 1)
}

/// Gives each command the name of its manual page, because all commands share the display name of their common flags.
fn with_names_of_pages(command: clap::Command, name: &str) -> clap::Command {
    let pages = command.mut_subcommands(|command| {
        let name = format!("{name}-{}", command.get_name());
        with_names_of_pages(command, &name)
    });
    pages.display_name(name.to_owned())
}

fn read_hosts(path: &Path, variables: &Variables) -> Result<Hosts, HostFileError> {
    host_file::read(path, config::secrets_dir(variables).as_deref())
}

/// Starts the logging, and logs the warnings about the variables.
fn start_logging(variables: &Variables, servers: Servers) -> anyhow::Result<()> {
    logging::start(config::log_level(variables)?)?;
    let exposed = config::exposed_secrets(variables, servers);
    for line in variables.warnings().iter().chain(&exposed) {
        log::warn!("{line}");
    }
    Ok(())
}

fn with_warnings(hosts: Hosts) -> Vec<Target> {
    for line in &hosts.warnings {
        log::warn!("{line}");
    }
    hosts.targets
}

/// Returns how many checks may run at the same time.
fn prepare_limits(targets: &[Target], max_threads: usize) -> usize {
    limits::raise_open_files();
    let limits = limits::current();
    let has_name = |target: &&Target| matches!(target.url.host(), Some(url::Host::Domain(_)));
    let names = targets.iter().filter(has_name).count();
    let at_most = |count: usize| count.min(max_threads);
    for line in limits::warnings(limits, at_most(targets.len()), at_most(names)) {
        log::warn!("{line}");
    }
    limits::checks_that_fit(limits, max_threads)
}

fn listen_to_signals() -> anyhow::Result<Shutdown> {
    let shutdown = Shutdown::new();
    shutdown.listen_to_signals().context("cannot handle signals")?;
    Ok(shutdown)
}

/// Both values, or the errors of both.
fn both<A, B>(one: Result<A, WrongVariables>, other: Result<B, HostFileError>) -> Result<(A, B), WrongInput> {
    match (one, other) {
        (Ok(one), Ok(other)) => Ok((one, other)),
        (Err(one), Err(other)) => Err(WrongInput(format!("{one}\n{other}"))),
        (Err(wrong), Ok(_)) => Err(WrongInput(wrong.to_string())),
        (Ok(_), Err(wrong)) => Err(WrongInput(wrong.to_string())),
    }
}

fn columns_of_terminal() -> Option<usize> {
    let size = terminal_size::terminal_size().filter(|_| io::stdout().is_terminal());
    size.map(|(width, _)| width.0.into())
}

/// Prints results to standard output, with a space for each hidden character.
fn print(results: &str) -> anyhow::Result<()> {
    print_coloured(&terminal::plain_lines(results))
}

/// Prints results that have colours. A reader that closes the pipe early, as `head` does, is not an error.
fn print_coloured(results: &str) -> anyhow::Result<()> {
    match print_styled(results) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

/// Colours are left out if standard output is not a terminal, or `--color` or NO_COLOR says so.
fn print_styled(results: &str) -> io::Result<()> {
    let mut out = anstream::stdout().lock();
    out.write_all(results.as_bytes()).and_then(|()| out.flush())
}

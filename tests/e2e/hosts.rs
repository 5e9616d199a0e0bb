//! The table of hosts: `hosts`, plain SQL, and `produce -c postgres:` on a real Postgres.

use std::fs;
use std::time::Duration;

use host_metrics::commands::demo::postgres::{ThrowAwayPostgres, free_port};

use crate::agent::{Agent, Variables, run};
use crate::case::{Case, SOON};
use crate::database::{Database, server};
use crate::scratch;
use crate::table::connect;

/// Tables in a database of its own.
fn tables() -> (Database, Variables) {
    let mut db = Database::new();
    let variables = Variables::new()
        .database(server())
        .with("DB_NAME", &db.name)
        .with("LOG_LEVEL", "WARN");
    let (_, script) = run(&["init", "--print-sql"], &variables);
    db.execute(&script);
    (db, variables)
}

#[test]
fn hosts_are_added_changed_and_removed_and_a_file_goes_in_and_out() {
    let (mut db, variables) = tables();
    let mut version = 0;
    let mut hosts = |arguments: &[&str], status: i32, says: &str| {
        let (found, said) = run(&[&["hosts"], arguments].concat(), &variables);
        assert_eq!(found, status, "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {says:?} is not in {said}");
        let now: i64 = db
            .one("SELECT version::text FROM host_metrics_hosts_version")
            .parse()
            .unwrap();
        let has_moved = now > version;
        version = now;
        has_moved
    };
    let add = [
        "add",
        "https://a.example/",
        "30s",
        "all is well",
        "-o",
        "timeout=3s",
        "-o",
        "status=200-299",
        "--note",
        "ours",
    ];
    assert!(hosts(&add, 0, ""));
    hosts(
        &["add", "https://a.example/", "1m"],
        1,
        "already in the table; use `hosts add --replace`",
    );
    assert!(hosts(&["add", "b.example", "5"], 0, ""));
    assert!(hosts(&["add", "b.example", "10", "--replace"], 0, ""));
    assert!(!hosts(&["add", "c.example", "5x", "-o", "timeout=y"], 2, "5x"));
    assert!(!hosts(
        &["add", "c.example", "5x", "-o", "timeout=y"],
        2,
        "`timeout=y`"
    ));
    assert!(hosts(&["disable", "b.example"], 0, ""));
    assert!(!hosts(
        &["list"],
        0,
        "https://a.example/  30s        timeout=3s status=200-299  all is well  yes      ours"
    ));
    let exported =
        "# disabled: b.example 10\n# ours\nhttps://a.example/ 30s timeout=3s status=200-299 all is well\n";
    assert!(!hosts(&["export"], 0, exported));
    assert!(hosts(&["enable", "b.example"], 0, ""));
    hosts(
        &["remove", "b.example", "nowhere.example"],
        1,
        "nothing was changed, because the table has no nowhere.example",
    );

    let file = scratch::directory("hosts").join("hosts");
    let path = file.to_str().unwrap();
    fs::write(
        &file,
        "# more\n\nhttps://a.example/ 30s timeout=3s status=200-299 all is well\nd.example 1m\tstatus=404\n",
    )
    .unwrap();
    assert!(hosts(
        &["import", path],
        0,
        "1 added, 0 changed, 1 as before, 0 removed"
    ));
    fs::write(&file, "b.example 1h\nd.example 1m status=404\n").unwrap();
    assert!(hosts(
        &["import", path, "--replace"],
        0,
        "0 added, 1 changed, 1 as before, 1 removed"
    ));
    hosts(&["export"], 0, "b.example 1h\nd.example 1m status=404\n");
    fs::write(&file, "b.example 1y\ne.example 5\n").unwrap();
    assert!(!hosts(&["import", path], 2, &format!("{path}:1:11: ")));
    assert!(hosts(&["remove", "b.example", "d.example"], 0, ""));
    assert!(!hosts(&["export"], 0, ""));
}

#[test]
fn validate_shows_the_table_and_every_wrong_row_of_it() {
    let (mut db, variables) = tables();
    let add = |db: &mut Database, values: &str| {
        db.execute(&format!(
            "INSERT INTO host_metrics_hosts (address, frequency, options, enabled) VALUES {values}"
        ));
    };
    let file = scratch::directory("hosts").join("hosts");
    let path = file.to_str().unwrap();
    fs::write(&file, "file.example 1m\n").unwrap();
    add(
        &mut db,
        "('a.example', '5', 'status=200', true), ('off.example', 'x', NULL, false)",
    );
    let validate = ["validate", "-c", path, "-c", "postgres:"];
    let (status, said) = run(&validate, &variables);
    assert_eq!(status, 0, "{said}");
    for line in [
        "1m     10s      file.example ->",
        "5m     10s      a.example ->",
        "hosts        2\n",
    ] {
        assert!(said.contains(line), "{line:?} is not in {said}");
    }

    add(
        &mut db,
        "('b.example', '5x', 'status=y', true), ('c.example', '5', 'ip=5', true), ('file.example', '5', NULL, true)",
    );
    let (status, said) = run(&validate, &variables);
    assert_eq!(status, 2, "{said}");
    for error in [
        "\"host_metrics_hosts\": the row \"b.example\" is not used: `5x` is not a valid FREQUENCY",
        "; `status=y`: expected",
        "\"host_metrics_hosts\": the row \"c.example\" is not used: `ip=5`: expected",
        &format!("{path}:1: the address \"file.example\" is also in \"host_metrics_hosts\""),
    ] {
        assert!(said.contains(error), "{error:?} is not in {said}");
    }
    assert_eq!(db.count("host_metrics_hosts WHERE error IS NOT NULL"), 0);

    db.execute("DROP TABLE host_metrics_hosts");
    let (status, said) = run(&validate, &variables);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("\"host_metrics_hosts\" cannot be read: "), "{said}");
}

#[test]
fn every_statement_that_changes_the_table_changes_its_version() {
    let (mut db, _) = tables();
    let user = format!("writer_{}", db.name);
    db.execute(&format!(
        "CREATE ROLE {user}; GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON host_metrics_hosts TO {user}; SET ROLE {user}"
    ));
    let mut version = 0;
    for (sql, moves) in [
        (
            "INSERT INTO host_metrics_hosts (address, frequency) SELECT 'h' || n, '5' FROM generate_series(1, 9) n",
            true,
        ),
        (
            "UPDATE host_metrics_hosts SET frequency = '1m' WHERE address = 'h1'",
            true,
        ),
        (
            "UPDATE host_metrics_hosts SET enabled = false WHERE address = 'h2'",
            true,
        ),
        (
            "UPDATE host_metrics_hosts SET error = 'x', note = 'y' WHERE address = 'h1'",
            false,
        ),
        ("SELECT * FROM host_metrics_hosts", false),
        ("DELETE FROM host_metrics_hosts WHERE address = 'h3'", true),
        ("TRUNCATE host_metrics_hosts", true),
    ] {
        db.execute(sql);
        let now: i64 = db
            .one("SELECT version::text FROM host_metrics_hosts_version")
            .parse()
            .unwrap();
        assert_eq!(now - version, i64::from(moves), "{sql}");
        version = now;
    }
    db.execute("INSERT INTO host_metrics_hosts (address, frequency, error) VALUES ('h', '5', 'wrong')");
    let touched = "SELECT concat(error, '|', updated_at > now() - interval '1 hour') FROM host_metrics_hosts";
    db.execute("UPDATE host_metrics_hosts SET updated_at = '2020-01-01'");
    assert_eq!(db.one(touched), "wrong|f");
    db.execute("UPDATE host_metrics_hosts SET regex = 'x'");
    assert_eq!(db.one(touched), "|t");
    let may_write = "SELECT has_table_privilege('host_metrics_hosts_version', 'UPDATE')::text";
    assert_eq!(db.one(may_write), "false");

    // `drop` removes all of it.
    db.execute("RESET ROLE");
    let variables = Variables::new().database(server()).with("DB_NAME", &db.name);
    let (status, said) = run(&["drop", "--yes"], &variables);
    assert_eq!(status, 0, "{said}");
    assert_eq!(db.count("pg_class WHERE relname LIKE 'host_metrics_hosts%'"), 0);
    assert_eq!(db.count("pg_proc WHERE proname LIKE 'host_metrics_hosts%'"), 0);
}

#[test]
fn produce_follows_the_table_and_a_wrong_row_affects_no_other_one() {
    let mut case = Case::new("hosts-table", 1);
    let (status, said) = run(&["init"], &case.variables());
    assert_eq!(status, 0, "{said}");
    let user = format!("checker_{}", case.db.name);
    case.db.execute(&format!(
        "CREATE ROLE {user} LOGIN; GRANT SELECT ON host_metrics_hosts TO {user}; \
         INSERT INTO host_metrics_hosts (address, frequency) VALUES ('http://127.0.0.1:1/a', '1s'), ('http://127.0.0.1:1/b', '1s')"
    ));
    let variables = case.variables().with("DB_USER", &user).with("LOG_LEVEL", "INFO");
    let cache = scratch::directory("cache").join("hosts");
    // One that may only read, and one that may write.
    let reader = Agent::start(
        &["produce", "-c", "postgres:"],
        &variables
            .clone()
            .with("PRODUCE_GROUP", "hosts-table-produce")
            .with("HOSTS_CACHE_FILE", cache.display()),
    );
    let writer = Agent::start(
        &["produce", "-c", "postgres:"],
        &case.variables().with("LOG_LEVEL", "INFO"),
    );
    let agents = [&reader, &writer];
    let both_say = |what: &str| agents.iter().for_each(|agent| agent.wait_for_stderr(what, SOON));
    both_say("produce hosts=2 ");

    case.db.execute(
        "INSERT INTO host_metrics_hosts (address, frequency, options, regex) VALUES \
         ('http://127.0.0.1:1/c', '1s', 'timeout=x', NULL), ('http://127.0.0.1:1/d', '1s', 'status=200', 'is well')",
    );
    both_say("reload hosts=3");
    both_say("the row \"http://127.0.0.1:1/c\" is not used: `timeout=x`: expected");
    let errors =
        "host_metrics_hosts WHERE error LIKE '`timeout=x`: expected%' AND address = 'http://127.0.0.1:1/c'";
    scratch::wait_for(
        SOON,
        "the error is in the table",
        || (case.db.count(errors) == 1).then_some(()),
        || writer.stderr(),
    );
    assert_eq!(case.db.count("host_metrics_hosts WHERE error IS NOT NULL"), 1);
    let cached = fs::read_to_string(&cache).unwrap();
    assert!(
        cached.ends_with(
            "\nhttp://127.0.0.1:1/a 1s\nhttp://127.0.0.1:1/b 1s\nhttp://127.0.0.1:1/d 1s status=200 is well\n"
        ),
        "{cached}"
    );

    case.db
        .execute("UPDATE host_metrics_hosts SET options = 'timeout=900ms' WHERE options = 'timeout=x'");
    both_say("reload hosts=4");
    case.db.execute("UPDATE host_metrics_hosts SET enabled = false");
    both_say("reload hosts=0");
    case.db.execute(
        "INSERT INTO host_metrics_hosts (address, frequency) SELECT 'http://127.0.0.1:1/' || n, '1d' FROM generate_series(1, 2000) n",
    );
    both_say("reload hosts=2000");

    case.db.execute(
        "DELETE FROM host_metrics_hosts WHERE frequency = '1d'; UPDATE host_metrics_hosts SET enabled = true",
    );
    scratch::wait_for(
        SOON,
        "both have four hosts again",
        || {
            agents
                .iter()
                .all(|agent| agent.said("reload hosts=4") == 2)
                .then_some(())
        },
        || reader.stderr(),
    );
    reader.stop();
    writer.stop();
    // An option that changed and a row that was wrong have disturbed no tick of the others.
    let ticks: Vec<i64> = case
        .kafka
        .records(case.name)
        .iter()
        .filter_map(|record| {
            let sample = host_metrics::sample::decode(record.value.as_deref()?).ok()?;
            let is_it = sample.address == "http://127.0.0.1:1/a";
            sample
                .scheduled_at
                .filter(|_| is_it)
                .map(host_metrics::sample::Timestamp::unix_micros)
        })
        .collect();
    assert!(
        ticks.len() > 4 && ticks.iter().all(|tick| (tick - ticks[0]) % 1_000_000 == 0),
        "{ticks:?}"
    );
}

#[test]
fn a_table_that_is_dropped_renamed_locked_or_filled_with_nonsense_leaves_the_hosts_as_they_were() {
    let mut case = Case::new("hosts-gone", 1);
    let (status, said) = run(&["init"], &case.variables());
    assert_eq!(status, 0, "{said}");
    let good = "INSERT INTO host_metrics_hosts (address, frequency) VALUES ('http://127.0.0.1:1/', '1s')";
    case.db.execute(good);
    let metrics = format!("127.0.0.1:{}", free_port().unwrap());
    let variables = case
        .variables()
        .with("LOG_LEVEL", "INFO")
        .with("METRICS_ADDR", metrics);
    let agent = Agent::start(&["produce", "-c", "postgres:"], &variables);
    agent.wait_for_stderr("produce hosts=1 ", SOON);

    let mut other = Database::again(&case.db.name);
    let init = |_: &mut Database| {
        let (status, said) = run(&["init"], &variables);
        assert_eq!(status, 0, "{said}");
    };
    // What happens to the table, what the log says of it, and what ends it.
    type Trouble<'a> = (&'a str, &'a str, &'a dyn Fn(&mut Database));
    let troubles: [Trouble<'_>; 3] = [
        (
            "ALTER TABLE host_metrics_hosts RENAME TO elsewhere",
            "does not exist",
            &|db| db.execute("ALTER TABLE elsewhere RENAME TO host_metrics_hosts"),
        ),
        ("BEGIN; LOCK host_metrics_hosts", "lock timeout", &|db| {
            db.execute("COMMIT")
        }),
        (
            "DROP TABLE host_metrics_hosts, host_metrics_hosts_version",
            "does not exist",
            &init,
        ),
    ];
    for (number, (trouble, reason, end)) in troubles.iter().enumerate() {
        other.execute(trouble);
        // Otherwise the table would be read within a minute. The version may be gone, too.
        let _ = case
            .db
            .client
            .batch_execute("UPDATE host_metrics_hosts_version SET version = version + 1");
        let lines = |what: &str| agent.said(&format!("\"host_metrics_hosts\" {what}"));
        let stays = "cannot be read, so its hosts stay as they were";
        let says = |what: &str| {
            let said = || (lines(what) == number + 1).then_some(());
            scratch::wait_for(SOON, what, said, || agent.stderr());
        };
        says(stays);
        let (status, said) = run(&["health"], &variables);
        assert_eq!(status, 0, "{said}");
        // Two more attempts are not logged.
        let ticks = || case.kafka.records(case.name).len();
        let before = ticks();
        let checked = || (ticks() > before + 4).then_some(());
        scratch::wait_for(SOON, "the host is still checked", checked, || agent.stderr());
        assert_eq!(lines(stays), number + 1, "{}", agent.stderr());
        assert!(
            agent
                .stderr()
                .lines()
                .any(|line| line.contains(stays) && line.contains(reason)),
            "{}",
            agent.stderr()
        );
        end(&mut other);
        says("can be read again");
    }
    // The new table is empty, and the next one is nearly all wrong.
    agent.wait_for_stderr("reload hosts=0 ", SOON);
    case.db.execute(&format!(
        "{good}; INSERT INTO host_metrics_hosts (address, frequency) SELECT 'http://127.0.0.1:1/' || n, 'x' FROM generate_series(1, 100000) n"
    ));
    agent.wait_for_stderr("99900 more rows are not used", SOON);
    agent.wait_for_stderr("reload hosts=1 ", SOON);
    assert_eq!(agent.said("is not used: `x`"), 100, "{}", agent.stderr());
    agent.stop();
}

#[test]
fn without_postgres_the_hosts_stay_and_a_start_uses_the_cache() {
    let kafka = crate::kafka::Kafka::shared();
    kafka.create_topic("hosts-away", 1);
    let server = ThrowAwayPostgres::start().unwrap();
    let cache = scratch::directory("cache").join("hosts");
    let variables = Variables::new()
        .kafka(&kafka.bootstrap_servers(), "hosts-away")
        .database(&server)
        .with("LOG_LEVEL", "INFO");
    let with_cache = variables.clone().with("HOSTS_CACHE_FILE", cache.display());
    let produce = |variables: &Variables| Agent::start(&["produce", "-c", "postgres:"], variables);
    let mut too_early = produce(&variables);
    assert_eq!(too_early.wait(SOON).code(), Some(1));
    assert!(
        too_early.stderr().contains("run `host-metrics init`"),
        "{}",
        too_early.stderr()
    );

    let (status, said) = run(&["init"], &variables);
    assert_eq!(status, 0, "{said}");
    connect(&server)
        .batch_execute(
            "INSERT INTO host_metrics_hosts (address, frequency) VALUES ('http://127.0.0.1:1/', '1s')",
        )
        .unwrap();
    let running = produce(&with_cache);
    running.wait_for_stderr("produce hosts=1 ", SOON);
    drop(server);
    running.wait_for_stderr("cannot be read, so its hosts stay as they were", SOON);

    // A name that does not answer is waited for; with a cache there is something to do meanwhile.
    let waiting = produce(&variables.clone().with("PRODUCE_GROUP", "hosts-away"));
    waiting.wait_for_stderr("none of its hosts are checked", SOON);
    waiting.wait_for_stderr("produce hosts=0 ", SOON);
    let started = produce(&with_cache);
    started.wait_for_stderr("the 1 hosts of", SOON);
    started.wait_for_stderr("produce hosts=1 ", SOON);
    let mut once = Agent::start(&["produce", "--once", "-c", "postgres:"], &variables);
    assert_eq!(once.wait(SOON).code(), Some(1), "{}", once.stderr());
    for agent in [running, waiting, started] {
        agent.stop();
    }
}

#[test]
fn a_file_and_the_table_are_one_list_without_an_address_in_both() {
    let mut case = Case::new("hosts-both", 1);
    let (status, said) = run(&["init"], &case.variables());
    assert_eq!(status, 0, "{said}");
    case.db.execute("INSERT INTO host_metrics_hosts (address, frequency) VALUES ('http://127.0.0.1:1/table', '1s'), ('http://127.0.0.1:1/both', '1s')");
    let file = scratch::directory("hosts").join("hosts");
    fs::write(
        &file,
        "# a comment\nhttp://127.0.0.1:1/file 1s\nhttp://127.0.0.1:1/both 1s\n",
    )
    .unwrap();
    let arguments = ["produce", "-c", file.to_str().unwrap(), "-c", "postgres:"];
    let variables = case.variables().with("LOG_LEVEL", "INFO");
    let twice = format!(
        "{}:3: the address \"http://127.0.0.1:1/both\" is also in \"host_metrics_hosts\"; remove one of the two",
        file.display()
    );
    let (status, said) = run(&arguments, &variables);
    assert_eq!(status, 2, "{said}");
    assert!(said.contains(&twice), "{said}");

    fs::write(&file, "# a comment\nhttp://127.0.0.1:1/file 1s\n").unwrap();
    let agent = Agent::start(&arguments, &variables);
    agent.wait_for_stderr("produce hosts=3 ", SOON);
    fs::write(
        &file,
        "# a comment\nhttp://127.0.0.1:1/file 1s\nhttp://127.0.0.1:1/both 1s\nhttp://127.0.0.1:1/new 1s\n",
    )
    .unwrap();
    agent.wait_for_stderr(&twice, SOON);
    assert_eq!(agent.said("reload hosts="), 0);
    // The file was read, so it is enough to change the table.
    case.db
        .execute("DELETE FROM host_metrics_hosts WHERE address LIKE '%both'");
    agent.wait_for_stderr("reload hosts=4", SOON);
    fs::write(&file, "http://127.0.0.1:1/file 1s bad=\n").unwrap();
    agent.wait_for_stderr(&format!("{}:1:", file.display()), SOON);
    case.db.execute("DELETE FROM host_metrics_hosts");
    agent.wait_for_stderr("reload hosts=3", SOON);
    assert_eq!(agent.said("hosts stay as they were"), 2, "{}", agent.stderr());
    agent.signal("HUP");
    let again = || (agent.said("reload hosts=3") == 2).then_some(());
    scratch::wait_for(Duration::from_secs(30), "read again at a request", again, || {
        agent.stderr()
    });
    agent.stop();
}

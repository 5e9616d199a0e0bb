//! `host-metrics validate`: lists the hosts as they are understood, and forecasts what checking them takes.
//!
//! Pure but for [`run`]; `measure` makes the checks that the forecast needs.

mod forecast;
mod list;
mod measure;
mod warnings;

use url::Host;

use crate::commands::validate::measure::{Cost, Tried};
use crate::config::CheckConfig;
use crate::limits::{self, Limits};
use crate::produce::host_file::Hosts;
use crate::terminal::{columns, wrap};

/// The indent of what does not fit on the line of a terminal and is wrapped: it stands below the values of the forecast.
const INDENT: usize = 13;

/// What is measured beside the hosts.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Or why it could not be measured.
    cost: Result<Cost, String>,
    limits: Limits,
    /// In the order of the hosts, with `--try`.
    tried: Option<Vec<Tried>>,
}

/// The report, as it is printed on a terminal of this width, if there is one. With `tries` each host is checked once; `show` gets the
/// progress.
pub fn run(
    config: &CheckConfig,
    hosts: &Hosts,
    tries: bool,
    width: Option<usize>,
    show: impl Fn(&str) + Sync,
) -> anyhow::Result<String> {
    limits::raise_open_files();
    let measured = Measured {
        cost: Cost::measure(config).map_err(|error| format!("{error:#}")),
        limits: limits::current(),
        tried: match tries {
            true => Some(measure::try_all(config, &hosts.targets, show)?),
            false => None,
        },
    };
    let report = report(config, hosts, &measured);
    let lines = report.lines().map(|line| wrap(line, INDENT, width) + "\n");
    Ok(lines.collect())
}

/// The hosts, the forecast and the warnings. Pure.
fn report(config: &CheckConfig, hosts: &Hosts, measured: &Measured) -> String {
    let targets = &hosts.targets;
    let mut lines = list::list(config, hosts, measured);
    lines.push(String::new());
    lines.extend(columns(&forecast::forecast(config, targets, measured)));
    let mut warnings = hosts.warnings.clone();
    warnings.extend(warnings::warnings(config, targets, measured.tried.as_deref()));
    let names = targets
        .iter()
        .filter(|target| matches!(target.url.host(), Some(Host::Domain(_))));
    let at_most = |count: usize| count.min(config.max_threads);
    warnings.extend(limits::warnings(
        measured.limits,
        at_most(targets.len()),
        at_most(names.count()),
    ));
    if !warnings.is_empty() {
        lines.push(String::new());
    }
    lines.extend(warnings.iter().map(|warning| format!("warning: {warning}")));
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::produce::host_file;
    use crate::sample::Outcome;

    fn config() -> CheckConfig {
        CheckConfig {
            timeout: Duration::from_secs(10),
            max_threads: 3,
            max_body_bytes: 1 << 20,
            user_agent: "test".into(),
            ca_file: None,
            secrets_dir: None,
            agent_name: "test".into(),
        }
    }

    fn measured() -> Measured {
        Measured {
            cost: Ok(Cost {
                http: Duration::from_micros(60),
                https: Duration::from_micros(350),
            }),
            limits: Limits::default(),
            tried: None,
        }
    }

    fn report_of(hosts: &str) -> String {
        report(
            &config(),
            &host_file::parse("hosts", hosts.as_bytes()).unwrap(),
            &measured(),
        )
    }

    #[test]
    fn every_host_is_listed_as_understood_and_the_forecast_adds_them_up() {
        assert_eq!(
            report_of(
                "https://google.com 5\n\
                 example.com 30s\n\
                 http://10.0.0.7:8080/health 1m (status: (ok|warn))\n"
            ),
            "EVERY  TIMEOUT  HOST\n\
             5m     10s      https://google.com\n\
             30s    10s      example.com -> https://example.com/\n\
             1m     10s      http://10.0.0.7:8080/health          (status: (ok|warn))\n\
             \n\
             hosts        3\n\
             checks/s     0.053\n\
             cpu          0.0017 % of a core, at 0.11 ms per check over http and 0.40 ms over https (measured here)\n\
             threads      about 1 if a check takes 300ms, at most 3 if every host hangs\n\
             files        about 65, at most 67\n\
             memory       about 12 MB, at most 12 MB if every host hangs\n\
             bodies       at most 23 MB more memory while bodies are read (up to 1 at once, MAX_BODY_BYTES=1048576), \
             and 2 KB for the compiled regexes (1 distinct)\n\
             records/day  4608\n\
             table/month  33 MB, at 240 bytes per row including the index\n\
             state/year   6 MB for each place that checks\n"
        );
    }

    #[test]
    fn the_forecast_of_memory_counts_threads_decoders_and_each_regex_once() {
        let memory = |hosts: &str| {
            let report = report_of(hosts);
            let line = report.lines().find_map(|line| line.strip_prefix("bodies "));
            line.map(|line| line.trim().to_owned())
        };
        assert_eq!(memory("a.example 1h\n"), None);
        let four = "a.example 1h hello\nb.example 1h hello\nc.example 1h hello\nd.example 1h \\w{3,60}\n";
        assert_eq!(
            memory(four).as_deref(),
            Some(
                "at most 71 MB more memory while bodies are read (up to 3 at once, MAX_BODY_BYTES=1048576), \
                 and 1 MB for the compiled regexes (2 distinct)"
            )
        );
    }

    #[test]
    fn every_option_is_listed() {
        let report = report_of(
            "http://[::1]/ 1h method=HEAD status=404,500-599 follow=0 ip=6 tls=insecure topic=other timeout=2s\n\
             https://b\u{fc}cher.example/ 1h follow=3 ip=4 a  b\n\
             c.example/#x 1h method=POST header=\"Cookie: a=b\" body=\"a b\" plain-auth=yes proxy=http://p:1 slow=1s \
             cert-days=9 json=/a:b name=\"Shop front\" group=Shops ! c\n",
        );
        let expected = "\
EVERY  TIMEOUT  HOST

group Shops
1h     10s      c.example/#x -> https://c.example/                         method=POST header=\"Cookie: …\" body=\"…\" \
plain-auth=yes proxy=http://p:1 slow=1s cert-days=9 json=\"/a:b\" name=\"Shop front\" ! c

no group
1h     2s       http://[::1]/                                              status=404,500-599 method=HEAD \
follow=0 topic=other ip=6 tls=insecure
1h     10s      https://b\u{fc}cher.example/ -> https://xn--bcher-kva.example/  follow=3 ip=4 a  b
";
        assert!(report.starts_with(expected), "{report}");
    }

    #[test]
    fn hosts_stand_by_group_and_profile() {
        let report = report_of(
            "@api slow=1s\n@eu ip=4\na.example 1h\nb.example 1h @api @eu group=G\nc.example 1h @api\nd.example 1h group=G\n\
             e.example 1h @api @eu group=G\n",
        );
        let lines = report.lines().take_while(|line| !line.starts_with("hosts "));
        let lines: Vec<_> = lines
            .filter(|line| !line.is_empty())
            .map(|line| line.trim_start_matches("1h     10s      "))
            .map(|line| line.split(" -> ").next().unwrap_or_default())
            .collect();
        assert_eq!(
            lines,
            [
                "EVERY  TIMEOUT  HOST",
                "group G",
                "d.example",
                "group G, @api @eu",
                "b.example",
                "e.example",
                "no group",
                "a.example",
                "@api",
                "c.example",
            ]
        );
    }

    #[test]
    fn a_trial_shows_outcomes_and_replaces_what_is_assumed() {
        let tried = |outcome, error: Option<&str>, ip: &str| Tried {
            outcome,
            error: error.map(str::to_owned),
            ip: ip.parse().ok(),
            took: Duration::from_secs(3),
        };
        let measured = Measured {
            tried: Some(vec![
                tried(Outcome::Ok, None, "192.0.2.1"),
                tried(Outcome::BadStatus, Some("status 503\u{1b}[2J"), "192.0.2.1"),
            ]),
            cost: Err("no port".into()),
            ..measured()
        };
        let hosts = host_file::parse("hosts", b"http://a.example/ 1s\nhttp://b.example/ 1s\n").unwrap();
        let report = report(&config(), &hosts, &measured);
        for line in [
            "EVERY  TIMEOUT  NOW                                HOST",
            "1s     950ms    ok 3.00 s                          http://a.example/",
            "1s     950ms    bad_status 3.00 s: status 503 [2J  http://b.example/",
            "cpu          unknown: no port",
            "threads      about 2 if checks take as long as now, at most 2 if every host hangs",
            "warning: 2 hosts are on 192.0.2.1, which gets 2.00 checks/s together: a firewall there may block them",
        ] {
            assert!(report.lines().any(|shown| shown == line), "{line}:\n{report}");
        }
    }

    #[test]
    fn control_characters_of_a_regex_do_not_reach_the_terminal() {
        let report = report_of("a.example 1h x\u{1b}]0;y\0z\n");
        assert!(report.contains("  x ]0;y z\n"), "{report:?}");
    }

    #[test]
    fn settings_that_have_no_full_effect_cause_warnings() {
        let report = report_of("a.example 10s timeout=30s\nb.example 1s\nc.example 2s\n127.0.0.1 1h ip=6\n");
        let warnings: Vec<_> = report
            .lines()
            .filter(|line| line.starts_with("warning: "))
            .collect();
        assert_eq!(
            warnings,
            [
                "warning: a.example: timeout=30s is reduced to 9500ms, 95 % of the interval of 10s, \
                 so that a check ends before the next one is due",
                "warning: 127.0.0.1: every check will fail, because ip= requires the other address family",
                "warning: CHECK_TIMEOUT (10s) is reduced to 95 % of the interval for 2 of the hosts; see the column TIMEOUT",
                "warning: there are 4 hosts, but MAX_THREADS=3: while that many hosts hang, ticks of the others are missed; \
                 with PRODUCE_GROUP this matters when one producer is left, because it then checks all hosts",
            ]
        );
        let report = report_of(
            "http://a.example/ 1h .*\nhttp://b.example/ 1h ! x?\nhttp://c.example/ 1h [a&&b]\nhttp://d.example/ 1h ^$\n\
             http://f.example/ 1h only (\\w+ )?$9.99|x^\nhttp://g.example/ 1h ^x\\$5|(y?$)\\n*\n\
             http://e.example/1 3s\nhttp://e.example/2 1s\nhttp://e.example/3 1h\n",
        );
        let warnings: Vec<_> = report
            .lines()
            .filter(|line| line.starts_with("warning: "))
            .collect();
        assert_eq!(
            warnings[..5],
            [
                "warning: http://a.example/: the REGEX .* matches every body, so it checks nothing",
                "warning: http://b.example/: the REGEX x? matches every body, so every check will fail",
                "warning: http://c.example/: the REGEX [a&&b] can never match, so every check will fail",
                r"warning: http://f.example/: the REGEX only (\w+ )?$9.99|x^ can never match, so every check will fail; for the characters `$` and `^` write `\$` and `\^`",
                "warning: CHECK_TIMEOUT (10s) is reduced to 95 % of the interval for 2 of the hosts; see the column TIMEOUT",
            ]
        );
        let crowded = "warning: 3 hosts are on e.example, which gets 1.33 checks/s together: a firewall there may block them";
        assert_eq!(warnings.last(), Some(&crowded), "{report}");
        assert!(!report_of("a.example 10s timeout=9s\n").contains("warning"));
    }
}

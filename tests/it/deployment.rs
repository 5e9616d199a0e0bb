//! The files of the deployments: `produce` gets neither the address nor credentials of the database, and may raise its limits.

use std::fs;
use std::path::Path;

use host_metrics::config::NAMES;

fn file(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The variables of the database that are neither its address nor a credential. Every other one must be kept from `produce`.
const HARMLESS: [&str; 8] = [
    "DB_TABLE",
    "DB_SSLMODE",
    "DB_SSLROOTCERT",
    "DB_BATCH_SIZE",
    "DB_BATCH_SECONDS",
    "DB_RETENTION",
    "DB_ROLLUP_RETENTION",
    "DB_SYNCHRONOUS_COMMIT",
];

/// The credentials of the status page's user in `env`, which only Compose reads.
const OF_THE_PAGE: [&str; 2] = ["PAGE_DB_USER", "PAGE_DB_PASSWORD"];

/// What a unit of systemd removes from the environment, in lines like `UnsetEnvironment=A B`.
fn unset(unit: &str) -> Vec<String> {
    let unit = file(unit);
    let lines = unit
        .lines()
        .filter_map(|line| line.strip_prefix("UnsetEnvironment="));
    lines
        .flat_map(|names| names.split(' ').map(str::to_owned))
        .collect()
}

#[test]
fn produce_gets_no_variable_of_the_database() {
    let compose = file("docker-compose.yml");
    let (_, produce) = compose.split_once("\n  produce:\n").unwrap();
    let (produce, _) = produce.split_once("\n  consume:\n").unwrap();
    let pod = file("deploy/kubernetes/produce.yaml");
    let unset = unset("deploy/systemd/host-metrics-produce.service");
    let of_the_database = NAMES
        .into_iter()
        .filter(|name| name.starts_with("DB_") && !HARMLESS.contains(name));
    let names: Vec<&str> = of_the_database.chain(OF_THE_PAGE).collect();
    assert!(names.contains(&"DB_HOST") && names.contains(&"DB_PASSWORD_FILE"));
    for name in names {
        assert!(
            produce.contains(&format!("      {name}: \"\"\n")),
            "{name} in {produce}"
        );
        assert!(
            pod.contains(&format!("- {{name: {name}, value: \"\"}}\n")),
            "{name} in {pod}"
        );
        assert!(unset.iter().any(|word| word == name), "{name} in {unset:?}");
    }
    let is_given_the_secret = |path: &str| file(path).contains("secretRef: {name: database}");
    assert!(!is_given_the_secret("deploy/kubernetes/produce.yaml"));
    assert!(is_given_the_secret("deploy/kubernetes/consume.yaml"));
}

#[test]
fn consume_does_not_get_the_credentials_of_the_page() {
    let compose = file("docker-compose.yml");
    let (_, database) = compose.split_once("\nx-database: &database\n").unwrap();
    let (database, _) = database.split_once("\nservices:\n").unwrap();
    let (_, consume) = compose.split_once("\n  consume:\n").unwrap();
    let (consume, _) = consume.split_once("\n  page:\n").unwrap();
    assert!(consume.contains("environment: {<<: [*kafka, *database]}\n"));
    let unset = unset("deploy/systemd/host-metrics-consume.service");
    for name in OF_THE_PAGE {
        assert!(
            database.contains(&format!("  {name}: \"\"\n")),
            "{name} in {database}"
        );
        assert!(unset.iter().any(|word| word == name), "{name} in {unset:?}");
    }
}

#[test]
fn only_produce_sees_the_secrets_of_the_host_file_and_cannot_change_them() {
    let compose = file("docker-compose.yml");
    assert_eq!(compose.matches("./secrets:/secrets:ro").count(), 1);
    let pod = file("deploy/kubernetes/produce.yaml");
    assert!(pod.contains("- {name: secrets, mountPath: /secrets, readOnly: true}"));
    assert!(pod.contains("secret: {secretName: site-secrets, defaultMode: 0440}"));
    assert!(!file("deploy/kubernetes/consume.yaml").contains("site-secrets"));
    assert!(file("deploy/kubernetes/kustomization.yaml").contains("- name: site-secrets\n"));
}

#[test]
fn the_page_is_a_service_of_its_own_whose_user_reads_only_the_state() {
    let compose = file("docker-compose.yml");
    let (_, page) = compose.split_once("\n  page:\n").unwrap();
    let (page, _) = page.split_once("\n  kafka:\n").unwrap();
    for line in [
        "command: page",
        "DB_USER: ${PAGE_DB_USER:-}",
        "DB_PASSWORD: ${PAGE_DB_PASSWORD:-}",
        "KAFKA_SASL_PASSWORD: \"\"",
        "PAGE_ADDR: 0.0.0.0:9480",
        "ports: [\"${PAGE_PUBLISH:-127.0.0.1:9480}:9480\"]",
    ] {
        assert!(page.contains(line), "{line} in {page}");
    }
    // No other port is published.
    assert_eq!(compose.matches("ports:").count(), 1);

    let pod = file("deploy/kubernetes/page.yaml");
    for part in [
        "args: [page]",
        "secretRef: {name: page}",
        "{name: PAGE_ADDR, value: \"0.0.0.0:9480\"}",
        "ports: [{name: page, containerPort: 9480}]",
        "ports: [{name: page, port: 80, targetPort: page}]",
    ] {
        assert!(pod.contains(part), "{part} in {pod}");
    }
    assert!(!pod.contains("secretRef: {name: kafka}") && !pod.contains("secretRef: {name: database}"));
    let kustomization = file("deploy/kubernetes/kustomization.yaml");
    assert!(kustomization.contains("  - page.yaml\n") && kustomization.contains("- name: page "));
    assert!(file("deploy/kubernetes/networkpolicy.yaml").contains("{protocol: TCP, port: page}"));

    let unit = file("deploy/systemd/host-metrics-page.service");
    let settings = "EnvironmentFile=/etc/host-metrics/env\nEnvironmentFile=/etc/host-metrics/page.env\n";
    assert!(
        unit.contains(settings) && unit.contains("/host-metrics page\n"),
        "{unit}"
    );
}

#[test]
fn every_variable_of_the_deployments_exists() {
    let known = |name: &str| {
        let of_compose = ["PAGE_DB_USER", "PAGE_DB_PASSWORD", "PAGE_PUBLISH"];
        NAMES.contains(&name) || of_compose.contains(&name)
    };
    let env = file("templates/env");
    let lines = env.lines().map(|line| line.trim_start_matches('#'));
    let pairs = lines.filter_map(|line| line.split_once('='));
    let is_name = |name: &&str| !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c == '_');
    let names: Vec<&str> = pairs.map(|(name, _)| name).filter(is_name).collect();
    assert!(names.len() > 30);
    for name in names {
        assert!(known(name), "{name}");
    }
}

#[test]
fn the_units_filter_of_system_calls_lets_the_agents_raise_their_limit_of_open_files() {
    for agent in ["produce", "consume", "page"] {
        let unit = file(&format!("deploy/systemd/host-metrics-{agent}.service"));
        let filters: Vec<_> = unit
            .lines()
            .filter_map(|line| line.strip_prefix("SystemCallFilter="))
            .collect();
        assert_eq!(
            filters,
            [
                "@system-service",
                "~@privileged @resources",
                "setrlimit prlimit64"
            ],
            "{agent}"
        );
    }
}

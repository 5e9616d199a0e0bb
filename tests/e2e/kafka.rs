//! A real Apache Kafka: one node in KRaft mode on 127.0.0.1, from the jars that `make setup` downloads.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use host_metrics::commands::demo::postgres::free_port;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication, TopicResult};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaResult, RDKafkaErrorCode};
use rdkafka::groups::GroupList;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::scratch::{self, Process, wait_for};

/// Includes the start of the JVM on a busy machine.
const START_WITHIN: Duration = Duration::from_secs(90);
const REQUEST_WITHIN: Duration = Duration::from_secs(10);

const CLUSTER_ID: &str = "aG9zdC1tZXRyaWNzLWUyZQ";

const LOGGING: &str = "\
rootLogger.level = warn
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = [%d] %p %m (%c)%n
";

pub struct Kafka {
    directory: PathBuf,
    port: u16,
    broker: Option<Process>,
}

/// A listener in addition to the plain one, and whom it accepts.
pub struct Listener {
    pub name: &'static str,
    /// PLAINTEXT, SSL or SASL_SSL.
    pub protocol: &'static str,
    pub port: u16,
    /// The advertised port: its own, or a proxy's.
    pub advertised_port: u16,
    /// Kafka's settings for the listener without their prefix, such as `ssl.client.auth`.
    pub settings: Vec<(&'static str, String)>,
}

/// A record of a topic.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub timestamp_ms: i64,
}

impl Kafka {
    /// The broker that all tests share that do not disturb it. Every test has its own topic and group.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Kafka> = OnceLock::new();
        SHARED.get_or_init(Self::start)
    }

    pub fn start() -> Self {
        Self::start_with(&[], &[])
    }

    /// A broker with more listeners, and with SCRAM users in the format of Kafka's own tool.
    pub fn start_with(listeners: &[Listener], scram: &[&str]) -> Self {
        Self::start_with_settings(listeners, scram, "")
    }

    /// With further settings, too: lines of `name=value`.
    pub fn start_with_settings(listeners: &[Listener], scram: &[&str], settings: &str) -> Self {
        let directory = scratch::directory("kafka");
        let (port, controller_port) = (free_port().unwrap(), free_port().unwrap());
        let (mut addresses, mut advertised) = (String::new(), String::new());
        let (mut protocols, mut more) = (String::new(), settings.to_owned());
        for listener in listeners {
            let Listener {
                name, protocol, port, ..
            } = listener;
            addresses += &format!(",{name}://127.0.0.1:{port}");
            advertised += &format!(",{name}://127.0.0.1:{}", listener.advertised_port);
            protocols += &format!(",{name}:{protocol}");
            for (setting, value) in &listener.settings {
                more += &format!("listener.name.{}.{setting}={value}\n", name.to_lowercase());
            }
        }
        let settings = format!(
            "process.roles=broker,controller\n\
             node.id=1\n\
             controller.quorum.voters=1@127.0.0.1:{controller_port}\n\
             listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}{addresses}\n\
             advertised.listeners=PLAINTEXT://127.0.0.1:{port}{advertised}\n\
             listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT{protocols}\n\
             controller.listener.names=CONTROLLER\n\
             log.dirs={directory}/log\n\
             auto.create.topics.enable=false\n\
             offsets.topic.replication.factor=1\n\
             offsets.topic.num.partitions=4\n\
             transaction.state.log.replication.factor=1\n\
             transaction.state.log.min.isr=1\n\
             group.initial.rebalance.delay.ms=0\n\
             # Back within seconds after a kill.\n\
             broker.session.timeout.ms=2000\n\
             broker.heartbeat.interval.ms=500\n\
             {more}",
            directory = directory.display()
        );
        fs::write(directory.join("server.properties"), settings).unwrap();
        fs::write(directory.join("log4j2.properties"), LOGGING).unwrap();
        let mut kafka = Self {
            directory,
            port,
            broker: None,
        };
        let mut format = kafka.java("kafka.tools.StorageTool");
        format
            .args(["format", "--cluster-id", CLUSTER_ID, "--config"])
            .arg(kafka.settings());
        for user in scram {
            format.args(["--add-scram", user]);
        }
        let output = format
            .output()
            .unwrap_or_else(|error| panic!("cannot run java ({error}): `make setup`"));
        assert!(
            output.status.success(),
            "{format:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        kafka.start_again();
        kafka
    }

    pub fn bootstrap_servers(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Sends SIGKILL.
    pub fn kill(&mut self) {
        self.broker.take().expect("it runs").kill();
    }

    /// Sends the broker a signal by its name without SIG, e.g. `STOP`.
    pub fn signal(&self, name: &str) {
        self.broker.as_ref().expect("it runs").signal(name);
    }

    pub fn restart(&mut self) {
        self.kill();
        self.start_again();
    }

    /// A clean stop, in which the broker stores its state.
    pub fn restart_cleanly(&mut self) {
        self.signal("TERM");
        let mut broker = self.broker.take().expect("it runs");
        wait_for(START_WITHIN, "Kafka ends", || broker.exited(), || self.log());
        self.start_again();
    }

    /// Starts the killed broker with the same port and log, and waits until it answers and accepts topics.
    pub fn start_again(&mut self) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.directory.join("broker.log"))
            .unwrap();
        let mut command = self.java("kafka.Kafka");
        command
            .arg(self.settings())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let mut broker = Process::start(&mut command);
        let client: BaseProducer = self.client().create().unwrap();
        wait_for(
            START_WITHIN,
            "Kafka answers",
            || {
                let ended = broker.exited();
                assert_eq!(ended, None, "Kafka ended: {}", self.log());
                let metadata = client
                    .client()
                    .fetch_metadata(None, Duration::from_secs(1))
                    .ok()?;
                (!metadata.brokers().is_empty()).then_some(())
            },
            || self.log(),
        );
        self.broker = Some(broker);
        // A broker that answers may still be fenced: the controller has no heartbeat from it and puts no topic on it.
        let topic = NewTopic::new("not-made", 1, TopicReplication::Fixed(1));
        self.create(&topic, &AdminOptions::new().validate_only(true));
    }

    /// The settings of a client. It logs nothing, because outages of the broker are part of the tests.
    pub fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.bootstrap_servers());
        config.set("log_level", "0");
        config
    }

    pub fn create_topic(&self, name: &str, partitions: i32) {
        let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        self.create(&topic, &admin_options());
        self.wait_for_partitions(name, partitions);
    }

    /// Kafka refuses records without a key there.
    pub fn create_compacted_topic(&self, name: &str, partitions: i32) {
        let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        let topic = topic.set("cleanup.policy", "compact");
        self.create(&topic, &admin_options());
        self.wait_for_partitions(name, partitions);
    }

    fn create(&self, topic: &NewTopic<'_>, options: &AdminOptions) {
        let exists = RDKafkaErrorCode::TopicAlreadyExists;
        self.administer(options, exists, async |admin, options| {
            admin.create_topics([topic], options).await
        });
    }

    pub fn delete_topic(&self, name: &str) {
        let gone = RDKafkaErrorCode::UnknownTopicOrPartition;
        self.administer(&admin_options(), gone, async |admin, options| {
            admin.delete_topics(&[name], options).await
        });
        self.wait_for_partitions(name, 0);
    }

    /// Deletes a group that has no members, with its offsets.
    pub fn delete_group(&self, group: &str) {
        let gone = RDKafkaErrorCode::GroupIdNotFound;
        self.administer(&admin_options(), gone, async |admin, options| {
            admin.delete_groups(&[group], options).await
        });
    }

    /// Runs Kafka's tool for rights with these arguments.
    pub fn change_rights(&self, arguments: &[&str]) {
        let mut command = self.java("org.apache.kafka.tools.AclCommand");
        command
            .args(["--bootstrap-server", &self.bootstrap_servers(), "--force"])
            .args(arguments);
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stdout)
        );
    }

    /// Increases the number of the topic's partitions to `partitions`.
    pub fn add_partitions(&self, name: &str, partitions: i32) {
        let new = NewPartitions::new(name, partitions as usize);
        let added = RDKafkaErrorCode::InvalidPartitions;
        self.administer(&admin_options(), added, async |admin, options| {
            admin.create_partitions([&new], options).await
        });
        self.wait_for_partitions(name, partitions);
    }

    /// Deletes the records of a partition before an offset, as retention does.
    pub fn delete_records(&self, topic: &str, partition: i32, before: i64) {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(topic, partition, Offset::Offset(before))
            .unwrap();
        self.administer(
            &admin_options(),
            RDKafkaErrorCode::NoError,
            async |admin, options| {
                let deleted = admin.delete_records(&list, options).await?;
                let elements = deleted.elements();
                elements
                    .iter()
                    .map(|element| element.error().map(|()| Ok(topic.to_owned())))
                    .collect()
            },
        );
    }

    /// The members of a group, by their member IDs.
    pub fn members(&self, group: &str) -> BTreeSet<String> {
        let list = self.groups(group);
        let members = list.groups().iter().flat_map(|group| group.members());
        members.map(|member| member.id().to_owned()).collect()
    }

    /// Whether no rebalance of the group is under way.
    pub fn group_is_stable(&self, group: &str) -> bool {
        let list = self.groups(group);
        list.groups().iter().all(|group| group.state() == "Stable")
    }

    fn groups(&self, group: &str) -> GroupList {
        let client: BaseConsumer = self.client().create().unwrap();
        wait_for(
            START_WITHIN,
            "the group's members",
            || client.fetch_group_list(Some(group), REQUEST_WITHIN).ok(),
            || self.log(),
        )
    }

    /// Repeats the request until it succeeds, or until it fails as it does if an attempt without an answer has succeeded. On a busy
    /// machine the broker may not answer, and the controller may have fenced it, so that partitions have no leader for a while.
    fn administer(
        &self,
        options: &AdminOptions,
        already_done: RDKafkaErrorCode,
        request: impl AsyncFn(&AdminClient<DefaultClientContext>, &AdminOptions) -> KafkaResult<Vec<TopicResult>>,
    ) {
        let admin = self.client().create().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let last = RefCell::new(None);
        let is_done = |result: &TopicResult| {
            result
                .as_ref()
                .err()
                .is_none_or(|(_, code)| *code == already_done)
        };
        wait_for(
            START_WITHIN,
            "Kafka has done what it was asked for",
            || {
                let results = runtime.block_on(request(&admin, options));
                let done = results.as_ref().is_ok_and(|results| results.iter().all(is_done));
                last.replace(Some(results));
                done.then_some(())
            },
            || format!("{last:?}\n{}", self.log()),
        );
    }

    /// A created or deleted topic may not be known everywhere in the broker yet.
    fn wait_for_partitions(&self, topic: &str, partitions: i32) {
        let client: BaseProducer = self.client().create().unwrap();
        wait_for(
            START_WITHIN,
            "the topic has so many partitions, with leaders",
            || {
                let metadata = client.client().fetch_metadata(Some(topic), REQUEST_WITHIN).ok()?;
                let found = metadata.topics().first()?.partitions();
                let led = found.iter().filter(|partition| partition.leader() >= 0).count();
                (led == partitions as usize).then_some(())
            },
            || self.log(),
        );
    }

    /// Writes records (partition, key, value) and waits until all are acknowledged.
    pub fn write(
        &self,
        topic: &str,
        records: impl IntoIterator<Item = (i32, Option<Vec<u8>>, Option<Vec<u8>>)>,
    ) {
        let producer: BaseProducer = self
            .client()
            .set("enable.idempotence", "true")
            .set("linger.ms", "5")
            .create()
            .unwrap();
        for (partition, key, value) in records {
            let mut record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(topic).partition(partition);
            record.key = key.as_deref();
            record.payload = value.as_deref();
            while let Err((error, again)) = producer.send(record) {
                assert_eq!(
                    error.rdkafka_error_code(),
                    Some(RDKafkaErrorCode::QueueFull),
                    "{error}"
                );
                producer.poll(Duration::from_millis(50));
                record = again;
            }
        }
        producer.flush(Duration::from_secs(60)).unwrap();
        assert_eq!(producer.in_flight_count(), 0);
    }

    /// Writes these values to partition 0 as one compressed batch.
    pub fn write_batch(&self, topic: &str, compression: &str, values: &[&[u8]]) {
        let bytes: usize = values.iter().map(|value| value.len() + 100).sum();
        let producer: BaseProducer = self
            .client()
            .set("enable.idempotence", "true")
            .set("compression.type", compression)
            .set("message.max.bytes", bytes.max(1_000_000).to_string())
            .set("batch.size", bytes.max(1_000_000).to_string())
            .set("queue.buffering.max.kbytes", "2000000")
            .set("linger.ms", "5000")
            .create()
            .unwrap();
        for value in values {
            let record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(topic).partition(0).payload(value);
            producer.send(record).map_err(|(error, _)| error).unwrap();
        }
        producer.flush(Duration::from_secs(60)).unwrap();
        assert_eq!(producer.in_flight_count(), 0);
    }

    /// Every record of the topic, by partition and offset.
    pub fn records(&self, topic: &str) -> Vec<Record> {
        let consumer: BaseConsumer = self
            .client()
            .set("group.id", "e2e-reader")
            .set("enable.auto.commit", "false")
            .set("isolation.level", "read_committed")
            .create()
            .unwrap();
        let mut assignment = TopicPartitionList::new();
        let mut missing = 0;
        for partition in self.partitions(&consumer, topic) {
            // A topic that was just made may not have all its leaders yet.
            let (low, high) = wait_for(
                START_WITHIN,
                "the ends of the partition",
                || consumer.fetch_watermarks(topic, partition, REQUEST_WITHIN).ok(),
                || self.log(),
            );
            missing += high - low;
            assignment
                .add_partition_offset(topic, partition, Offset::Beginning)
                .unwrap();
        }
        consumer.assign(&assignment).unwrap();
        let mut records = Vec::new();
        while missing > 0 {
            match consumer.poll(START_WITHIN).expect("a record in time") {
                // On a busy machine a connection may end; librdkafka makes another one.
                Err(error)
                    if matches!(
                        error.rdkafka_error_code(),
                        Some(RDKafkaErrorCode::AllBrokersDown | RDKafkaErrorCode::BrokerTransportFailure)
                    ) => {}
                record => {
                    records.push(Record::from(&record.unwrap()));
                    missing -= 1;
                }
            }
        }
        records.sort();
        records
    }

    /// The group's committed offset of each partition, in order.
    pub fn committed(&self, group: &str, topic: &str) -> Vec<Option<i64>> {
        let consumer: BaseConsumer = self.client().set("group.id", group).create().unwrap();
        let mut list = TopicPartitionList::new();
        for partition in self.partitions(&consumer, topic) {
            list.add_partition(topic, partition);
        }
        let committed = wait_for(
            START_WITHIN,
            "the committed offsets",
            || consumer.committed_offsets(list.clone(), REQUEST_WITHIN).ok(),
            || self.log(),
        );
        committed
            .elements()
            .iter()
            .map(|element| match element.offset() {
                Offset::Offset(offset) => Some(offset),
                _ => None,
            })
            .collect()
    }

    /// Waits until the group has committed these offsets.
    pub fn wait_for_commits(&self, group: &str, topic: &str, offsets: &[Option<i64>]) {
        wait_for(
            START_WITHIN,
            "the commits",
            || (self.committed(group, topic) == offsets).then_some(()),
            || format!("{:?} instead of {offsets:?}", self.committed(group, topic)),
        );
    }

    fn partitions(&self, consumer: &BaseConsumer, topic: &str) -> Vec<i32> {
        let metadata = wait_for(
            START_WITHIN,
            "the topic's partitions",
            || consumer.fetch_metadata(Some(topic), REQUEST_WITHIN).ok(),
            || self.log(),
        );
        let mut numbers: Vec<i32> = metadata.topics()[0]
            .partitions()
            .iter()
            .map(|partition| partition.id())
            .collect();
        numbers.sort_unstable();
        numbers
    }

    fn java(&self, main_class: &str) -> Command {
        let mut command = Command::new("java");
        command
            .args([
                "-Xms256m",
                "-Xmx256m",
                "-XX:+UseSerialGC",
                "-XX:TieredStopAtLevel=1",
                "-Xshare:auto",
            ])
            .arg(format!(
                "-Dlog4j2.configurationFile={}/log4j2.properties",
                self.directory.display()
            ))
            .arg("-cp")
            .arg(jars().join("*"))
            .arg(main_class)
            .current_dir(&self.directory)
            .stdin(Stdio::null());
        command
    }

    fn settings(&self) -> PathBuf {
        self.directory.join("server.properties")
    }

    fn log(&self) -> String {
        scratch::text(&self.directory.join("broker.log"))
    }
}

impl From<&BorrowedMessage<'_>> for Record {
    fn from(message: &BorrowedMessage<'_>) -> Self {
        Self {
            partition: message.partition(),
            offset: message.offset(),
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            timestamp_ms: message
                .timestamp()
                .to_millis()
                .expect("Kafka stamps every record"),
        }
    }
}

/// The directory of the jars: HOST_METRICS_KAFKA_LIBS, or else that of `make setup`.
fn jars() -> PathBuf {
    let directory = std::env::var_os("HOST_METRICS_KAFKA_LIBS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/kafka/libs"),
        PathBuf::from,
    );
    let found = fs::read_dir(&directory)
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().starts_with("kafka_"));
    assert!(
        found,
        "no Kafka in {}: `make setup` fetches it (HOST_METRICS_KAFKA_LIBS names another place)",
        directory.display()
    );
    directory
}

fn admin_options() -> AdminOptions {
    AdminOptions::new().operation_timeout(Some(REQUEST_WITHIN))
}

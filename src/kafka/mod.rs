//! What every part of the program that talks to Kafka needs: how to connect, and why a connection fails.
//!
//! Owns the librdkafka properties that all clients share ([`settings`]), the small clients that ask a question or two
//! ([`client`], [`topics`]), a reader of parts of partitions ([`reader`]), a group member that reads nothing ([`member`]), the watch
//! over a group ([`group`]), the explanation of a refusal ([`explain`]), and a Fetch of its own for a batch that librdkafka cannot
//! read ([`batch_head`]). The producer is in `produce::publisher`, and the consumer in `consume::source`.

mod batch_head;
mod client;
mod connection;
mod explain;
pub mod group;
mod listener;
pub mod member;
pub mod reader;
mod settings;
mod topics;

pub use batch_head::{BatchHead, batch_head};
pub use client::{reason, small_client};
pub use explain::{Explainer, names_a_cause};
pub use listener::Listener;
pub use settings::client_config;
pub use topics::{Named, look_up_topic, partitions};

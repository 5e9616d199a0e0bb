//! The PAGE_* variables: where and what `page` serves.

use std::net::SocketAddr;

use super::database::{self, DatabaseConfig};
use super::form::MAX_LINE_BYTES;
use super::problem::Problem;
use super::reader::Reader;
use super::secret::Secret;
use crate::page::view::Options;

#[derive(Clone)]
pub struct PageConfig {
    pub database: DatabaseConfig,
    pub addr: SocketAddr,
    pub options: Options,
    /// PAGE_AUTH_FILE: `user:password`, one for each line. If empty, everyone may read the page.
    pub logins: Vec<Secret>,
}

pub(super) fn page(reader: &mut Reader<'_>) -> PageConfig {
    PageConfig {
        database: database::database(reader),
        addr: reader
            .socket_addr("PAGE_ADDR", "127.0.0.1:9480")
            .unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 9_480))),
        options: Options {
            title: reader
                .line("PAGE_TITLE", MAX_LINE_BYTES)
                .unwrap_or_else(|| "Status".to_owned()),
            shows_addresses: shows_addresses(reader),
        },
        logins: logins(reader),
    }
}

fn shows_addresses(reader: &mut Reader<'_>) -> bool {
    let word = |text: &str| match text {
        "yes" => Some(true),
        "no" => Some(false),
        _ => None,
    };
    reader
        .read("PAGE_SHOW_ADDRESSES", "yes or no", word)
        .unwrap_or(false)
}

fn logins(reader: &mut Reader<'_>) -> Vec<Secret> {
    const NAME: &str = "PAGE_AUTH_FILE";
    let Some(text) = reader.secret_file(NAME) else {
        return Vec::new();
    };
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .collect();
    let is_login = |line: &&str| {
        line.split_once(':')
            .is_some_and(|(user, password)| !user.is_empty() && !password.is_empty())
    };
    if !lines.iter().all(is_login) {
        reader.push(Problem::File {
            name: NAME,
            path: String::new(),
            what: "expected a file with user:password on each line".to_owned(),
        });
    }
    lines
        .into_iter()
        .map(|line| Secret::new(line.to_owned()))
        .collect()
}

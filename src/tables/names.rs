//! Names in SQL: DB_TABLE, the objects that belong to it, and quoting.
//!
//! Pure text.

use crate::words::words;

/// Postgres truncates identifiers to 63 bytes (NAMEDATALEN), so 23 are left for the suffix of an object that belongs to the table.
pub const MAX_TABLE_BYTES: usize = 40;
pub const MAX_IDENTIFIER_BYTES: usize = 63;

/// The search path of our sessions. It excludes functions, operators and types that other users created in other schemas; so
/// tables must be named with their schema.
pub const SEARCH_PATH: &str = "pg_catalog, pg_temp";

/// DB_TABLE: a table, with or without a schema. Unquoted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableName {
    pub schema: Option<String>,
    pub name: String,
}

impl TableName {
    /// Parses `table` or `schema.table`. Case is kept. `None`: a part is empty or too long, or has a dot, a double quote or a
    /// control character.
    pub fn parse(text: &str) -> Option<Self> {
        let (schema, name) = match text.split_once('.') {
            Some((schema, name)) => (Some(schema), name),
            None => (None, text),
        };
        let is_odd = |c: char| c == '.' || c == '"' || c.is_control();
        let is_valid =
            |part: &str, max_bytes| (1..=max_bytes).contains(&part.len()) && !part.contains(is_odd);
        let schema_is_valid = schema.is_none_or(|schema| is_valid(schema, MAX_IDENTIFIER_BYTES));
        (schema_is_valid && is_valid(name, MAX_TABLE_BYTES)).then(|| Self {
            schema: schema.map(str::to_owned),
            name: name.to_owned(),
        })
    }

    /// As a quoted SQL identifier with `suffix` appended to the table's name: `"s"."host_metrics_offsets"`.
    pub fn quoted(&self, suffix: &str) -> String {
        let name = quoted(&format!("{}{suffix}", self.name));
        match &self.schema {
            Some(schema) => format!("{}.{name}", quoted(schema)),
            None => name,
        }
    }
}

words! {
    /// The tables and views that belong to DB_TABLE, in the order of creation; `drop` uses the reverse order.
    Object,
    /// Appended to the main table's name.
    suffix:
    Main "",
    Offsets "_offsets",
    Rejected "_rejected",
    Series "_series",
    Rollups "_rollups",
    Incidents "_incidents",
    Windows "_windows",
    Hosts "_hosts",
    Latest "_latest",
    Uptime "_uptime",
    Latency "_latency",
    Certificates "_certificates",
}

impl Object {
    /// The tables of the state, which the views read.
    pub const STATE: [Self; 4] = [Self::Series, Self::Rollups, Self::Incidents, Self::Windows];

    pub(super) fn is_view(self) -> bool {
        matches!(
            self,
            Self::Latest | Self::Uptime | Self::Latency | Self::Certificates
        )
    }

    pub(super) fn keyword(self) -> &'static str {
        if self.is_view() { "VIEW" } else { "TABLE" }
    }

    /// In the database; `docs/reference/tables.md` says more.
    pub(super) fn comment(self) -> &'static str {
        match self {
            Self::Main => "one row per tick of each host",
            Self::Offsets => {
                "the next Kafka offset of each partition, written together with the rows or the state"
            }
            Self::Rejected => {
                "records that could not be stored, with the reason; of a key or value above 1 MiB the first 64 KiB"
            }
            Self::Series => {
                "the state of each host as each place (agent) sees it, and the verdict of all places"
            }
            Self::Rollups => {
                "totals of each series by bucket of 300, 3600 and 86400 seconds; null means zero"
            }
            Self::Incidents => "one row per outage of a host by verdict; ended_at is null while it lasts",
            Self::Windows => "the totals of each host and place over the windows of _uptime and _latency",
            Self::Hosts => "the hosts of produce -c postgres: each row is a line of the host file",
            Self::Latest => "the newest row of each host and place",
            Self::Uptime => "per host (agent is null) and place: ticks, uptime and verdict_uptime by window",
            Self::Latency => {
                "per host and window: percentiles of the latency, accurate to 12 %, and the maximum"
            }
            Self::Certificates => "per host: when the certificate that was seen last expires",
        }
    }
}

/// `name` as a quoted SQL identifier.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `text` as an SQL string literal, correct for both values of `standard_conforming_strings`.
pub fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') {
        format!(" E'{}'", quoted.replace('\\', "\\\\"))
    } else {
        format!("'{quoted}'")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_literal_escapes_quotes_and_backslashes() {
        assert_eq!(literal("a'b"), "'a''b'");
        assert_eq!(literal("a\\'b"), " E'a\\\\''b'");
    }

    #[test]
    fn a_table_is_named_as_written_and_quoted_as_an_identifier() {
        let forty = "x".repeat(40);
        let cases = [
            ("hosts", Some("\"hosts\"")),
            ("My Hosts", Some("\"My Hosts\"")),
            ("s.hosts", Some("\"s\".\"hosts\"")),
            ("hosts; drop table x--", Some("\"hosts; drop table x--\"")),
            (&forty, Some(&*format!("\"{forty}\""))),
            ("", None),
            (".", None),
            ("s.", None),
            (".t", None),
            ("a.b.c", None),
            ("\"a\"", None),
            ("s.\"a\"", None),
            ("a\"b", None),
            ("a\nb", None),
            (&format!("{forty}x"), None),
            (&format!("{}.t", "x".repeat(64)), None),
            ("äääääääääääääääääääää", None),
        ]
        .map(|(text, quoted): (&str, Option<&str>)| (text.to_owned(), quoted.map(str::to_owned)));
        for (text, quoted) in cases {
            assert_eq!(
                TableName::parse(&text).map(|table| table.quoted("")),
                quoted,
                "{text}"
            );
        }
    }

    /// The value of an SQL string as Postgres reads it. After a backslash, only a second one is accepted.
    fn value(literal: &str, standard_conforming_strings: bool) -> Option<String> {
        let literal = literal.trim_start();
        let (is_escaped, rest) = match literal.strip_prefix('E') {
            Some(rest) => (true, rest),
            None => (!standard_conforming_strings, literal),
        };
        let mut characters = rest.strip_prefix('\'')?.strip_suffix('\'')?.chars();
        let mut value = String::new();
        while let Some(character) = characters.next() {
            match character {
                '\'' => value.push(characters.next().filter(|next| *next == '\'')?),
                '\\' if is_escaped => value.push(characters.next().filter(|next| *next == '\\')?),
                _ => value.push(character),
            }
        }
        Some(value)
    }

    proptest! {
        #[test]
        fn a_literal_means_the_text_whatever_the_server_makes_of_backslashes(text in r"(['\\E]|\PC){0,12}") {
            for standard_conforming_strings in [true, false] {
                prop_assert_eq!(value(&literal(&text), standard_conforming_strings), Some(text.clone()));
            }
        }

        #[test]
        fn every_table_that_is_accepted_is_quoted_part_by_part(text in prop_oneof![r#"[a-zäé."; -]{0,12}"#, ".{0,70}"]) {
            if let Some(table) = TableName::parse(&text) {
                for object in Object::ALL {
                    let quoted = table.quoted(object.suffix());
                    prop_assert_eq!(&quoted, &format!("\"{}{}\"", text.replace('.', "\".\""), object.suffix()));
                    prop_assert!(table.name.len() + object.suffix().len() <= MAX_IDENTIFIER_BYTES, "{}", quoted);
                }
            }
        }
    }
}

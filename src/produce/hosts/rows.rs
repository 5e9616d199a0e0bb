//! The rows of the table of hosts: each is a line of the host file, whose parts are its columns.
//!
//! Pure. `host_file` reads the lines; this file owns what concerns a single row, because one wrong row must not affect others.

use crate::produce::host_file::{Files, HostFileError, Hosts, parse_with};

/// The columns of a row that is enabled. Null is an empty text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct HostRow {
    pub address: String,
    pub frequency: String,
    pub options: String,
    pub regex: String,
}

/// What is wrong with a row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WrongRow {
    pub address: String,
    /// For the column `error`: one line.
    pub error: String,
}

/// The errors of the rows, for the log or a person: at most the first hundred. `table` is the table's name.
pub fn messages<'a>(table: &str, wrong: impl IntoIterator<Item = &'a WrongRow>) -> Vec<String> {
    const MAX_NAMED: usize = 100;
    let mut wrong = wrong.into_iter();
    let mut messages: Vec<String> = wrong
        .by_ref()
        .take(MAX_NAMED)
        .map(|WrongRow { address, error }| format!("{table}: the row {address:?} is not used: {error}"))
        .collect();
    let more = wrong.count();
    if more > 0 {
        messages.push(format!("{table}: {more} more rows are not used"));
    }
    messages
}

/// The hosts of a table.
#[derive(Debug, Default)]
pub struct TableHosts {
    pub hosts: Hosts,
    /// The lines of the rows that are used.
    pub lines: Vec<String>,
    pub wrong: Vec<WrongRow>,
}

impl HostRow {
    /// The row as a line of the host file.
    ///
    /// # Errors
    /// It cannot be one line, or the address would not be the line's.
    pub fn line(&self) -> Result<String, String> {
        let columns = [&self.address, &self.frequency, &self.options, &self.regex];
        if columns.iter().any(|column| column.contains(['\n', '\r'])) {
            return Err("a column contains a line break".to_owned());
        }
        if self.address.is_empty() || self.address.contains(char::is_whitespace) {
            return Err("the address is empty or contains a space".to_owned());
        }
        if self.address.starts_with('#') {
            return Err("the address begins with `#`; set enabled to false to disable a row".to_owned());
        }
        let words: Vec<&str> = columns
            .into_iter()
            .map(String::as_str)
            .filter(|column| !column.is_empty())
            .collect();
        Ok(words.join(" "))
    }
}

/// Reads the rows. `table` is the table's name in messages, `files` has the secrets that rows name.
///
/// # Errors
/// Something is wrong with the rows as a whole, such as the size of all regexes.
pub fn read_rows(table: &str, rows: &[HostRow], files: &Files<'_>) -> Result<TableHosts, HostFileError> {
    let mut wrong = Vec::new();
    let mut lines = Vec::with_capacity(rows.len());
    for row in rows {
        match row.line() {
            Ok(line) => lines.push((row, line)),
            Err(error) => wrong.push(WrongRow {
                address: row.address.clone(),
                error,
            }),
        }
    }
    let all = |lines: &[(&HostRow, String)]| {
        let text: Vec<&str> = lines.iter().map(|(_, line)| line.as_str()).collect();
        match text.is_empty() {
            // A file without hosts is an error; a table may be empty.
            true => Ok(Hosts::default()),
            false => parse_with(table, text.join("\n").as_bytes(), files),
        }
    };
    let hosts = all(&lines).or_else(|_| {
        let (profiles, hosts): (Vec<_>, Vec<_>) = lines.drain(..).partition(|(row, _)| is_profile(row));
        let mut shared = String::new();
        for (row, line) in profiles {
            // A profile needs a host.
            match parse_with(
                ONE,
                format!("{line}\nexample.com 1m {}", row.address).as_bytes(),
                files,
            ) {
                Ok(_) => {
                    shared = format!("{shared}{line}\n");
                    lines.push((row, line));
                }
                Err(error) => wrong.push(WrongRow::new(row, &error, 1)),
            }
        }
        let number = 1 + shared.matches('\n').count();
        for (row, line) in hosts {
            match parse_with(ONE, format!("{shared}{line}").as_bytes(), files) {
                Ok(_) => lines.push((row, line)),
                Err(error) => wrong.push(WrongRow::new(row, &error, number)),
            }
        }
        all(&lines)
    })?;
    Ok(TableHosts {
        hosts,
        lines: lines.into_iter().map(|(_, line)| line).collect(),
        wrong,
    })
}

/// A row whose columns are a line that defines a profile.
fn is_profile(row: &HostRow) -> bool {
    row.address.starts_with('@')
}

/// The name of a row that is read alone.
const ONE: &str = "row";

impl WrongRow {
    /// What the error says of the line with this number, without the line itself.
    fn new(row: &HostRow, error: &HostFileError, number: usize) -> Self {
        let place = format!("{ONE}:{number}:");
        let whats = error.0.lines().filter_map(|line| {
            let (column, what) = line.strip_prefix(&place)?.split_once(": ")?;
            Some(format!("{what} (character {column} of the line)"))
        });
        Self {
            address: row.address.clone(),
            error: whats.collect::<Vec<_>>().join("; "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::produce::host_file::Files;

    fn read_all(rows: &[HostRow]) -> TableHosts {
        read_rows("t", rows, &Files::new(None, None)).unwrap()
    }

    fn row(columns: [&str; 4]) -> HostRow {
        let [address, frequency, options, regex] = columns.map(str::to_owned);
        HostRow {
            address,
            frequency,
            options,
            regex,
        }
    }

    #[test]
    fn the_columns_of_a_row_are_a_line_of_the_host_file() {
        let rows = [
            row([
                "https://a.example/",
                "30s",
                "timeout=3s status=200",
                "all  is (well|good)",
            ]),
            row(["b.example", "5", "", ""]),
            row(["c.example", "1m", "", "text"]),
        ];
        let read = read_all(&rows);
        assert_eq!(read.wrong, []);
        let lines: Vec<String> = read.hosts.targets.iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "https://a.example/ 30s timeout=3s status=200 all  is (well|good)",
                "b.example 5m",
                "c.example 1m text"
            ]
        );
        assert!(read_all(&[]).hosts.targets.is_empty());
    }

    #[test]
    fn a_wrong_row_is_named_and_affects_no_other_one() {
        let mut rows: Vec<HostRow> = [
            ["https://bad.example/", "5", "timeout=x status=y", ""],
            ["https://two.example/", "5", "", "a\n\nhttps://hidden.example/ 5"],
            ["#comment.example", "5", "", ""],
            ["", "5", "", ""],
            ["a b.example", "5", "", ""],
            ["https://regex.example/", "5", "", "("],
            ["https://slow.example/", "", "", ""],
        ]
        .map(row)
        .to_vec();
        let wrong = rows.len();
        for number in 0..300 {
            rows.insert(number, row([&format!("h{number}.example"), "1m", "", ""]));
        }
        let read = read_all(&rows);
        assert_eq!(read.hosts.targets.len(), 300);
        assert_eq!(read.lines.len(), 300);
        let errors: Vec<(&str, &str)> = read
            .wrong
            .iter()
            .map(|wrong| (wrong.address.as_str(), wrong.error.as_str()))
            .collect();
        assert_eq!(errors.len(), wrong, "{errors:?}");
        let of = |address: &str| errors.iter().find(|(named, _)| *named == address).unwrap().1;
        let bad = of("https://bad.example/");
        assert!(
            bad.starts_with("`timeout=x`: expected") && bad.contains("; `status=y`"),
            "{bad}"
        );
        assert!(bad.contains("(character 32 of the line)"), "{bad}");
        assert_eq!(of("https://two.example/"), "a column contains a line break");
        assert!(of("#comment.example").contains("enabled"));
        assert!(of("https://regex.example/").starts_with("the REGEX is not valid"));
        assert!(of("https://slow.example/").starts_with("FREQUENCY is missing"));
        assert!(
            errors
                .iter()
                .all(|(_, error)| !error.contains('\n') && !error.is_empty())
        );
    }

    #[test]
    fn a_row_may_define_a_profile_for_others() {
        let mut rows = vec![
            row(["https://a.example/", "30s", "@shop", "text"]),
            row(["@shop", "timeout=3s", "status=200", ""]),
        ];
        let found = read_all(&rows);
        assert_eq!((found.hosts.targets.len(), found.wrong.len()), (1, 0));
        assert_eq!(
            found.hosts.targets[0].timeout,
            Some(std::time::Duration::from_secs(3))
        );
        rows.push(row(["@bad", "timeout=x", "", ""]));
        rows.push(row(["https://b.example/", "30s", "@bad", ""]));
        let found = read_all(&rows);
        assert_eq!(
            (found.hosts.targets.len(), found.wrong.len()),
            (1, 2),
            "{:?}",
            found.wrong
        );
    }
}

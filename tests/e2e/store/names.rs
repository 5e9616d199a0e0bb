//! Quoted names and texts, as Postgres reads them.

use host_metrics::tables::names::{Object, TableName, literal};

use crate::database::Database;

/// Characters that are special in identifiers or strings, and others that are not.
const PIECES: [&str; 14] = [
    "a", "Z", "ä", " ", ".", "\"", "\"\"", "'", "\\", ";", "--", "$1", "%", "/*",
];
const SEED: u64 = 0x7ab1e;

fn texts(count: usize) -> impl Iterator<Item = String> {
    let mut random = fastrand::Rng::with_seed(SEED);
    (0..count).map(move |_| {
        (0..random.usize(1..8))
            .map(|_| PIECES[random.usize(..PIECES.len())])
            .collect()
    })
}

#[test]
fn every_accepted_name_names_the_same_table_in_postgres() {
    let mut db = Database::new();
    let mut accepted = 0;
    for text in texts(2_000) {
        let Some(table) = TableName::parse(&text) else {
            continue;
        };
        accepted += 1;
        for object in [Object::Main, Object::Certificates] {
            let identifier = table.quoted(object.suffix());
            let row = db
                .client
                .query_one("SELECT parse_ident($1)", &[&identifier])
                .unwrap_or_else(|error| panic!("{text}, {identifier}: {error:?}"));
            let name = format!("{}{}", table.name, object.suffix());
            let expected: Vec<String> = table.schema.iter().cloned().chain([name]).collect();
            assert_eq!(row.get::<_, Vec<String>>(0), expected, "{text}, {identifier}");
        }
    }
    assert!(accepted >= 200, "{accepted}");
}

#[test]
fn a_table_with_an_odd_name_is_created_and_written() {
    let mut db = Database::new();
    let table = TableName::parse(r"A ä'd\\e;--").unwrap();
    db.execute(&format!(
        "CREATE TABLE {} (address text, is_valid boolean)",
        table.quoted("")
    ));
    db.store_of(&table.name).open().unwrap();
    let made = db.many(
        "SELECT relname::text FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace",
    );
    assert!(made.contains(&format!("{}_offsets", table.name)), "{made:?}");
}

#[test]
fn every_text_is_the_same_to_postgres_whatever_standard_conforming_strings_says() {
    let mut db = Database::new();
    for setting in ["on", "off"] {
        db.execute(&format!("SET standard_conforming_strings = {setting}"));
        for text in texts(200) {
            assert_eq!(
                db.one(&format!("SELECT {}::text", literal(&text))),
                text,
                "{setting}"
            );
        }
    }
}

//! A fast reader for records that are written exactly as [`super::encode`] writes them.
//!
//! It leaves everything else to the full reader: keys in another order, white space, escapes, numbers of many digits and
//! everything that is wrong. What it does read, the full reader reads as the same sample. Nearly all records come from
//! this program and decoding is most of the consumer's work; this reader takes a third of the full reader's time
//! (benches/wire.rs).

use std::borrow::Cow;
use std::str::FromStr;

use super::record::{Field, MAX_ADDRESS_BYTES, Sample, VERSION};

/// Returns `None` if the full reader has to read the record.
pub(super) fn read(text: &str) -> Option<Sample<'_>> {
    let mut rest = Rest(text.strip_prefix('{')?);
    rest.key(Field::V)?;
    rest.integer().filter(|version: &u64| *version == VERSION)?;
    // Rust evaluates the fields in the order in which they are written here, which is the record's.
    let sample = Sample {
        address: rest
            .next(Field::Address)?
            .text()
            .filter(|text| (1..=MAX_ADDRESS_BYTES).contains(&text.len()))?,
        latency: rest.next(Field::Latency)?.or_null(Rest::seconds)?,
        status_code: rest.next(Field::StatusCode)?.or_null(Rest::integer)?,
        is_valid: rest.next(Field::IsValid)?.boolean()?,
        outcome: rest.next(Field::Outcome)?.or_null(Rest::text)?,
        error: rest.next(Field::Error)?.or_null(Rest::text)?,
        scheduled_at: rest.next(Field::ScheduledAt)?.or_null(Rest::parsed)?,
        started_at: rest.next(Field::StartedAt)?.or_null(Rest::parsed)?,
        interval_seconds: rest.next(Field::IntervalSeconds)?.or_null(Rest::seconds)?,
        regex_matched: rest.next(Field::RegexMatched)?.or_null(Rest::boolean)?,
        dns_seconds: rest.next(Field::DnsSeconds)?.or_null(Rest::seconds)?,
        connect_seconds: rest.next(Field::ConnectSeconds)?.or_null(Rest::seconds)?,
        tls_seconds: rest.next(Field::TlsSeconds)?.or_null(Rest::seconds)?,
        ttfb_seconds: rest.next(Field::TtfbSeconds)?.or_null(Rest::seconds)?,
        body_seconds: rest.next(Field::BodySeconds)?.or_null(Rest::seconds)?,
        ip: rest.next(Field::Ip)?.or_null(Rest::parsed)?,
        redirects: rest.next(Field::Redirects)?.or_null(Rest::integer)?,
        body_bytes: rest.next(Field::BodyBytes)?.or_null(Rest::integer)?,
        cert_expires_at: rest.next(Field::CertExpiresAt)?.or_null(Rest::parsed)?,
        slow: rest.next(Field::Slow)?.or_null(Rest::boolean)?,
        name: rest.next(Field::Name)?.or_null(Rest::text)?,
        group: rest.next(Field::Group)?.or_null(Rest::text)?,
        agent: rest.next(Field::Agent)?.or_null(Rest::text)?,
        epoch: rest.next(Field::Epoch)?.or_null(Rest::integer)?,
    };
    (rest.0 == "}").then_some(sample)
}

/// The part of the text that is not read yet.
struct Rest<'a>(&'a str);

impl<'a> Rest<'a> {
    /// Skips the comma and the key before a field's value.
    #[inline(always)] // So the field's name is a constant.
    fn next(&mut self, field: Field) -> Option<&mut Self> {
        self.skip(",")?;
        self.key(field)?;
        Some(self)
    }

    #[inline(always)] // As above.
    fn key(&mut self, field: Field) -> Option<()> {
        self.skip("\"")?;
        self.skip(field.name())?;
        self.skip("\":")
    }

    #[inline(always)] // As above.
    fn skip(&mut self, text: &str) -> Option<()> {
        self.0 = self.0.strip_prefix(text)?;
        Some(())
    }

    #[inline(always)]
    fn or_null<T>(&mut self, read: impl FnOnce(&mut Self) -> Option<T>) -> Option<Option<T>> {
        match self.skip("null") {
            Some(()) => Some(None),
            None => read(self).map(Some),
        }
    }

    fn boolean(&mut self) -> Option<bool> {
        match self.skip("true") {
            Some(()) => Some(true),
            None => self.skip("false").map(|()| false),
        }
    }

    fn text(&mut self) -> Option<Cow<'a, str>> {
        self.raw_text().map(Cow::Borrowed)
    }

    fn parsed<T: FromStr>(&mut self) -> Option<T> {
        self.raw_text()?.parse().ok()
    }

    /// A string without escapes.
    fn raw_text(&mut self) -> Option<&'a str> {
        self.skip("\"")?;
        let is_special = |byte| byte == b'"' || byte == b'\\' || byte < b' ';
        let (text, rest) = self.0.split_at(self.0.bytes().position(is_special)?);
        self.0 = rest.strip_prefix('"')?;
        Some(text)
    }

    fn integer<T: TryFrom<u64>>(&mut self) -> Option<T> {
        let (number, fraction_digits) = self.decimal()?;
        T::try_from(number).ok().filter(|_| fraction_digits == 0)
    }

    /// The float that is nearest to the decimal: floats hold numbers of up to 15 digits and powers of ten up to 10^22
    /// exactly, and a division rounds to the nearest float (Clinger, "How to Read Floating Point Numbers Accurately", 1990).
    fn seconds(&mut self) -> Option<f64> {
        const POWERS_OF_TEN: [f64; MAX_DIGITS] = [
            1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14,
        ];
        let (number, fraction_digits) = self.decimal()?;
        Some(number as f64 / POWERS_OF_TEN.get(fraction_digits)?)
    }

    /// Reads a decimal without sign and exponent. Returns its digits as one number, and how many of them are after the point.
    /// If an exponent follows, the next field finds that there is no comma.
    fn decimal(&mut self) -> Option<(u64, usize)> {
        let mut number = 0;
        let mut point = None;
        let mut length = 0;
        for byte in self.0.bytes().take(MAX_DIGITS + 2) {
            match byte {
                b'0'..=b'9' => number = number * 10 + u64::from(byte - b'0'),
                b'.' if point.is_none() => point = Some(length),
                _ => break,
            }
            length += 1;
        }
        let whole_digits = point.unwrap_or(length);
        let fraction_digits = point.map_or(0, |point| length - point - 1);
        let is_json = match (whole_digits, point) {
            (0, _) => false,
            (_, Some(_)) if fraction_digits == 0 => false,
            // JSON does not allow leading zeros.
            (1, _) => true,
            _ => !self.0.starts_with('0'),
        };
        if !is_json || whole_digits + fraction_digits > MAX_DIGITS {
            return None;
        }
        self.0 = self.0.get(length..)?;
        Some((number, fraction_digits))
    }
}

/// The most digits of a decimal that is read here: see [`Rest::seconds`].
const MAX_DIGITS: usize = 15;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::decode::decode_fully;
    use super::super::encode;
    use super::*;

    const GOLDEN: [&str; 4] = [
        include_str!("../../tests/it/golden/ok.json"),
        include_str!("../../tests/it/golden/down.json"),
        include_str!("../../tests/it/golden/missed.json"),
        include_str!("../../tests/it/golden/redirect_cert.json"),
    ];

    fn golden() -> impl Iterator<Item = &'static str> {
        GOLDEN.into_iter().map(str::trim_end)
    }

    /// What the shortcut reads, the full reader reads as the same sample.
    fn assert_agrees(text: &str) {
        if let Some(sample) = read(text) {
            assert_eq!(decode_fully(text.as_bytes()), Ok(sample), "{text}");
        }
    }

    #[test]
    fn what_encode_writes_is_read_unless_it_has_an_escape() {
        for text in golden() {
            let sample = decode_fully(text.as_bytes()).unwrap();
            assert_eq!(read(text), (!text.contains('\\')).then_some(sample), "{text}");
        }
    }

    #[test]
    fn records_of_another_form_are_left_to_the_full_reader() {
        let ok = GOLDEN[0].trim_end();
        for (from, to) in [
            ("\"v\":1", "\"v\":2"),
            ("\"v\":1", "\"v\":1.0"),
            ("\"v\":1", "\"v\":null"),
            ("\"v\":1,", ""),
            ("https://shop.example/", ""),
            ("shop", "sh\\u006fp"),
            ("shop", "sh\u{1}p"),
            ("0.131482", "-0.131482"),
            ("0.131482", "00.131482"),
            ("0.131482", ".131482"),
            ("0.131482", "0."),
            ("0.131482", "0.1.3"),
            ("0.131482", "1.1.3"),
            ("0.131482", "131482131482131482131482131482"),
            ("0.131482", "0.131482e0"),
            ("0.131482", "0.1314821314821314"),
            ("0.131482", "1314821314821314"),
            ("0.131482", "\"0.131482\""),
            ("\"status_code\":200", "\"status_code\":200.5"),
            ("\"status_code\":200", "\"status_code\":0200"),
            ("\"status_code\":200", "\"status_code\":32768"),
            ("\"is_valid\":true", "\"is_valid\":null"),
            ("2026-03-01T10:00:07.250000Z", "2026-02-30T10:00:07.250000Z"),
            ("203.0.113.7", "203.0.113.7:443"),
            (",\"outcome\"", ", \"outcome\""),
            (",\"outcome\"", ",\"of_tomorrow\":1,\"outcome\""),
            ("\"epoch\":null}", "\"epoch\":null"),
            ("\"epoch\":null}", "\"epoch\":null} "),
        ] {
            let other = ok.replacen(from, to, 1);
            assert_ne!(other, ok, "{from} is there");
            assert_eq!(read(&other), None, "{from} as {to}");
        }
    }

    /// Valid records with one small change.
    fn slightly_changed() -> impl Strategy<Value = String> {
        const PIECES: &[&str] = &[
            "",
            "0",
            "9",
            "12345678901",
            ".",
            "-",
            "e5",
            "\"",
            "\\",
            ",",
            "}",
            " ",
            "null",
            "true",
            "\u{1}",
            "ü",
        ];
        (
            proptest::sample::select(GOLDEN.to_vec()),
            any::<proptest::sample::Index>(),
            0..3_usize,
            proptest::sample::select(PIECES),
        )
            .prop_map(|(text, at, removed, piece)| {
                let text = text.trim_end();
                let mut chars: Vec<char> = text.chars().collect();
                let at = at.index(chars.len());
                chars.splice(at..chars.len().min(at + removed), piece.chars());
                chars.into_iter().collect()
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_096))]

        #[test]
        fn slightly_changed_records_are_left_alone_or_read_as_the_full_reader_does(text in slightly_changed()) {
            assert_agrees(&text);
        }

        #[test]
        fn seconds_are_the_nearest_float(whole in 0..10_u64.pow(9), fraction in "[0-9]{1,6}") {
            let text = format!("{whole}.{fraction}");
            let mut rest = Rest(&text);
            prop_assert_eq!(rest.seconds().map(f64::to_bits), text.parse().ok().map(f64::to_bits));
            prop_assert_eq!(rest.0, "");
        }

        #[test]
        fn all_numbers_that_encode_writes_are_read(latency in 0.0..1e8_f64, body_bytes in 0..10_i64.pow(15), code in 0..i16::MAX) {
            let sample = Sample {
                address: "a".into(),
                latency: Some((latency * 1e6).round() / 1e6),
                body_bytes: Some(body_bytes),
                status_code: Some(code),
                ..Sample::default()
            };
            let mut value = Vec::new();
            encode(&sample, &mut value);
            prop_assert_eq!(read(std::str::from_utf8(&value).unwrap()), Some(sample));
        }
    }
}

//! `json=/pointer:value`: what a JSON body has to hold.
//!
//! Only the value that the pointer (RFC 6901) names is kept in memory, so a large or deeply nested body costs no more than
//! its text. Pure.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

/// One rule. Its text is `/pointer:value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonRule {
    /// As written: empty, or beginning with a slash.
    pub pointer: String,
    pub expected: String,
}

impl JsonRule {
    /// Reads `/pointer:value`. The pointer ends at the first colon; a colon in a key is `~2`, which RFC 6901 does not use.
    /// `None` if it is not valid.
    pub fn parse(text: &str) -> Option<Self> {
        let (pointer, expected) = text.split_once(':')?;
        let is_pointer = pointer.is_empty() || pointer.starts_with('/');
        // `~0` is a tilde, `~1` a slash and `~2` a colon.
        let is_escaped = pointer
            .match_indices('~')
            .all(|(at, _)| pointer[at + 1..].starts_with(['0', '1', '2']));
        (is_pointer && is_escaped).then(|| Self {
            pointer: pointer.to_owned(),
            expected: expected.to_owned(),
        })
    }

    /// Compares with the body. A string is compared as it is, another value as JSON; numbers are equal if their values are.
    ///
    /// # Errors
    /// What was found instead, for a person.
    pub fn holds(&self, body: &str) -> Result<(), String> {
        let found = self
            .find(body)
            .map_err(|error| format!("the body is not valid JSON: {error}"))?;
        let place = match self.pointer.as_str() {
            "" => "the document",
            pointer => pointer,
        };
        let Some(found) = found else {
            return Err(format!(
                "there is no {place} in the body; expected {}",
                self.expected
            ));
        };
        let raw = found.get();
        let found = match raw.as_bytes().first() {
            Some(b'{' | b'[') => {
                let kind = if raw.starts_with('{') {
                    "an object"
                } else {
                    "an array"
                };
                // Nested deeper than serde_json's limit, a value is not equal to anything.
                if raw.len() <= MAX_COMPARED_BYTES && equals_json(raw, &self.expected) {
                    return Ok(());
                }
                kind.to_owned()
            }
            Some(b'"') => {
                let text: String = serde_json::from_str(raw).map_err(|error| error.to_string())?;
                if text == self.expected || equals_json(raw, &self.expected) {
                    return Ok(());
                }
                format!("\"{text}\"")
            }
            _ if equals_json(raw, &self.expected) => return Ok(()),
            _ => raw.to_owned(),
        };
        Err(format!("{place} is {found}; expected {}", self.expected))
    }

    fn find<'a>(&self, body: &'a str) -> serde_json::Result<Option<&'a RawValue>> {
        let tokens: Vec<String> = self
            .pointer
            .split('/')
            .skip(1)
            .map(|token| token.replace("~1", "/").replace("~2", ":").replace("~0", "~"))
            .collect();
        let mut json = serde_json::Deserializer::from_str(body);
        let found = At(&tokens).deserialize(&mut json)?;
        json.end()?;
        Ok(found)
    }
}

impl fmt::Display for JsonRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.pointer, self.expected)
    }
}

/// The longest object or array that is compared as a whole, because parsing it takes many times its length of memory.
const MAX_COMPARED_BYTES: usize = 64 << 10;

fn equals_json(found: &str, expected: &str) -> bool {
    let value = |text| serde_json::from_str::<Value>(text).ok();
    match (value(found), value(expected)) {
        // 200 and 200.0 are one number in JSON.
        (Some(Value::Number(found)), Some(Value::Number(expected))) => {
            found == expected || (found.is_f64() || expected.is_f64()) && found.as_f64() == expected.as_f64()
        }
        (Some(found), expected) => Some(found) == expected,
        (None, _) => false,
    }
}

/// Finds the value to which the rest of a pointer leads.
struct At<'a>(&'a [String]);

impl<'de> DeserializeSeed<'de> for At<'_> {
    type Value = Option<&'de RawValue>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        match self.0 {
            [] => <&RawValue as serde::Deserialize>::deserialize(deserializer).map(Some),
            _ => deserializer.deserialize_any(self),
        }
    }
}

impl<'de> Visitor<'de> for At<'_> {
    type Value = Option<&'de RawValue>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            match self.0 {
                // Of a key that is there twice, the last one counts, as in most readers of JSON.
                [token, rest @ ..] if *token == key => found = map.next_value_seed(At(rest))?,
                _ => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        Ok(found)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let index = self.0.first().and_then(|token| array_index(token));
        let mut found = None;
        for at in 0.. {
            if Some(at) == index {
                match seq.next_element_seed(At(&self.0[1..]))? {
                    Some(element) => found = element,
                    None => break,
                }
            } else if seq.next_element::<IgnoredAny>()?.is_none() {
                break;
            }
        }
        Ok(found)
    }

    // The pointer leads into a value that has no parts.

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
}

/// Without leading zeros (RFC 6901, section 4).
fn array_index(token: &str) -> Option<usize> {
    let is_index = token == "0" || !token.starts_with(['0', '+']);
    token.parse().ok().filter(|_| is_index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(rule: &str, body: &str) -> Result<(), String> {
        JsonRule::parse(rule).unwrap().holds(body)
    }

    #[test]
    fn a_pointer_finds_what_rfc_6901_says() {
        // The document of RFC 6901, section 5.
        let document = r#"{"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, "g|h": 4, "i\\j": 5, "k\"l": 6,
            " ": 7, "m~n": 8, "a:b~2": 9}"#;
        for rule in [
            r#"/foo:["bar", "baz"]"#,
            "/foo/0:bar",
            "/foo/1:baz",
            "/:0",
            "/a~1b:1",
            "/c%d:2",
            "/e^f:3",
            "/g|h:4",
            r"/i\j:5",
            "/k\"l:6",
            "/ :7",
            "/m~0n:8",
            "/a~2b~02:9",
        ] {
            assert_eq!(holds(rule, document), Ok(()), "{rule}");
        }
        assert_eq!(holds(":5", " 5 "), Ok(()));
        for rule in [
            "/foo/2:x",
            "/foo/00:bar",
            "/foo/-:x",
            "/foo/+0:bar",
            "/foo/bar/x:x",
            "/x:x",
            "//x:0",
        ] {
            let error = holds(rule, document).unwrap_err();
            assert!(error.starts_with("there is no "), "{rule}: {error}");
        }
    }

    #[test]
    fn values_are_compared_by_what_they_mean() {
        let equal = [
            ("ok", r#""ok""#),
            (r#""ok""#, r#""ok""#),
            ("", r#""""#),
            ("a:b", r#""a:b""#),
            ("\u{fc}", r#""\u00fc""#),
            ("3", "3"),
            ("3", "3.0"),
            ("30", "3e1"),
            ("3", r#""3""#),
            ("18446744073709551615", "18446744073709551615"),
            ("true", "true"),
            ("null", "null"),
            (r#"{"a":[1]}"#, r#"{ "a" : [ 1 ] }"#),
        ];
        for (expected, found) in equal {
            let body = format!(r#"{{"v":{found}}}"#);
            assert_eq!(holds(&format!("/v:{expected}"), &body), Ok(()), "{body}");
        }
        let different = [
            ("ok", r#""down""#, "/v is \"down\"; expected ok"),
            (r#""3""#, "3", "/v is 3; expected \"3\""),
            (
                "18446744073709551615",
                "18446744073709551614",
                "/v is 18446744073709551614; expected 18446744073709551615",
            ),
            ("true", "false", "/v is false; expected true"),
            ("ok", "null", "/v is null; expected ok"),
            ("ok", "[1]", "/v is an array; expected ok"),
            ("ok", "{}", "/v is an object; expected ok"),
        ];
        for (expected, found, error) in different {
            let body = format!(r#"{{"v":{found}}}"#);
            assert_eq!(holds(&format!("/v:{expected}"), &body), Err(error.to_owned()));
        }
        assert_eq!(holds("/v:2", r#"{"v":1,"v":2}"#), Ok(()));
    }

    #[test]
    fn what_is_not_json_is_a_mismatch() {
        for body in [
            "",
            "<html>",
            "{",
            r#"{"v":1}x"#,
            r#"{"v":1,}"#,
            r#"{"w":nul,"v":1}"#,
            "{\"v\":\"\u{1}\"}",
        ] {
            let error = holds("/v:1", body).unwrap_err();
            assert!(
                error.starts_with("the body is not valid JSON: "),
                "{body:?}: {error}"
            );
        }
    }

    #[test]
    fn a_body_that_is_nested_deeply_is_read_without_recursion() {
        let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
        let body = format!(r#"{{"deep":{deep},"v":1}}"#);
        assert_eq!(holds("/v:1", &body), Ok(()));
        assert!(
            holds("/deep:1", &body)
                .unwrap_err()
                .starts_with("/deep is an array")
        );
        assert!(holds(&format!("/deep:{deep}"), &body).is_err());
        // serde_json limits how deep a pointer is followed.
        assert!(holds(&format!("{}:1", "/0".repeat(10_000)), &deep).is_err());
    }

    #[test]
    fn a_rule_is_a_pointer_a_colon_and_a_value() {
        assert_eq!(
            JsonRule::parse("/a:b:c"),
            Some(JsonRule {
                pointer: "/a".into(),
                expected: "b:c".into(),
            })
        );
        for text in ["", "/a", "a:b", "/a~:b", "/a~3:b", "$.a:b"] {
            assert_eq!(JsonRule::parse(text), None, "{text}");
        }
    }
}

//! Amounts of tokens and bytes in the form that people write: `"5B"`, `"512MB"`.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde::{Serialize, Serializer};

/// A number of tokens. Written as a whole number or with K, M or B, which are decimal: `"1.5B"` is
/// 1,500,000,000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Count(pub u64);

/// A number of bytes. Written as a whole number, with KB, MB or GB, which are decimal, or with KiB, MiB or
/// GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

struct Units {
    /// What is counted.
    of: &'static str,
    /// What is accepted, for messages.
    accepted: &'static str,
    /// Largest first, so that printing finds the shortest form.
    units: &'static [(&'static str, u64)],
    /// Accepted too, but never printed.
    also: &'static [(&'static str, u64)],
}

const TOKENS: Units = Units {
    of: "tokens",
    accepted: "a whole number, or a text with K, M or B (decimal): \"128K\", \"512M\", \"1.5B\"",
    units: &[("B", 1_000_000_000), ("M", 1_000_000), ("K", 1_000), ("", 1)],
    also: &[],
};

const BYTES: Units = Units {
    of: "bytes",
    accepted: "a whole number of bytes, or a text with KB, MB, GB (decimal) or KiB, MiB, GiB: \
               \"512MB\", \"1.5GB\", \"2GiB\"",
    units: &[("GB", 1_000_000_000), ("MB", 1_000_000), ("KB", 1_000), ("", 1)],
    also: &[
        ("G", 1_000_000_000),
        ("M", 1_000_000),
        ("K", 1_000),
        ("B", 1),
        ("GiB", 1 << 30),
        ("MiB", 1 << 20),
        ("KiB", 1 << 10),
    ],
};

impl Units {
    fn parse(&self, text: &str) -> Result<u64, String> {
        let wrong = |reason: &str| Err(format!("\"{text}\" {reason}; expected {}", self.accepted));

        let digits_end =
            text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_').unwrap_or(text.len());
        let (number, unit) = (text[..digits_end].replace('_', ""), text[digits_end..].trim_start());
        let (whole, fraction) = number.split_once('.').unwrap_or((&number, ""));
        if whole.is_empty() || number.ends_with('.') || fraction.contains('.') {
            return wrong("is not a number");
        }
        let Some((_, scale)) = self.units.iter().chain(self.also).find(|(name, _)| *name == unit) else {
            return wrong("has a unit that is not known here");
        };

        // Exact, in integers: 1.5B is 15 × 1,000,000,000 ÷ 10.
        let scaled =
            format!("{whole}{fraction}").parse::<u64>().ok().zip(10_u64.checked_pow(fraction.len() as u32));
        let Some((digits, divisor)) = scaled else { return wrong("has too many digits") };
        let product = u128::from(digits) * u128::from(*scale);
        if !product.is_multiple_of(u128::from(divisor)) {
            return wrong("is not whole");
        }
        // The largest integer of TOML, in which the resolved conf is written, is 2⁶³ − 1.
        match i64::try_from(product / u128::from(divisor)) {
            Ok(amount) => Ok(amount.unsigned_abs()),
            Err(_) => wrong("is too large"),
        }
    }

    fn schema(&self) -> Schema {
        let units: Vec<&str> = self.units.iter().chain(self.also).map(|(unit, _)| *unit).collect();
        json_schema!({
            "title": self.of,
            "description": format!("Takes {}.", self.accepted),
            "type": ["integer", "string"],
            "minimum": 0,
            "pattern": format!(r"^[0-9][0-9_]*(\.[0-9_]+)?\s*({})$", units.join("|")),
        })
    }

    fn print(&self, amount: u64, f: &mut fmt::Formatter) -> fmt::Result {
        let whole = self.units.iter().find(|(_, scale)| amount > 0 && amount.is_multiple_of(*scale));
        let (unit, scale) = whole.unwrap_or(&("", 1));
        write!(f, "{}{unit}", amount / scale)
    }
}

impl Visitor<'_> for &Units {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.accepted)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<u64, E> {
        Ok(value)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<u64, E> {
        u64::try_from(value).map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(value), &self))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<u64, E> {
        self.parse(value).map_err(E::custom)
    }
}

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        TOKENS.parse(text).map(Self)
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        BYTES.parse(text).map(Self)
    }
}

/// The shortest way to write this number exactly: `5B`, `81920`.
impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        TOKENS.print(self.0, f)
    }
}

/// The shortest way to write this size exactly: `2GB`, `4096`.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        BYTES.print(self.0, f)
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(&TOKENS).map(Self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(&BYTES).map(Self)
    }
}

// Amounts are serialized as plain numbers, so that a resolved conf is exact.

impl Serialize for Count {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(self.0)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(self.0)
    }
}

impl JsonSchema for Count {
    fn schema_name() -> Cow<'static, str> {
        "Count".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        TOKENS.schema()
    }
}

impl JsonSchema for Size {
    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        BYTES.schema()
    }
}

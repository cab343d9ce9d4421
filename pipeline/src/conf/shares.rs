//! The domains' target shares, and the named sets of them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// SlimPajama's shares as the authors' code and Figure 2 have them. By the data's `redpajama_set_name`.
pub const SLIMPAJAMA: [(&str, f64); 7] = [
    ("RedPajamaArXiv", 0.0429),
    ("RedPajamaBook", 0.0415),
    ("RedPajamaC4", 0.2661),
    ("RedPajamaCommonCrawl", 0.5337),
    ("RedPajamaGithub", 0.0500),
    ("RedPajamaStackExchange", 0.0317),
    ("RedPajamaWikipedia", 0.0340),
];

/// SlimPajama's shares as the text of the paper's §3 has them. They are not those of its code; see
/// [`SLIMPAJAMA`].
pub const SLIMPAJAMA_TEXT: [(&str, f64); 7] = [
    ("RedPajamaArXiv", 0.025),
    ("RedPajamaBook", 0.045),
    ("RedPajamaC4", 0.15),
    ("RedPajamaCommonCrawl", 0.67),
    ("RedPajamaGithub", 0.045),
    ("RedPajamaStackExchange", 0.02),
    ("RedPajamaWikipedia", 0.045),
];

const NAMES: &[&str] = &["corpus", "slimpajama", "slimpajama-text"];

/// The share of the budget that each domain gets.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Shares {
    /// `"corpus"`: as the corpus has them, before hold-out.
    #[default]
    Corpus,
    /// `"slimpajama"`: as in [`SLIMPAJAMA`].
    Slimpajama,
    /// `"slimpajama-text"`: as in [`SLIMPAJAMA_TEXT`].
    SlimpajamaText,
    /// As the conf's table says. The numbers are weights: they need not sum to one.
    Table(BTreeMap<String, f64>),
}

impl Shares {
    /// The target shares, which sum to one; `None` for the corpus's own.
    pub fn targets(&self) -> Option<BTreeMap<String, f64>> {
        let named =
            |set: &[(&str, f64)]| set.iter().map(|(name, share)| ((*name).to_owned(), *share)).collect();
        let weights: BTreeMap<String, f64> = match self {
            Shares::Corpus => return None,
            Shares::Slimpajama => named(&SLIMPAJAMA),
            Shares::SlimpajamaText => named(&SLIMPAJAMA_TEXT),
            Shares::Table(weights) => weights.clone(),
        };
        let sum: f64 = weights.values().sum();
        // −0, too, is 0
        Some(weights.into_iter().map(|(name, weight)| (name, (weight / sum).abs())).collect())
    }
}

impl<'de> Deserialize<'de> for Shares {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct NameOrTable;

        impl<'de> Visitor<'de> for NameOrTable {
            type Value = Shares;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("the name of a set or a table of domains and their shares")
            }

            fn visit_str<E: Error>(self, name: &str) -> Result<Shares, E> {
                match name {
                    "corpus" => Ok(Shares::Corpus),
                    "slimpajama" => Ok(Shares::Slimpajama),
                    "slimpajama-text" => Ok(Shares::SlimpajamaText),
                    other => Err(E::unknown_variant(other, NAMES)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<Shares, A::Error> {
                BTreeMap::deserialize(MapAccessDeserializer::new(table)).map(Shares::Table)
            }
        }

        from.deserialize_any(NameOrTable)
    }
}

impl Serialize for Shares {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Shares::Corpus => to.serialize_str("corpus"),
            Shares::Slimpajama => to.serialize_str("slimpajama"),
            Shares::SlimpajamaText => to.serialize_str("slimpajama-text"),
            Shares::Table(weights) => weights.serialize(to),
        }
    }
}

impl JsonSchema for Shares {
    fn schema_name() -> Cow<'static, str> {
        "Shares".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "The target share of the budget for each domain.",
            "anyOf": [
                { "const": "corpus", "description": "The corpus's own shares, before hold-out." },
                { "const": "slimpajama", "description": "SlimPajama's, as the authors' code has them." },
                { "const": "slimpajama-text", "description": "SlimPajama's, as the text of the paper's §3 has them." },
                {
                    "type": "object",
                    "description": "A weight for each domain. The weights need not sum to one.",
                    "additionalProperties": generator.subschema_for::<f64>(),
                },
            ],
        })
    }
}

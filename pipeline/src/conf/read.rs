//! Reads typed values out of a [`Tree`] through serde, and says what is wrong where it is wrong.
//!
//! serde tells an error type of its own what it missed (which key, which type); [`Wrong`] keeps that, and
//! each layer of the [`Reader`] adds the place as the error passes it. So any `Deserialize` type gets good
//! messages.

use std::fmt::{self, Display};
use std::marker::PhantomData;

use serde::de::value::BorrowedStrDeserializer;
use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, Unexpected, Visitor};
use serde::forward_to_deserialize_any;

use super::tree::{Entry, Node, Position, Tree, Value};
use crate::{Error, Result};

/// What a user who left a key out, or got its type wrong, is shown.
const EXAMPLES: &[(&str, &str)] = &[
    ("run", "[run]\nname = \"per-source-128k\"\noutput = \"runs\""),
    ("run.name", "name = \"per-source-128k\""),
    ("run.seed", "seed = 0"),
    ("run.output", "output = \"s3://bucket/runs\""),
    (
        "source",
        "[[source]]\n\
         url = \"s3://bucket/slimpajama/**/*.jsonl.zst\"\n\
         format = \"jsonl\"\n\
         domain = \"meta.redpajama_set_name\"",
    ),
    ("source.name", "name = \"slimpajama\""),
    ("source.url", "url = \"s3://bucket/slimpajama/**/*.jsonl.zst\""),
    ("source.format", "format = \"jsonl\""),
    ("source.text", "text = \"text\""),
    (
        "source.domain",
        "domain = \"meta.redpajama_set_name\", domain = { const = \"Book\" }, or rules on the path:\n\
         domain = [{ glob = \"**/*.rs\", domain = \"Rust\" }, { glob = \"**\", domain = \"Other\" }]",
    ),
    ("source.domain.const", "domain = { const = \"Book\" }"),
    ("source.domain.glob", "domain = [{ glob = \"**/*.rs\", domain = \"Rust\" }]"),
    ("source.domain.domain", "domain = [{ glob = \"**/*.rs\", domain = \"Rust\" }]"),
    ("source.max_reject_share", "max_reject_share = 0.001"),
    ("source.max_document_bytes", "max_document_bytes = \"64MB\""),
    ("tokenizer", "[tokenizer]\nurl = \"s3://bucket/llama-2/tokenizer.json\""),
    ("tokenizer.url", "url = \"s3://bucket/llama-2/tokenizer.json\""),
    ("tokenizer.train", "train = { vocab = 8192 }"),
    ("tokenizer.train.vocab", "train = { vocab = 8192 }"),
    ("tokenizer.train.sample", "train = { vocab = 8192, sample = \"32MB\" }"),
    ("tokenizer.bos", "bos = true"),
    ("tokenizer.eos", "eos = true"),
    ("mixture", "[mixture]\nrecipe = \"sql/mixtures/per_source.sql\"\nbudget = \"5B\""),
    ("mixture.recipe", "recipe = \"sql/mixtures/per_source.sql\""),
    ("mixture.budget", "budget = \"5B\""),
    ("mixture.holdout", "holdout = 0.01"),
    ("mixture.shortfall", "shortfall = \"error\""),
    ("mixture.long_tokens", "long_tokens = 4096"),
    ("mixture.max_span", "max_span = 131072"),
    ("mixture.max_copies", "max_copies = 4"),
    (
        "mixture.shares",
        "shares = \"slimpajama\", or a table:\n\
         [mixture.shares]\n\
         RedPajamaBook = 0.2\n\
         RedPajamaGithub = 0.8",
    ),
    ("mixture.params", "[mixture.params]\nlong_share = 0.7"),
    ("pack", "[pack]\nsequence_tokens = 81920"),
    ("pack.sequence_tokens", "sequence_tokens = 81920"),
    ("pack.mode", "mode = \"concat\""),
    ("pack.sequences_per_file", "sequences_per_file = 256"),
    ("pack.sequences_per_row_group", "sequences_per_row_group = 16"),
    ("engine", "[engine]\nmemory = \"2GB\""),
    ("engine.partitions", "partitions = 8"),
    ("engine.recipe_seconds", "recipe_seconds = 3600"),
    ("engine.memory", "memory = \"2GB\""),
    ("engine.spill", "spill = \"/mnt/scratch\""),
    ("engine.url", "url = \"df://scheduler:50050\""),
    ("train", "[train]\nsteps = 100\ndevices = [\"flex\"]"),
    ("eval", "[eval]\nloss = true\nneedle = { haystack = \"essays/*.txt\" }"),
    ("eval.needle.haystack", "needle = { haystack = \"essays/*.txt\" }"),
    ("eval.retrieval.haystack", "retrieval = { haystack = \"essays/*.txt\" }"),
    ("eval.bookqa.file", "bookqa = { file = \"longbook_qa_eng.jsonl\" }"),
    ("eval.choices.file", "choices = { file = \"anatomy_test.csv\", examples = \"anatomy_dev.csv\" }"),
];

/// Reads a node of the tree, which stands at the keys `path`.
pub fn read<'a, T: DeserializeOwned>(tree: &Tree, node: &'a Node, path: &[&'a str]) -> Result<T> {
    read_seed(node, path.to_vec(), PhantomData).map_err(|wrong| wrong.explain(tree))
}

fn read_seed<'a, S: DeserializeSeed<'a>>(
    node: &'a Node,
    path: Vec<&'a str>,
    seed: S,
) -> Result<S::Value, Wrong> {
    let reader = Reader { node, path: path.clone() };
    seed.deserialize(reader).map_err(|wrong| wrong.at(&node.place, &path))
}

struct Reader<'a> {
    node: &'a Node,
    /// The keys on the way here, without the indices of lists.
    path: Vec<&'a str>,
}

#[derive(Debug)]
pub struct Wrong {
    what: What,
    /// Where, and the keys on the way there. Set by the innermost reader that the error passes.
    at: Option<(Position, Vec<String>)>,
}

#[derive(Debug)]
enum What {
    UnknownKey(String, &'static [&'static str]),
    UnknownWord(String, &'static [&'static str]),
    MissingKey(&'static str),
    Mismatch { found: String, expected: String },
    Other(String),
}

impl Wrong {
    fn new(what: What) -> Self {
        Self { what, at: None }
    }

    fn at(mut self, place: &Position, path: &[&str]) -> Self {
        self.at.get_or_insert_with(|| (place.clone(), path.iter().map(|key| (*key).to_owned()).collect()));
        self
    }

    fn explain(self, tree: &Tree) -> Error {
        let (place, path) = self.at.unwrap_or_else(|| (tree.root.place.clone(), Vec::new()));
        let key = path.join(".");
        let example = |key: &str| {
            let found = EXAMPLES.iter().find(|(name, _)| *name == key);
            found.map(|(_, example)| match example.contains('\n') {
                true => format!("for example:\n{example}"),
                false => format!("for example: {example}"),
            })
        };
        let (message, label, help) = match self.what {
            What::UnknownKey(word, known) => {
                let message = format!("unknown key `{word}` in {}", table(&key));
                let (label, help) = suggest(&word, known);
                (message, label, help)
            }
            What::UnknownWord(word, known) => {
                let (label, help) = suggest(&word, known);
                (format!("`{key}` cannot be \"{word}\""), label, help)
            }
            What::MissingKey(missing) if key.is_empty() => {
                let message = format!("{} is missing from the conf", table(missing));
                (message, "add it, here or above".to_owned(), example(missing))
            }
            What::MissingKey(missing) => {
                let message = format!("{} has no `{missing}`", table(&key));
                (message, format!("`{missing}` is missing here"), example(&format!("{key}.{missing}")))
            }
            What::Mismatch { found, expected } => {
                (format!("`{key}` must be {expected}"), format!("this is {found}"), example(&key))
            }
            What::Other(message) => (format!("`{key}`: {message}"), "this value".to_owned(), example(&key)),
        };
        tree.wrong(&place, message, label, help)
    }
}

/// A table as its header is written.
fn table(key: &str) -> String {
    match key {
        "" => "the conf".to_owned(),
        "source" => "[[source]]".to_owned(),
        key => format!("[{key}]"),
    }
}

/// The label and the help for a word that is none of those known.
fn suggest(word: &str, known: &[&str]) -> (String, Option<String>) {
    let alike = |known: &&&str| (strsim::normalized_damerau_levenshtein(word, known) * 1000.0) as u32;
    match known.iter().max_by_key(alike).filter(|nearest| alike(nearest) >= 650) {
        Some(nearest) => (format!("did you mean `{nearest}`?"), None),
        None if known.is_empty() => ("nothing is known here".to_owned(), None),
        None => {
            let known: Vec<_> = known.iter().map(|word| format!("`{word}`")).collect();
            ("not known here".to_owned(), Some(format!("known here: {}", known.join(", "))))
        }
    }
}

/// What was found, without the words of Rust.
fn found(unexpected: Unexpected) -> String {
    match unexpected {
        Unexpected::Bool(value) => format!("`{value}`"),
        Unexpected::Signed(value) => format!("the number {value}"),
        Unexpected::Unsigned(value) => format!("the number {value}"),
        Unexpected::Float(value) => format!("the number {value:?}"),
        Unexpected::Str(_) => "a text".to_owned(),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "a table".to_owned(),
        other => other.to_string(),
    }
}

/// What was expected, without the words of Rust.
fn expected(expected: &dyn de::Expected) -> String {
    let expected = expected.to_string();
    match expected.as_str() {
        "a string" => "a text in quotes",
        "a boolean" => "true or false",
        "f32" | "f64" => "a number",
        "u32" => "a whole number from 0 to 4294967295",
        "u64" | "usize" => "a whole number, not negative",
        "i64" => "a whole number",
        "a sequence" => "a list",
        "a map" => "a table",
        text if text.starts_with("struct ") => "a table",
        text => text,
    }
    .to_owned()
}

impl std::error::Error for Wrong {}

impl Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{:?}", self.what)
    }
}

impl de::Error for Wrong {
    fn custom<T: Display>(message: T) -> Self {
        Self::new(What::Other(message.to_string()))
    }

    fn invalid_type(unexpected: Unexpected, wanted: &dyn de::Expected) -> Self {
        Self::new(What::Mismatch { found: found(unexpected), expected: expected(wanted) })
    }

    fn invalid_value(unexpected: Unexpected, wanted: &dyn de::Expected) -> Self {
        Self::invalid_type(unexpected, wanted)
    }

    fn unknown_field(key: &str, known: &'static [&'static str]) -> Self {
        Self::new(What::UnknownKey(key.to_owned(), known))
    }

    fn unknown_variant(word: &str, known: &'static [&'static str]) -> Self {
        Self::new(What::UnknownWord(word.to_owned(), known))
    }

    fn missing_field(key: &'static str) -> Self {
        Self::new(What::MissingKey(key))
    }
}

impl<'de> de::Deserializer<'de> for Reader<'de> {
    type Error = Wrong;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        let Reader { node, path } = self;
        match &node.value {
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Integer(value) => visitor.visit_i64(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(value) => visitor.visit_borrowed_str(value),
            Value::Date => Err(de::Error::invalid_type(Unexpected::Other("a date"), &visitor)),
            Value::List(list) => visitor.visit_seq(List { rest: list.iter(), path }),
            Value::Table(entries) => visitor.visit_map(Table { rest: entries.iter(), value: None, path }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        visitor.visit_newtype_struct(self)
    }

    /// Enums of a conf are words.
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        words: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        match &self.node.value {
            Value::Text(word) => visitor.visit_enum(word.as_str().into_deserializer()),
            other => {
                let words: Vec<_> = words.iter().map(|word| format!("\"{word}\"")).collect();
                let expected = words.join(" or ");
                Err(Wrong::new(What::Mismatch { found: other.kind().to_owned(), expected }))
            }
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        unit unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

struct Table<'a> {
    rest: std::slice::Iter<'a, Entry>,
    value: Option<&'a Entry>,
    path: Vec<&'a str>,
}

impl<'de> de::MapAccess<'de> for Table<'de> {
    type Error = Wrong;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Wrong> {
        self.value = self.rest.next();
        let Some(entry) = self.value else { return Ok(None) };
        let key = seed.deserialize(BorrowedStrDeserializer::new(&entry.key));
        key.map(Some).map_err(|wrong: Wrong| wrong.at(&entry.place, &self.path))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Wrong> {
        let Some(entry) = self.value.take() else { return Err(de::Error::custom("a value without its key")) };
        let path = self.path.iter().copied().chain([entry.key.as_str()]).collect();
        read_seed(&entry.node, path, seed)
    }
}

struct List<'a> {
    rest: std::slice::Iter<'a, Node>,
    path: Vec<&'a str>,
}

impl<'de> de::SeqAccess<'de> for List<'de> {
    type Error = Wrong;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Wrong> {
        self.rest.next().map(|node| read_seed(node, self.path.clone(), seed)).transpose()
    }
}

//! The conf: one TOML file a run. Its keys with their meaning and defaults, and how it is read.
//!
//! ```text
//! text ─▶ tree ─▶ --set laid over it ─▶ ${VAR} expanded ─▶ typed Conf ─▶ checked
//!         tree    tree                  expand            read           check
//! ```
//!
//! Each step knows the place of what it handles, so whatever is wrong is shown where it was written. The
//! resolved conf, all defaults filled in, goes into manifests and reports with [`Conf::to_toml`].

// one reader for all that a conf says; the model crate, whose it is, is not in every build of this one
#[path = "../../../model/src/amount.rs"]
mod amount;
mod check;
mod expand;
mod read;
mod shares;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

pub use amount::{Count, Size};
pub use check::MIN_MEMORY;
pub use shares::{SLIMPAJAMA, SLIMPAJAMA_TEXT, Shares};

use crate::{Error, Result};
use tree::{Entry, Node, Tree, Value};

/// All that a run is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conf {
    pub run: Run,
    /// Where documents come from; at least one.
    pub source: Vec<Source>,
    pub tokenizer: Tokenizer,
    pub mixture: Mixture,
    pub pack: Pack,
    #[serde(default)]
    pub engine: Engine,
    /// The trainer's own table, which [`Conf::train`] reads. Without it, the run ends at the packed dataset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<toml::Table>,

    /// The evaluations' own table, which [`Conf::eval`] reads. Without it, the run ends at the checkpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<toml::Table>,

    #[serde(skip)]
    written: Written,
}

/// What this run is called, and where it goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Names the run's folder: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// Decides every choice that chance would: which documents are drawn and in which order. 0 by default.
    #[serde(default)]
    pub seed: u64,
    /// A folder or an object-store url; stages, runs and attempts are stored below it.
    pub output: String,
}

/// Files of one kind, and how to find the text and the domain in them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// A file, a folder or a glob, local or in an object store. What is there under a name is meant by it, also where the
    /// name looks like a glob.
    pub url: String,
    /// The `origin` of its documents. By default the url as it is written in the conf, before `${VAR}` is
    /// expanded, so that the same conf gives the same names on another machine.
    pub name: String,
    pub format: Format,
    /// The column of the text, with dots into nested ones, and a name that has a dot itself quoted as in SQL
    /// (`'meta."a.b"'`); `"text"` by default. `None` exactly when the
    /// format is text, where the whole file is the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    pub domain: Domain,
    /// The share of bad rows, 0 to 1, above which the run stops. 0.001 by default: a few bad rows in a crawl
    /// are ordinary, more of them mean that the conf does not fit the data.
    #[serde(default = "default::max_reject_share")]
    pub max_reject_share: f64,
    /// A longer document is rejected. 64MB by default, 2GB at most; one document is held in memory as a whole.
    #[serde(default = "default::max_document_bytes")]
    pub max_document_bytes: Size,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// A JSON object a line, in `.jsonl`, `.ndjson` or `.json`; plain, gzip (`.gz`) or zstd (`.zst`).
    Jsonl,
    Parquet,
    /// A document a file.
    Text,
}

/// Where a document's domain is found.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Domain {
    /// In a column, written as that of the text. Not for format text, which has no columns.
    Column(String),
    /// It is the same for all documents of the source.
    Const(Const),
    /// The first rule whose glob matches the file's path decides; a file that none matches has no domain.
    Rules(Vec<Rule>),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Const {
    #[serde(rename = "const")]
    pub domain: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    pub glob: String,
    pub domain: String,
}

/// The tokenizer: either a file at `url`, or trained on the run's own documents with `train`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokenizer {
    /// A `tokenizer.json` of Hugging Face.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<TrainTokenizer>,
    /// The token that the packer puts before each document. By default what the tokenizer's own post-processor puts
    /// there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos: Option<Special>,
    /// … and after each document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eos: Option<Special>,
}

/// A token around documents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true or false, a token's text or its id")]
pub enum Special {
    /// Whether there is one: the tokenizer's own, as its post-processor, the `tokenizer_config.json` beside it or its only
    /// special token says.
    Own(bool),
    Id(u32),
    /// As it is written in the tokenizer.
    Text(String),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainTokenizer {
    /// Ids in the vocabulary, special tokens among them.
    pub vocab: u32,
    /// How much text to train on, chosen by `doc_id`. 32MB by default, where vocabularies have long settled.
    #[serde(default = "default::sample")]
    pub sample: Size,
}

/// Which tokens to draw: the recipe and what it is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mixture {
    /// The path of the recipe's SQL file.
    pub recipe: String,
    /// Tokens to draw in all.
    pub budget: Count,
    /// The share of documents, 0 or more and below 1, that is held out for evaluation before the recipe sees
    /// them.
    #[serde(default)]
    pub holdout: f64,
    /// What to do when a domain's share cannot be reached.
    #[serde(default)]
    pub shortfall: Shortfall,
    /// A document of more tokens is long. 4096 by default: the context of LLaMA 2, and the bound of the
    /// paper's §3.
    #[serde(default = "default::long_tokens")]
    pub long_tokens: Count,
    /// The most tokens in one span; a longer document gives several. 131072 by default: the paper's 128K.
    #[serde(default = "default::max_span")]
    pub max_span: Count,
    /// How often one span may be drawn. 4 by default.
    #[serde(default = "default::max_copies")]
    pub max_copies: u32,
    /// The domains' target shares of the budget: the corpus's own by default.
    #[serde(default)]
    pub shares: Shares,
    /// The recipe's own parameters, bound with their types: `long_share = 0.7` is `$long_share`.
    #[serde(default)]
    pub params: BTreeMap<String, Param>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shortfall {
    /// Stop the run and say what fell short.
    #[default]
    Error,
    /// Go on, and report it.
    Allow,
}

/// A recipe's parameter has the type it is written with; the text `"5B"` stays a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true or false, a number or a text")]
pub enum Param {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
}

/// How drawn spans become sequences, and sequences files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pack {
    /// Tokens in one sequence.
    pub sequence_tokens: Count,
    #[serde(default)]
    pub mode: Mode,
    /// 256 by default. Which file a sequence is in is part of the bytes, so this never depends on the
    /// machine.
    #[serde(default = "default::sequences_per_file")]
    pub sequences_per_file: u32,
    /// 16 by default: what a trainer has to read to get at one sequence. At most 2²⁶ tokens, and at least a 32,767th of
    /// a file.
    #[serde(default = "default::sequences_per_row_group")]
    pub sequences_per_row_group: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Documents one after the other, cut wherever a sequence ends: the paper's way (§4).
    #[default]
    Concat,
    /// No document that fits a sequence is cut; what stays free is padding.
    BestFit,
}

/// What the run may use of the machine. Nothing here changes a byte of what comes out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Engine {
    /// How many jobs run at once, 1 or more. By default the machine's cores, counted when the run starts: the
    /// resolved conf is the same on every machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partitions: Option<usize>,
    /// Where queries begin to spill. 2GB by default, 64MB at least.
    pub memory: Size,
    /// How many seconds a recipe may run, 21,600 by default: one that multiplies documents with each other would for years.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe_seconds: Option<u64>,
    /// The folder for what spills. By default the system's temporary folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spill: Option<String>,
    /// A Ballista scheduler, `df://host:50050`, whose executors do the heavy tasks. By default they are done here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
}

impl Default for Engine {
    fn default() -> Self {
        Self { partitions: None, memory: Size(2_000_000_000), recipe_seconds: None, spill: None, url: None }
    }
}

mod default {
    use super::{Count, Size};

    pub fn max_reject_share() -> f64 {
        0.001
    }

    pub fn max_document_bytes() -> Size {
        Size(64_000_000)
    }

    pub fn sample() -> Size {
        Size(32_000_000)
    }

    pub fn long_tokens() -> Count {
        Count(4096)
    }

    pub fn max_span() -> Count {
        Count(131_072)
    }

    pub fn max_copies() -> u32 {
        4
    }

    pub fn sequences_per_file() -> u32 {
        256
    }

    pub fn sequences_per_row_group() -> u32 {
        16
    }
}

impl Conf {
    /// Reads a conf from its text. `file` is its name in messages, `sets` are the `--set key=value`
    /// arguments, and `env` looks up an environment variable.
    pub fn parse(
        text: &str,
        file: &str,
        sets: &[String],
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let mut tree = Tree::parse(file, text)?;
        for argument in sets {
            tree.set(argument)?;
        }
        fill_sources(&mut tree);
        expand::urls(&mut tree, env)?;

        let mut conf: Conf = read::read(&tree, &tree.root, &[])?;
        conf.written = Written(Some(Arc::new(tree)));
        check::check(&conf)?;
        Ok(conf)
    }

    /// The resolved conf, defaults filled in. It parses back to an equal conf.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("all that a conf holds has a form in TOML")
    }

    /// The conf after some of it was changed, as if it had been written so.
    pub fn resolved(&self) -> Result<Self> {
        Self::parse(&self.to_toml(), "the changed conf", &[], &|_| None)
    }

    /// The `[train]` table as the trainer's own type. What is wrong in it is shown where it was written.
    pub fn train<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        let tree = self.tree()?;
        tree.get(&["train"]).map(|table| read::read(&tree, table, &["train"])).transpose()
    }

    /// The `[eval]` table as the evaluations' own type.
    pub fn eval<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        let tree = self.tree()?;
        tree.get(&["eval"]).map(|table| read::read(&tree, table, &["eval"])).transpose()
    }

    /// An error that points at what stands at `path`, as in `["source", "0", "domain"]`, or at the nearest
    /// thing around it. For what only later stages can see, such as a recipe that is not there.
    pub fn wrong(
        &self,
        path: &[&str],
        message: impl Into<String>,
        label: impl Into<String>,
        help: Option<String>,
    ) -> Error {
        match self.tree() {
            Ok(tree) => tree.wrong(tree.place(path), message, label, help),
            Err(error) => error,
        }
    }

    /// What is wrong with a thing that the conf names, as an error that points at its name; any other error as it is.
    pub fn names_wrong(&self, path: &[&str], error: Error) -> Error {
        match error {
            Error::Usage { message, help } => self.wrong(path, message, "named here", help),
            other => other,
        }
    }

    /// The conf as it was written; for one that comes from a manifest, as it would be.
    fn tree(&self) -> Result<Arc<Tree>> {
        match &self.written.0 {
            Some(tree) => Ok(tree.clone()),
            None => Ok(Arc::new(Tree::parse("the resolved conf", &self.to_toml())?)),
        }
    }
}

/// What the conf was read from. It says nothing about the run, so any two are equal.
#[derive(Clone, Default)]
struct Written(Option<Arc<Tree>>);

impl PartialEq for Written {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl fmt::Debug for Written {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("…")
    }
}

/// Fills in those defaults of sources that depend on their other keys.
fn fill_sources(tree: &mut Tree) {
    for source in tree.root.all_mut(&["source", "*"]) {
        // The copy of the url keeps its place: what is wrong with such a name is shown at the url.
        let name = source.get("url").cloned();
        let is_text =
            matches!(source.get("format"), Some(Node { value: Value::Text(word), .. }) if word == "text");
        let column = Node { place: source.place.clone(), value: Value::Text("text".to_owned()) };

        for (key, default) in [("name", name), ("text", (!is_text).then_some(column))] {
            if let (None, Some(node)) = (source.get(key), default)
                && let Value::Table(entries) = &mut source.value
            {
                entries.push(Entry { key: key.to_owned(), place: node.place.clone(), node });
            }
        }
    }
}

/// By its form: a text, a table or a list. Not serde's `untagged`, which would forget what is wrong inside.
impl<'de> Deserialize<'de> for Domain {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct ByForm;

        impl<'de> Visitor<'de> for ByForm {
            type Value = Domain;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a column's name, { const = \"…\" }, or a list of rules on the path")
            }

            fn visit_str<E>(self, column: &str) -> Result<Domain, E> {
                Ok(Domain::Column(column.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<Domain, A::Error> {
                Const::deserialize(MapAccessDeserializer::new(table)).map(Domain::Const)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, rules: A) -> Result<Domain, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(rules)).map(Domain::Rules)
            }
        }

        from.deserialize_any(ByForm)
    }
}

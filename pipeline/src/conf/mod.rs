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

use schemars::JsonSchema;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

pub use amount::{Count, Size};
pub use check::MIN_MEMORY;
pub use shares::{SLIMPAJAMA, SLIMPAJAMA_TEXT, Shares};

use crate::{Error, Result};
use tree::{Entry, Node, Tree, Value};

/// The conf of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Conf {
    pub run: Run,
    #[schemars(length(min = 1))]
    pub source: Vec<Source>,
    pub tokenizer: Tokenizer,
    pub mixture: Mixture,
    pub pack: Pack,
    #[serde(default)]
    pub engine: Engine,
    /// Training. Without this table, the run ends at the packed dataset.
    // the trainer's own; `Conf::train` reads it
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "train", schemars(with = "Option<lengthwise_model::conf::TrainConf>"))]
    #[cfg_attr(not(feature = "train"), schemars(skip))]
    pub train: Option<toml::Table>,
    /// The evaluations at the end of a run. Without this table, the run ends at the checkpoint.
    // the evaluations' own; `Conf::eval` reads it
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "train", schemars(with = "Option<lengthwise_model::eval::conf::EvalConf>"))]
    #[cfg_attr(not(feature = "train"), schemars(skip))]
    pub eval: Option<toml::Table>,

    #[serde(skip)]
    written: Written,
}

/// What the run is called, and where its results go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// The name of the run and of its folder. It has letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// The seed decides every random choice: which documents are drawn, and in which order.
    #[serde(default)]
    pub seed: u64,
    /// A folder, or a URL of an object store such as `s3://bucket/lengthwise`. Stages and runs are stored below it.
    pub output: String,
}

/// Where documents come from: files of one format. There is at least one source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// A file, a folder or a glob, local or in an object store. If a file or a folder has exactly this name, it is read,
    /// even if the name looks like a glob.
    pub url: String,
    /// The `origin` of the source's documents. By default it is the url as the conf has it, before `${VAR}` is replaced:
    /// the same conf gives the same names on every machine.
    #[schemars(with = "Option<String>")]
    pub name: String,
    pub format: Format,
    /// The column of the text, `"text"` by default. A dot leads into a nested column; a name that has a dot itself is quoted
    /// as in SQL: `'meta."a.b"'`. Format text has no columns, and takes no `text`.
    // None exactly when the format is text
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    pub domain: Domain,
    /// The largest share of bad rows, from 0 to 1. If more rows are bad, the run stops. A few bad rows are ordinary in a
    /// crawl; many mean that the conf does not fit the data.
    #[serde(default = "default::max_reject_share")]
    pub max_reject_share: f64,
    /// A longer document is rejected. At most 2GB, because one document is held in memory as a whole.
    #[serde(default = "default::max_document_bytes")]
    pub max_document_bytes: Size,
}

/// The format of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// One JSON object a line, in `.jsonl`, `.ndjson` or `.json`: plain, gzip (`.gz`) or zstd (`.zst`).
    Jsonl,
    /// Parquet files.
    Parquet,
    /// One document a file.
    Text,
}

/// How a document's domain is found.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Domain {
    /// The column that has it, written as for `text`. Format text has no columns.
    Column(String),
    /// All documents of the source have this domain.
    Const(Const),
    /// The first rule whose glob matches the file's path decides. A file that no rule matches has no domain.
    Rules(Vec<Rule>),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Const {
    /// The domain of all documents of the source.
    #[serde(rename = "const")]
    pub domain: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// A pattern of paths, such as `**/*.rs`.
    pub glob: String,
    /// The domain of the files that match.
    pub domain: String,
}

/// The tokenizer: either a file at `url`, or one that the run trains on its own documents, with `train`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tokenizer {
    /// A `tokenizer.json` of Hugging Face.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<TrainTokenizer>,
    /// The token before each document. By default, the one that the tokenizer's own post-processor puts there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos: Option<Special>,
    /// The token after each document. By default, the one that the tokenizer's own post-processor puts there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eos: Option<Special>,
}

/// A token around documents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected true or false, a token's text or its id")]
pub enum Special {
    /// `false` is none. `true` is the tokenizer's own: the one that its post-processor, the `tokenizer_config.json` beside it
    /// or its only special token says.
    Own(bool),
    /// The token's id.
    Id(u32),
    /// The token's text, as the tokenizer has it.
    Text(String),
}

/// Trains a tokenizer on the run's own documents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainTokenizer {
    /// How many ids the vocabulary has, special tokens among them.
    pub vocab: u32,
    /// How much text the tokenizer is trained on. `doc_id` decides which. More than the default hardly changes a vocabulary.
    #[serde(default = "default::sample")]
    pub sample: Size,
}

/// Which tokens are drawn: the recipe, and what it is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mixture {
    /// The path of the recipe, an SQL file.
    pub recipe: String,
    /// How many tokens are drawn in all.
    pub budget: Count,
    /// The share of documents that is held out for evaluation before the recipe sees them: 0 or more, and below 1.
    #[serde(default)]
    pub holdout: f64,
    #[serde(default)]
    pub shortfall: Shortfall,
    /// A document with more tokens than this is long. The default is the context of LLaMA 2, and the bound of the paper's §3.
    #[serde(default = "default::long_tokens")]
    pub long_tokens: Count,
    /// The most tokens of one span. A longer document gives several spans. The default is the paper's 128K.
    #[serde(default = "default::max_span")]
    pub max_span: Count,
    /// How often one span may be drawn.
    #[serde(default = "default::max_copies")]
    pub max_copies: u32,
    #[serde(default)]
    pub shares: Shares,
    /// The recipe's own parameters: `long_share = 0.7` is `$long_share`. A value has the type that it is written with; the
    /// text `"5B"` stays a text.
    #[serde(default)]
    pub params: BTreeMap<String, Param>,
}

/// What happens if a domain has too few tokens for its share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Shortfall {
    /// The run stops, and says what falls short.
    #[default]
    Error,
    /// The run goes on, and reports it.
    Allow,
}

/// The value of a recipe's parameter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected true or false, a number or a text")]
pub enum Param {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
}

/// How drawn spans become sequences, and sequences become files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pack {
    /// How many tokens a sequence has.
    pub sequence_tokens: Count,
    #[serde(default)]
    pub mode: Mode,
    /// How many sequences a file has.
    // which file a sequence is in is part of the bytes, so this never depends on the machine
    #[serde(default = "default::sequences_per_file")]
    pub sequences_per_file: u32,
    /// How many sequences a row group has: a trainer reads a whole row group to get one sequence. A row group has at most
    /// 2²⁶ tokens, and a file has at most 32,767 row groups.
    #[serde(default = "default::sequences_per_row_group")]
    pub sequences_per_row_group: u32,
}

/// Where documents are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Documents stand one after the other, and are cut where a sequence ends: the paper's way (§4).
    #[default]
    Concat,
    /// No document that fits a sequence is cut. The rest of a sequence is filled with padding.
    BestFit,
}

/// What the run may use of the machine. Nothing here changes a byte of what comes out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Engine {
    /// How many jobs run at once, 1 or more. By default, as many as the machine has cores.
    // counted when the run starts: the resolved conf is the same on every machine
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partitions: Option<usize>,
    /// How much memory queries use before they write to disk. At least 64MB.
    pub memory: Size,
    /// How many seconds a recipe may run, 21,600 by default. A recipe that joins documents with each other could run for
    /// years.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe_seconds: Option<u64>,
    /// The folder for what queries write to disk. By default, the system's temporary folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spill: Option<String>,
    /// A Ballista scheduler, such as `df://host:50050`, whose executors do the heavy tasks. By default, this machine does
    /// them.
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

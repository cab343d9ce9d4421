//! Sources: files of any size in any store become rows, and every row is a document or a reject. A row with
//! an empty text is neither.
//!
//! ```text
//! list ─▶ units ─────────▶ parts ──────────────▶ rows
//! files   a large file,    about 32 MiB each,    a document, or a reject
//!         or a bundle      streamed in order     with file, line and reason
//!         of small ones
//! ```
//!
//! A [`Unit`] is read once, front to back, on one blocking thread. Workers take its [`Part`]s, tokenise them
//! and cache the results. Where a part ends depends on the files' content alone, never on the sizes in which
//! a store happens to deliver them.
//!
//! One bad row never ends a scan: it is a [`Reject`]. A scan ends with an error if *all* further rows of a
//! file are doubtful: damaged compression, a file that changes while it is read, a column that isn't there.

mod column;
mod files;
// shared with the model crate by path, because that crate is not in every build of this one
#[path = "../../../model/src/headers.rs"]
mod headers;
mod jsonl;
mod list;
mod local;
mod parquet;
mod part;
mod read;
mod stored;
#[cfg(test)]
mod tests;
mod text;
mod unread;

pub use column::Column;
pub use files::{BUNDLE_FILE_BYTES, SourceFile, Unit, units};
pub use list::{Listing, list, reads};
pub use part::{PART_BYTES, Part};
pub use read::{FileSummary, Parts, Reader};
pub use unread::{Unread, Why};

use globset::GlobMatcher;

/// The longest name of a domain, in bytes. A longer one is probably a text in the wrong column.
pub const DOMAIN_BYTES: usize = 256;

/// How a source is read, as its conf says.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The source's name in the conf.
    pub origin: String,
    pub format: Format,
    /// The text's column. Not used by [`Format::Text`].
    pub text: Column,
    pub domain: DomainRule,
    /// A text of more bytes is rejected.
    pub max_document_bytes: u64,
}

/// The format of a source's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One JSON object per line (`.jsonl`, `.ndjson`, `.json`); plain, gzip (`.gz`) or zstd (`.zst`).
    Jsonl,
    /// Tables of Parquet (`.parquet`, `.parq`, `.pq`).
    Parquet,
    /// One document per file.
    Text,
}

/// Where a document's domain comes from.
#[derive(Clone, Debug)]
pub enum DomainRule {
    /// In this column. Not for [`Format::Text`], which has no columns.
    Column(Column),
    /// It is the same for all documents.
    Const(String),
    /// The first glob that matches the file decides. It may match the url (`s3://bucket/code/a.rs`,
    /// `/data/code/a.rs`) or the path inside the store (`code/a.rs`, `data/code/a.rs`), so `**/*.rs` works
    /// in every store.
    Paths(Vec<(GlobMatcher, String)>),
}

/// One row of a source, good or bad.
#[derive(Debug)]
pub struct Row<'a> {
    /// The url of its file.
    pub file: &'a str,
    /// Counted from 1: the line in JSONL, the row in Parquet; 1 for a text file.
    pub line: u64,
    pub outcome: Outcome<'a>,
}

/// A row's document, `None` if its text is empty, or the reason why it is rejected.
pub type Outcome<'a> = std::result::Result<Option<Document<'a>>, Reject>;

impl Row<'_> {
    /// Says in a line where the row is and why it is rejected.
    pub fn rejected(&self, reject: &Reject) -> String {
        format!("{} line {}: {}: {}", self.file, self.line, reject.reason.name(), reject.detail)
    }
}

/// Called with the line and outcome of each row of a file.
type Each<'f> = dyn FnMut(u64, Outcome<'_>) -> crate::Result<()> + 'f;

/// A text and its domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document<'a> {
    pub domain: &'a str,
    pub text: &'a str,
}

/// Why a row is rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reject {
    pub reason: Reason,
    /// An explanation for people. It never contains the row's text.
    pub detail: String,
}

/// The kinds of bad rows. Their names are written to the table `rejects`, so they must not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    NotUtf8,
    NotJson,
    NotAnObject,
    NoText,
    TextNotAString,
    NoDomain,
    DomainNotAString,
    /// The domain is empty, or longer than [`DOMAIN_BYTES`].
    BadDomain,
    /// The text, or the line that it is in, is longer than the conf's `max_document_bytes` allows.
    TooLong,
}

impl Reason {
    pub fn name(self) -> &'static str {
        match self {
            Reason::NotUtf8 => "not_utf8",
            Reason::NotJson => "not_json",
            Reason::NotAnObject => "not_an_object",
            Reason::NoText => "no_text",
            Reason::TextNotAString => "text_not_a_string",
            Reason::NoDomain => "no_domain",
            Reason::DomainNotAString => "domain_not_a_string",
            Reason::BadDomain => "bad_domain",
            Reason::TooLong => "too_long",
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl Reject {
    fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }

    fn not_utf8(error: std::str::Utf8Error) -> Self {
        Self::new(Reason::NotUtf8, format!("byte {} is not UTF-8", error.valid_up_to() + 1))
    }

    fn too_long(what: &str, bytes: u64, limit: u64) -> Self {
        Self::new(Reason::TooLong, format!("{what} has {bytes} bytes; a text may have {limit}"))
    }
}

/// The value of the text or the domain in a row.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cell<'a> {
    Text(&'a str),
    Null,
    Missing,
    /// A value of another type, which this names.
    Other(&'static str),
}

impl Spec {
    /// The column of the domain, if it is in a column.
    fn domain_column(&self) -> Option<&Column> {
        match &self.domain {
            DomainRule::Column(column) => Some(column),
            DomainRule::Const(_) | DomainRule::Paths(_) => None,
        }
    }

    /// The domain that all rows of a file share; missing if each row has its own, or if no rule matches.
    fn domain_of(&self, file: &SourceFile) -> Cell<'_> {
        match &self.domain {
            DomainRule::Column(_) => Cell::Missing,
            DomainRule::Const(domain) => Cell::Text(domain),
            DomainRule::Paths(rules) => rules
                .iter()
                .find(|(glob, _)| glob.is_match(&file.url) || glob.is_match(file.path.as_ref()))
                .map_or(Cell::Missing, |(_, domain)| Cell::Text(domain)),
        }
    }

    /// A document, if text and domain are valid. Otherwise the first thing that is wrong is the reason to
    /// reject it. An empty text is checked first, so it is no reject even if the domain is wrong.
    fn outcome<'a>(&self, text: Cell<'a>, domain: Cell<'a>) -> Outcome<'a> {
        let text = match text {
            Cell::Text("") => return Ok(None),
            Cell::Text(text) if text.len() as u64 > self.max_document_bytes => {
                return Err(Reject::too_long("the text", text.len() as u64, self.max_document_bytes));
            }
            Cell::Text(text) => text,
            Cell::Null => {
                return Err(Reject::new(Reason::NoText, format!("`{}` is null", self.text)));
            }
            Cell::Missing => {
                return Err(Reject::new(Reason::NoText, format!("there is no `{}`", self.text)));
            }
            Cell::Other(kind) => {
                return Err(Reject::new(Reason::TextNotAString, format!("`{}` is {kind}", self.text)));
            }
        };
        let named = || match &self.domain {
            DomainRule::Column(column) => format!("`{column}`"),
            DomainRule::Const(_) | DomainRule::Paths(_) => "rule for this file's path".into(),
        };
        match domain {
            Cell::Text("") => Err(Reject::new(Reason::BadDomain, "the domain is empty")),
            Cell::Text(domain) if domain.len() > DOMAIN_BYTES => Err(Reject::new(
                Reason::BadDomain,
                format!("the domain has {} bytes, more than {DOMAIN_BYTES}", domain.len()),
            )),
            Cell::Text(domain) => Ok(Some(Document { domain, text })),
            Cell::Null => Err(Reject::new(Reason::NoDomain, format!("{} is null", named()))),
            Cell::Missing => Err(Reject::new(Reason::NoDomain, format!("there is no {}", named()))),
            Cell::Other(kind) => Err(Reject::new(Reason::DomainNotAString, format!("{} is {kind}", named()))),
        }
    }
}

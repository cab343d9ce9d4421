//! Sources: files of any size in any store become rows, and every row is a document or a reject.
//!
//! ```text
//! list ─▶ units ─────────▶ parts ──────────────▶ rows
//! files   a large file,    about 32 MiB each,    a document, or a reject
//!         or a bundle      streamed in order     with file, line and reason
//!         of small ones
//! ```
//!
//! A [`Unit`] is read once, front to back, on one blocking thread; its [`Part`]s are what workers take,
//! tokenise and cache. Where a part ends depends on the files' content alone, never on the sizes in which
//! a store happens to deliver them.
//!
//! One bad row never ends a scan: it is a [`Reject`]. What makes *all* further rows of a file doubtful does:
//! damaged compression, a file that changes while it is read, a column that isn't there.

mod column;
mod files;
// one walk for packed files and for sources; the model crate, whose it is, is not in every build of this one
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

/// The longest domain there may be, in bytes. A longer one is rather a text in the wrong column.
pub const DOMAIN_BYTES: usize = 256;

/// What a source's conf says to its reader.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The conf's name of the source.
    pub origin: String,
    pub format: Format,
    /// The text's column. Not used by [`Format::Text`].
    pub text: Column,
    pub domain: DomainRule,
    /// A longer text is rejected.
    pub max_document_bytes: u64,
}

/// How a source's files hold their rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A JSON object a line (`.jsonl`, `.ndjson`, `.json`); plain, gzip (`.gz`) or zstd (`.zst`).
    Jsonl,
    /// (`.parquet`, `.parq`, `.pq`)
    Parquet,
    /// A document a file.
    Text,
}

/// Where a document's domain is found.
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

/// What a row turned out to be; none where its text is empty, which is no document.
pub type Outcome<'a> = std::result::Result<Option<Document<'a>>, Reject>;

/// What is done with each row of a file, given its line.
type Each<'f> = dyn FnMut(u64, Outcome<'_>) -> crate::Result<()> + 'f;

/// A text and where it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document<'a> {
    pub domain: &'a str,
    pub text: &'a str,
}

/// Why a row is no document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reject {
    pub reason: Reason,
    /// A few words for a person; never the row's text.
    pub detail: String,
}

/// The kinds of bad rows. Their names are written to the table `rejects`, so they stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    NotUtf8,
    NotJson,
    NotAnObject,
    NoText,
    TextNotAString,
    NoDomain,
    DomainNotAString,
    /// Empty, or longer than [`DOMAIN_BYTES`].
    BadDomain,
    /// Longer than the conf's `max_document_bytes`.
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

/// What stands in a row where the text or the domain is looked for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cell<'a> {
    Text(&'a str),
    Null,
    Missing,
    /// Something else; this says what.
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

    /// The domain of all rows of a file; missing where rows have their own, or where no rule matches.
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

    /// A document, if text and domain are what they should be. The first thing that is wrong is the reason.
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

//! The schemas of all tables, as SQL sees them and as files hold them.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::error::DataFusionError;

use crate::stage::Stage;
use crate::{Error, Result};

/// A column of a batch, by name.
///
/// # Errors
/// [`Error::Query`] if the batch has no column of this name and type.
pub fn column<'a, A: Array + 'static>(batch: &'a RecordBatch, name: &str) -> Result<&'a A> {
    let found = batch.column_by_name(name).and_then(|column| column.as_any().downcast_ref());
    found.ok_or_else(|| {
        let columns: Vec<String> =
            batch.schema_ref().fields().iter().map(|f| format!("{}: {}", f.name(), f.data_type())).collect();
        let kind = std::any::type_name::<A>().rsplit("::").next().unwrap_or_default();
        let message = format!("no column {name} as {kind} is among {}", columns.join(", "));
        Error::Query {
            doing: "cannot read a table".into(),
            cause: Box::new(DataFusionError::Internal(message)),
            help: None,
        }
    })
}

/// Builds rows of a table from its columns, given by name in any order.
///
/// # Panics
/// If they are not the table's columns.
pub fn rows<const N: usize>(schema: SchemaRef, columns: [(&str, ArrayRef); N]) -> RecordBatch {
    let of = |field: &Arc<Field>| {
        let named = columns.iter().find(|(name, _)| name == field.name());
        named.unwrap_or_else(|| panic!("the column {} is not given", field.name())).1.clone()
    };
    let columns = schema.fields().iter().map(of).collect();
    RecordBatch::try_new(schema, columns).expect("columns as the table has them")
}

/// A table that `lengthwise sql` sees.
pub struct Seen {
    pub name: &'static str,
    /// What one row of it is.
    pub row: &'static str,
    pub stage: Stage,
    /// What the stage calls it.
    pub table: &'static str,
    pub schema: fn() -> SchemaRef,
}

/// All tables that `lengthwise sql` sees.
#[rustfmt::skip]
pub const SEEN: [Seen; 10] = {
    use Stage::*;
    const fn seen(name: &'static str, stage: Stage, schema: fn() -> SchemaRef, row: &'static str) -> Seen {
        Seen { name, row, stage, table: name, schema }
    }
    [
        seen("documents", Tokens, documents, "a row of a source that became a document"),
        seen("tokens", Tokens, || tokens(true), "up to 131,072 token ids of a document, without special tokens"),
        seen("rejects", Tokens, rejects, "a row of a source that did not become a document"),
        seen("catalog", Catalog, catalog, "a distinct document"),
        seen("heldout", Catalog, heldout, "a document that is held out of training"),
        seen("domains", Domains, domains, "a domain, over the documents that a recipe may draw from"),
        seen("shares", Domains, shares, "a domain and its target share"),
        seen("mixture", Mixture, mixture, "a span to draw from, as the recipe gave it"),
        seen("drawn", Draw, drawn, "a copy of a span that was drawn"),
        Seen { table: "train", ..seen("packed", Pack, packed, "a sequence of the dataset") },
    ]
};

fn schema(columns: &[(&str, DataType)]) -> SchemaRef {
    Arc::new(Schema::new(
        columns.iter().map(|(name, t)| Field::new(*name, t.clone(), false)).collect::<Vec<_>>(),
    ))
}

const DOC_ID: DataType = DataType::FixedSizeBinary(16);
use DataType::{Boolean, Float64, Int32, Int64, Utf8};

/// Source rows that became documents. `text_id` is the same for the same text in every domain, and `part`
/// names the file of ids that holds the document.
pub fn documents() -> SchemaRef {
    schema(&[
        ("doc_id", DOC_ID),
        ("domain", Utf8),
        ("tokens", Int64),
        ("bytes", Int64),
        ("origin", Utf8),
        ("text_id", DOC_ID),
        ("part", Int64),
    ])
}

/// Source rows that did not become documents, with the reason.
pub fn rejects() -> SchemaRef {
    schema(&[("origin", Utf8), ("file", Utf8), ("line", Int64), ("reason", Utf8), ("detail", Utf8)])
}

/// The token ids of documents, without special tokens, at most [`CHUNK_IDS`] per row. `narrow` selects 16-bit
/// ids.
pub fn tokens(narrow: bool) -> SchemaRef {
    let id = if narrow { DataType::UInt16 } else { DataType::UInt32 };
    let ids = DataType::List(Arc::new(Field::new("item", id, false)));
    schema(&[("doc_id", DOC_ID), ("chunk", Int32), ("ids", ids)])
}

/// The most ids in a row of `tokens`, so that no batch overflows on a long document.
pub const CHUNK_IDS: usize = 131_072;

/// One row per distinct document, sorted by `doc_id`. `part` names a file that holds one copy of it.
pub fn catalog() -> SchemaRef {
    documents()
}

/// One row per document held out of training, as one span over the whole document, drawn once; sorted by
/// `doc_id`.
pub fn heldout() -> SchemaRef {
    drawn()
}

/// One row per domain, with statistics over the documents that a recipe may draw from.
pub fn domains() -> SchemaRef {
    let numbers = DataType::List(Arc::new(Field::new("item", Int64, false)));
    schema(&[
        ("domain", Utf8),
        ("documents", Int64),
        ("tokens", Int64),
        ("share", Float64),
        ("long_documents", Int64),
        ("long_tokens", Int64),
        ("p25", Int64),
        ("p50", Int64),
        ("p75", Int64),
        ("p90", Int64),
        ("p99", Int64),
        ("longest", Int64),
        ("documents_by_length", numbers.clone()),
        ("tokens_by_length", numbers),
    ])
}

/// One row per domain, with its target share of the budget. The shares sum to 1.
pub fn shares() -> SchemaRef {
    schema(&[("domain", Utf8), ("share", Float64)])
}

/// One row per span to draw from, as the recipe returned it, with its document's domain and length in tokens;
/// sorted by `doc_id, start`. `copies` is a multiple of 2⁻³².
pub fn mixture() -> SchemaRef {
    schema(&[
        ("doc_id", DOC_ID),
        ("start", Int64),
        ("stop", Int64),
        ("copies", Float64),
        ("stratum", Utf8),
        ("domain", Utf8),
        ("tokens", Int64),
    ])
}

/// One copy in the unit of `copies`, 2⁻³².
pub const ONE: u64 = 1 << 32;

/// One row per drawn copy of a span; sorted by `doc_id, start, copy`. `tokens` is the document's length.
pub fn drawn() -> SchemaRef {
    schema(&[
        ("doc_id", DOC_ID),
        ("start", Int64),
        ("stop", Int64),
        ("copy", Int32),
        ("stratum", Utf8),
        ("domain", Utf8),
        ("tokens", Int64),
    ])
}

/// One row per fragment of the packed dataset: the tokens `[start, stop)` of a document, placed from position
/// `at` of output file `file`. A row with `label` set is not part of a sequence: its one token is the label
/// of the sequence that ends at `at`. Sorted by `file, at`, labels first.
pub fn plan() -> SchemaRef {
    schema(&[
        ("file", Int32),
        ("at", Int64),
        ("label", Boolean),
        ("doc_id", DOC_ID),
        ("domain", Utf8),
        ("start", Int64),
        ("stop", Int64),
        ("bos", Boolean),
        ("eos", Boolean),
        ("part", Int64),
    ])
}

/// One row per part and output file that takes tokens of it: the tokens `[begin, begin + tokens)` of the
/// part's file of ids.
pub fn ranges() -> SchemaRef {
    schema(&[("file", Int32), ("part", Int64), ("begin", Int64), ("tokens", Int64)])
}

/// A packed training example, in the layout of the authors' published dataset.
pub fn packed() -> SchemaRef {
    let item = |t| Arc::new(Field::new("element", t, true));
    let segment = DataType::Struct(
        vec![
            Field::new("source", Utf8, true),
            Field::new("doc_id", Utf8, true),
            Field::new("start", Int32, true),
            Field::new("end", Int32, true),
        ]
        .into(),
    );
    Arc::new(Schema::new(vec![
        Field::new("input_ids", DataType::List(item(Int32)), true),
        Field::new("labels", Int32, true),
        Field::new("source", DataType::List(item(segment)), true),
    ]))
}

/// Upper bounds (exclusive) of the paper's length buckets (Fig. 2), in tokens; a last bucket takes the rest.
pub const LENGTH_BUCKETS: [i64; 8] = [1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072];

/// The names of the buckets, as the figure writes them.
pub const LENGTH_BUCKET_NAMES: [&str; 9] =
    ["0–1K", "1–2K", "2–4K", "4–8K", "8–16K", "16–32K", "32–64K", "64–128K", "128K+"];

/// The index of the bucket of a document with this many tokens. A document at a bound belongs to the bucket
/// above it.
pub fn length_bucket(tokens: i64) -> usize {
    LENGTH_BUCKETS.partition_point(|bound| *bound <= tokens)
}

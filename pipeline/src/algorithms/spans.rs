//! spans: joins a recipe's rows with the catalog rows of their documents, and checks every row.

use std::pin::Pin;

use arrow::array::{Array, FixedSizeBinaryArray, Float64Array, Int64Array, RecordBatch, StringArray};
use futures::{Stream, StreamExt};

use super::strata::Span;
use crate::hash::hex;
use crate::tables::{ONE, column};
use crate::{Error, Result};

/// The largest number of expected copies of one span. More is taken for a mistake in the recipe, whatever
/// `max_copies` is.
const MAX_COPIES: f64 = 1e6;

/// A stream of record batches.
pub type Batches = Pin<Box<dyn Stream<Item = Result<RecordBatch>> + Send>>;

/// A table sorted by `doc_id`. It is read only forwards, so documents must be looked up in ascending order.
struct Sorted {
    rows: Batches,
    batch: Option<RecordBatch>,
    at: usize,
}

impl Sorted {
    fn new(rows: Batches) -> Self {
        Self { rows, batch: None, at: 0 }
    }

    /// The batch and row of a document; `None` if the table does not have it.
    async fn find(&mut self, doc_id: &[u8; 16]) -> Result<Option<(&RecordBatch, usize)>> {
        loop {
            if let Some(batch) = &self.batch {
                let ids: &FixedSizeBinaryArray = column(batch, "doc_id")?;
                while self.at < ids.len() && ids.value(self.at) < doc_id.as_slice() {
                    self.at += 1;
                }
                if self.at < ids.len() {
                    break;
                }
            }
            match self.rows.next().await {
                Some(batch) => (self.batch, self.at) = (Some(batch?), 0),
                None => return Ok(None),
            }
        }
        let Some(batch) = &self.batch else { return Ok(None) };
        let ids: &FixedSizeBinaryArray = column(batch, "doc_id")?;
        Ok((ids.value(self.at) == doc_id).then_some((batch, self.at)))
    }
}

/// The documents that a recipe may draw from: those in the catalog that are not held out.
struct Catalog {
    all: Sorted,
    heldout: Option<Sorted>,
}

impl Catalog {
    /// The domain of a document and its length in tokens; `None` if the catalog does not have it or it is
    /// held out.
    async fn find(&mut self, doc_id: &[u8; 16]) -> Result<Option<(&str, i64)>> {
        if let Some(heldout) = &mut self.heldout
            && heldout.find(doc_id).await?.is_some()
        {
            return Ok(None);
        }
        let Some((batch, at)) = self.all.find(doc_id).await? else { return Ok(None) };
        let (domains, tokens): (&StringArray, &Int64Array) =
            (column(batch, "domain")?, column(batch, "tokens")?);
        Ok(Some((domains.value(at), tokens.value(at))))
    }
}

/// The recipe's rows for one document. Nearly always there is only one.
#[derive(Default)]
struct Document {
    doc_id: Option<[u8; 16]>,
    /// start, stop, copies in units of 2⁻³², stratum
    spans: Vec<(i64, i64, u64, String)>,
}

impl Document {
    /// Checks the spans of a complete document and passes those with copies to `each`, sorted by `start`.
    async fn finish(
        &mut self,
        recipe: &str,
        max_span: i64,
        catalog: &mut Catalog,
        each: &mut impl FnMut(Span<'_>) -> Result<()>,
    ) -> Result<()> {
        let Some(doc_id) = self.doc_id.take() else { return Ok(()) };
        let Some((domain, tokens)) = catalog.find(&doc_id).await? else {
            return Err(wrong(
                recipe,
                &doc_id,
                "it is not in `documents`",
                "return doc_id as `documents` has it",
            ));
        };
        self.spans.sort_by_key(|span| span.0);
        let mut before: Option<(i64, i64)> = None;
        for (start, stop, copies, stratum) in self.spans.drain(..) {
            if start < 0 || start >= stop || stop > tokens {
                let what = format!("the span [{start}, {stop}) is not inside its {tokens} tokens");
                return Err(wrong(
                    recipe,
                    &doc_id,
                    what,
                    "0 <= start < stop <= tokens has to hold: write `least(start + $max_span, tokens) as stop`",
                ));
            }
            if stop - start > max_span {
                let what = format!("the span [{start}, {stop}) is longer than max_span, {max_span} tokens");
                let cure = "write a row for each `unnest(range(0, tokens, $max_span)) as start`, with \
                            `least(start + $max_span, tokens) as stop`, or raise `mixture.max_span`";
                return Err(wrong(recipe, &doc_id, what, cure));
            }
            if let Some((first, end)) = before.replace((start, stop))
                && start < end
            {
                let what = match first == start {
                    true => format!("two rows begin at token {start}"),
                    false => format!("the spans [{first}, {end}) and [{start}, {stop}) overlap"),
                };
                let cure = "return a token once: add up the copies, or look for a join that multiplies rows";
                return Err(wrong(recipe, &doc_id, what, cure));
            }
            if copies > 0 {
                each(Span { doc_id: &doc_id, start, stop, copies, stratum: &stratum, domain, tokens })?;
            }
        }
        Ok(())
    }
}

fn wrong(recipe: &str, doc_id: &[u8], what: impl std::fmt::Display, cure: &str) -> Error {
    Error::data(format!("{recipe}: document {}: {what}", hex(doc_id)), cure)
}

/// Joins a recipe's rows (`doc_id, start, stop, copies, stratum`) with the catalog's (`doc_id, domain,
/// tokens`) and checks every row. A row of a held-out document is an error. All inputs, including the
/// held-out documents (`doc_id`), must be sorted by `doc_id`.
pub struct SpanJoin {
    recipe: String,
    max_span: i64,
    rows: Batches,
    catalog: Catalog,
    document: Document,
}

impl SpanJoin {
    /// `recipe` names the recipe in error messages; `max_span` is in tokens.
    pub fn new(
        recipe: &str,
        max_span: u64,
        rows: Batches,
        catalog: Batches,
        heldout: Option<Batches>,
    ) -> Self {
        let catalog = Catalog { all: Sorted::new(catalog), heldout: heldout.map(Sorted::new) };
        let max_span = i64::try_from(max_span).unwrap_or(i64::MAX);
        Self { recipe: recipe.to_owned(), max_span, rows, catalog, document: Document::default() }
    }

    /// Processes one batch of the recipe's rows and passes the spans with copies to `each`, sorted by
    /// `doc_id, start`. Returns false when there are no more rows.
    ///
    /// # Errors
    /// A row has a null, or names a document that is not in the catalog or is held out; a span is not inside
    /// its document, is longer than `max_span` or overlaps another one; or `copies` is negative, not finite
    /// or above a million.
    pub async fn step(&mut self, each: &mut impl FnMut(Span<'_>) -> Result<()>) -> Result<bool> {
        let Some(batch) = self.rows.next().await else {
            self.document.finish(&self.recipe, self.max_span, &mut self.catalog, each).await?;
            return Ok(false);
        };
        let batch = batch?;
        let ids: &FixedSizeBinaryArray = column(&batch, "doc_id")?;
        let starts: &Int64Array = column(&batch, "start")?;
        let stops: &Int64Array = column(&batch, "stop")?;
        let copies: &Float64Array = column(&batch, "copies")?;
        let strata: &StringArray = column(&batch, "stratum")?;
        for row in 0..batch.num_rows() {
            if ids.is_null(row) {
                return Err(Error::data(
                    format!("{}: a row has no doc_id", self.recipe),
                    "look for an outer join",
                ));
            }
            let doc_id: [u8; 16] = ids.value(row).try_into().expect("16 bytes");
            if self.document.doc_id != Some(doc_id) {
                self.document.finish(&self.recipe, self.max_span, &mut self.catalog, each).await?;
                self.document.doc_id = Some(doc_id);
            }
            if starts.is_null(row) || stops.is_null(row) || copies.is_null(row) {
                let cure = "look for an outer join that finds nothing, a sum of no rows, or 0 / 0, which is null; coalesce(…, 0) as copies draws nothing there";
                return Err(wrong(&self.recipe, &doc_id, "start, stop or copies is null", cure));
            }
            let value = copies.value(row);
            if !(0.0..=MAX_COPIES).contains(&value) {
                let cure = match value {
                    _ if !value.is_finite() => {
                        "it is divided by zero: look for a sum of no rows, or write nullif(…, 0)"
                    }
                    _ if value < 0.0 => "a weight, or 1 minus a share, is below zero: write greatest(…, 0)",
                    _ => {
                        "more than 1,000,000 copies are no sample: `mixture.budget` may be far beyond what there is to draw from, or a weight is not divided by the sum of the weights"
                    }
                };
                return Err(wrong(&self.recipe, &doc_id, format!("copies is {value}"), cure));
            }
            let fixed = (value * ONE as f64).round() as u64;
            self.document.spans.push((
                starts.value(row),
                stops.value(row),
                fixed,
                strata.value(row).to_owned(),
            ));
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use arrow::array::{ArrayRef, FixedSizeBinaryBuilder, Int64Builder, StringBuilder};

    fn catalog(documents: &[(u8, &str, i64)]) -> Batches {
        let mut ids = FixedSizeBinaryBuilder::new(16);
        let (mut domains, mut tokens) = (StringBuilder::new(), Int64Builder::new());
        for (doc, domain, count) in documents {
            ids.append_value([*doc; 16]).unwrap();
            domains.append_value(domain);
            tokens.append_value(*count);
        }
        let columns: [(&str, ArrayRef); 3] = [
            ("doc_id", Arc::new(ids.finish())),
            ("domain", Arc::new(domains.finish())),
            ("tokens", Arc::new(tokens.finish())),
        ];
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        // the first batch has one row, so that a lookup has to cross batches
        Box::pin(futures::stream::iter([Ok(batch.slice(0, 1)), Ok(batch.slice(1, batch.num_rows() - 1))]))
    }

    fn rows(spans: &[(u8, Option<i64>, i64, f64)]) -> Batches {
        let mut ids = FixedSizeBinaryBuilder::new(16);
        spans.iter().for_each(|span| ids.append_value([span.0; 16]).unwrap());
        let columns: [(&str, ArrayRef); 5] = [
            ("doc_id", Arc::new(ids.finish())),
            ("start", Arc::new(arrow::array::Int64Array::from_iter(spans.iter().map(|span| span.1)))),
            ("stop", Arc::new(arrow::array::Int64Array::from_iter_values(spans.iter().map(|span| span.2)))),
            (
                "copies",
                Arc::new(arrow::array::Float64Array::from_iter_values(spans.iter().map(|span| span.3))),
            ),
            ("stratum", Arc::new(arrow::array::StringArray::from_iter_values(spans.iter().map(|_| "")))),
        ];
        let batch =
            RecordBatch::try_from_iter_with_nullable(columns.map(|(name, column)| (name, column, true)))
                .unwrap();
        let cut = batch.num_rows() / 2;
        Box::pin(futures::stream::iter([
            Ok(batch.slice(0, cut)),
            Ok(batch.slice(cut, batch.num_rows() - cut)),
        ]))
    }

    /// Joins rows with documents of 100, 200, 300, 400 and 500 tokens; the one of 400 tokens is held out.
    async fn joined(spans: &[(u8, Option<i64>, i64, f64)]) -> Result<Vec<(u8, i64, i64, u64, String, i64)>> {
        let all = [(1, "a", 100), (2, "b", 200), (3, "a", 300), (4, "b", 400), (5, "b", 500)];
        let heldout = Some(catalog(&all[3..4]));
        let mut span_join = SpanJoin::new("r.sql", 250, rows(spans), catalog(&all), heldout);
        let mut out = vec![];
        while span_join
            .step(&mut |s| {
                out.push((s.doc_id[0], s.start, s.stop, s.copies, s.domain.to_owned(), s.tokens));
                Ok(())
            })
            .await?
        {}
        Ok(out)
    }

    #[tokio::test]
    async fn a_recipe_s_rows_find_their_documents_and_come_sorted_by_start() {
        let spans = [
            (1, Some(0), 100, 0.5),
            (3, Some(200), 300, 1.0),
            (3, Some(0), 200, 2.0),
            (5, Some(0), 250, 0.0),
        ];
        let want = [
            (1, 0, 100, ONE / 2, "a".to_owned(), 100),
            (3, 0, 200, 2 * ONE, "a".to_owned(), 300),
            (3, 200, 300, ONE, "a".to_owned(), 300),
        ];
        assert_eq!(joined(&spans).await.unwrap(), want);
    }

    #[tokio::test]
    async fn a_row_that_cannot_be_drawn_from_is_named_with_the_cure() {
        for (spans, message) in [
            (vec![(4, Some(0), 400, 1.0), (5, Some(0), 9, 1.0)], "it is not in `documents`"),
            (vec![(2, Some(0), 201, 1.0)], "the span [0, 201) is not inside its 200 tokens"),
            (vec![(2, Some(5), 5, 1.0)], "the span [5, 5) is not inside its 200 tokens"),
            (vec![(2, Some(-1), 5, 1.0)], "the span [-1, 5) is not inside its 200 tokens"),
            (vec![(2, Some(0), 9, 1.0), (2, Some(0), 7, 1.0)], "two rows begin at token 0"),
            (vec![(2, Some(8), 20, 1.0), (2, Some(0), 9, 1.0)], "the spans [0, 9) and [8, 20) overlap"),
            (vec![(5, Some(0), 251, 1.0)], "the span [0, 251) is longer than max_span, 250 tokens"),
            (vec![(2, Some(0), 9, f64::NAN)], "copies is NaN"),
            (vec![(2, Some(0), 9, -1.0)], "copies is -1"),
            (vec![(2, Some(0), 9, f64::INFINITY)], "copies is inf"),
            (vec![(2, Some(0), 9, 3e7)], "copies is 30000000"),
            (vec![(2, None, 9, 1.0)], "start, stop or copies is null"),
            (vec![(4, Some(0), 9, 1.0)], "it is not in `documents`"),
        ] {
            let error = joined(&spans).await.unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
            assert!(matches!(error, Error::Data { help: Some(_), .. }));
        }
    }
}

//! pass: reads some of the mixture's spans, to find the cuts or, once they are found, to draw.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use arrow::array::{
    FixedSizeBinaryArray, FixedSizeBinaryBuilder, Float64Array, Int32Builder, Int64Array, Int64Builder,
    RecordBatch, StringArray, StringBuilder,
};
use datafusion::common::runtime::SpawnedTask;
use futures::TryStreamExt;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Worker;
use crate::algorithms::cut::{Cut, Rank, Tally, key};
use crate::algorithms::strata::{Span, Stratum};
use crate::hash::unit_hash;
use crate::output::{Output, Table};
use crate::progress::Bar;
use crate::sql::engine::{TableWriter, scan};
use crate::stop::check_stop;
use crate::storage::Location;
use crate::tables::{ONE, column};
use crate::{Error, Result, tables};

/// The settings of the draw.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Terms {
    pub seed: u64,
    /// A span is drawn at most this many times.
    pub max_copies: u32,
    /// A document of more tokens is long.
    pub long_tokens: u64,
}

/// A task of the draw: a pass over some files of the mixture, to find the cuts or, once they are found, to
/// draw.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pass {
    /// The URL of the mixture's folder. `mixture` lists the files to read.
    pub from: String,
    pub mixture: Table,
    pub terms: Terms,
    pub cuts: Vec<Cut>,
    /// The URL of the folder that drawn rows are written to, and the table's name there. `None` in a pass
    /// that only counts.
    pub to: Option<(String, String)>,
}

impl Pass {
    /// Returns table `drawn` with the sums of each stratum as notes or, in a pass that only counts, the
    /// tallies as notes.
    pub async fn perform(self, worker: &Worker, bar: &Bar) -> Result<Output> {
        let from = worker.stores.open(&self.from)?;
        let to = self.to.as_ref().map(|(url, name)| Ok::<_, Error>((worker.stores.open(url)?, name.clone())));
        let (to, stop, bar) = (to.transpose()?, worker.stop.clone(), bar.clone());
        // a task of its own, so that others run in parallel; it is cancelled when whoever waits for it is
        // dropped
        let work = SpawnedTask::spawn(async move {
            let mut output = Output::default();
            match to {
                Some((folder, name)) => {
                    let (table, sums) = self.draw(from, &folder, &name, &stop, &bar).await?;
                    output.table("drawn", table);
                    output.notes = answer(&sums);
                }
                None => {
                    let tallies = self.count(from, &stop, &bar).await?;
                    output.notes = answer(&tallies);
                }
            }
            Ok(output)
        });
        work.join().await.expect("a pass does not panic")
    }

    /// Counts, and returns a tally for each cut.
    async fn count(&self, from: Location, stop: &AtomicBool, bar: &Bar) -> Result<Vec<Tally>> {
        let mut tallies: Vec<Tally> = self.cuts.iter().map(Cut::tally).collect();
        let mut batches = std::pin::pin!(scan(from, self.mixture.clone(), None));
        while let Some(batch) = batches.try_next().await? {
            check_stop(stop)?;
            self.each_copy(&batch, |cut, _, rank, length| tallies[cut].add(&self.cuts[cut], rank, length))?;
            bar.add(0, batch.num_rows() as u64, 0, 0);
            tokio::task::yield_now().await;
        }
        Ok(tallies)
    }

    /// Writes table `drawn`, and returns the sums of each cut's stratum.
    async fn draw(
        &self,
        from: Location,
        folder: &Location,
        name: &str,
        stop: &AtomicBool,
        bar: &Bar,
    ) -> Result<(Table, Vec<Stratum>)> {
        let mut writer = TableWriter::new(folder, name, tables::drawn());
        let mut sums = nothing_drawn(&self.cuts);
        let mut batches = std::pin::pin!(scan(from, self.mixture.clone(), None));
        while let Some(batch) = batches.try_next().await? {
            check_stop(stop)?;
            let mut rows = DrawnRows::new();
            self.each_copy(&batch, |cut, span, rank, length| {
                let tokens = self.cuts[cut].drawn(rank, length);
                if tokens == 0 {
                    return;
                }
                let sum = &mut sums[cut];
                sum.spans += 1;
                sum.budget += tokens as u64;
                sum.by_length[tables::length_bucket(span.tokens)] += tokens as u64;
                if rank.copy == 0 {
                    sum.available += length as u64;
                }
                if span.tokens > self.terms.long_tokens as i64 {
                    sum.long += tokens as u64;
                }
                rows.push(span, rank.copy, tokens);
            })?;
            writer.write(rows.finish()).await?;
            bar.add(0, batch.num_rows() as u64, 0, 0);
        }
        Ok((writer.finish().await?, sums))
    }

    /// Calls `each` with every copy of every span of a batch, in the mixture's order: the index of its cut,
    /// its span, its rank, and its length in tokens.
    fn each_copy(
        &self,
        batch: &RecordBatch,
        mut each: impl FnMut(usize, &Span<'_>, Rank, i64),
    ) -> Result<()> {
        let ids: &FixedSizeBinaryArray = column(batch, "doc_id")?;
        let starts: &Int64Array = column(batch, "start")?;
        let stops: &Int64Array = column(batch, "stop")?;
        let copies: &Float64Array = column(batch, "copies")?;
        let strata: &StringArray = column(batch, "stratum")?;
        let domains: &StringArray = column(batch, "domain")?;
        let tokens: &Int64Array = column(batch, "tokens")?;
        for row in 0..batch.num_rows() {
            let doc_id: &[u8; 16] = ids.value(row).try_into().expect("16 bytes");
            let span = Span {
                doc_id,
                start: starts.value(row),
                stop: stops.value(row),
                copies: (copies.value(row) * ONE as f64) as u64,
                stratum: strata.value(row),
                domain: domains.value(row),
                tokens: tokens.value(row),
            };
            let name = (span.domain, span.stratum);
            // cuts are sorted by domain and stratum, as the strata of the mixture are
            let cut = self.cuts.binary_search_by_key(&name, |cut| (&cut.domain, &cut.stratum));
            let cut = cut.map_err(|_| Error::Unbalanced {
                stage: "draw",
                message: format!("the mixture has no budget for {}/{}", span.domain, span.stratum),
            })?;
            let u = unit_hash("draw", self.terms.seed, doc_id, span.start as u64, 0);
            for copy in 0..self.terms.max_copies {
                let rank = Rank { key: key(u, copy, span.copies), doc_id: *doc_id, start: span.start, copy };
                each(cut, &span, rank, span.stop - span.start);
            }
        }
        Ok(())
    }
}

/// Empty sums for the stratum of each cut.
pub fn nothing_drawn(cuts: &[Cut]) -> Vec<Stratum> {
    let nothing = |cut: &Cut| {
        let (domain, stratum) = (cut.domain.clone(), cut.stratum.clone());
        Stratum {
            domain,
            stratum,
            by_length: vec![0; tables::LENGTH_BUCKET_NAMES.len()],
            ..Default::default()
        }
    };
    cuts.iter().map(nothing).collect()
}

/// A pass's result as notes. It is JSON in a string, because a tree of JSON values would take ten times the
/// memory of a tally's numbers.
pub fn answer(value: &impl Serialize) -> Value {
    serde_json::to_string(value).expect("plain numbers").into()
}

/// Reads a pass's result from its notes.
///
/// # Errors
/// [`Error::Unbalanced`] if the notes are not those of a pass.
pub fn read<T: DeserializeOwned>(notes: &Value) -> Result<T> {
    serde_json::from_str(notes.as_str().unwrap_or_default()).map_err(|e| Error::Unbalanced {
        stage: "draw",
        message: format!("a task's answer is not that of a pass: {e}"),
    })
}

/// Builds rows of table `drawn`.
struct DrawnRows {
    doc_id: FixedSizeBinaryBuilder,
    start: Int64Builder,
    stop: Int64Builder,
    copy: Int32Builder,
    stratum: StringBuilder,
    domain: StringBuilder,
    tokens: Int64Builder,
}

impl DrawnRows {
    fn new() -> Self {
        let (start, stop, copy, stratum, domain, tokens) = Default::default();
        Self { doc_id: FixedSizeBinaryBuilder::new(16), start, stop, copy, stratum, domain, tokens }
    }

    fn push(&mut self, span: &Span<'_>, copy: u32, length: i64) {
        self.doc_id.append_value(span.doc_id).expect("16 bytes");
        self.start.append_value(span.start);
        self.stop.append_value(span.start + length);
        self.copy.append_value(copy as i32);
        self.stratum.append_value(span.stratum);
        self.domain.append_value(span.domain);
        self.tokens.append_value(span.tokens);
    }

    fn finish(mut self) -> RecordBatch {
        tables::rows(
            tables::drawn(),
            [
                ("doc_id", Arc::new(self.doc_id.finish())),
                ("start", Arc::new(self.start.finish())),
                ("stop", Arc::new(self.stop.finish())),
                ("copy", Arc::new(self.copy.finish())),
                ("stratum", Arc::new(self.stratum.finish())),
                ("domain", Arc::new(self.domain.finish())),
                ("tokens", Arc::new(self.tokens.finish())),
            ],
        )
    }
}

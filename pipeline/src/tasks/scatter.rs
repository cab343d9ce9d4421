//! scatter: copies the drawn ids of a part into the order of the output files.

use std::sync::Arc;

use arrow::array::{Array, FixedSizeBinaryArray, Int32Array, Int64Array, ListArray, RecordBatch};
use futures::{Stream, StreamExt};
use hashbrown::HashMap;
use serde::{Deserialize, Serialize};

use super::Worker;
use crate::hash::RowDigest;
use crate::output::{Output, Table};
use crate::sql::engine::{put_file, scan};
use crate::tables::column;
use crate::{Error, Result, tables};

/// What to copy out of one part: tokens `[start, stop)` of documents, in the order of the output.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Wanted {
    pub part: i64,
    pub pieces: Vec<([u8; 16], i64, i64)>,
    /// For each output file that takes tokens of this part: its number, where its tokens begin in the copy,
    /// and how many there are.
    pub ranges: Vec<(i32, i64, i64)>,
}

impl Wanted {
    /// Groups a plan that is sorted by `part, file, at` into parts. Calls `each` with every part once it is
    /// complete.
    pub async fn gather(
        mut plan: impl Stream<Item = Result<RecordBatch>> + Unpin,
        mut each: impl AsyncFnMut(Wanted) -> Result<()>,
    ) -> Result<()> {
        let mut wanted: Option<Wanted> = None;
        while let Some(batch) = plan.next().await {
            let batch = batch?;
            let parts: &Int64Array = column(&batch, "part")?;
            let files: &Int32Array = column(&batch, "file")?;
            let ids: &FixedSizeBinaryArray = column(&batch, "doc_id")?;
            let starts: &Int64Array = column(&batch, "start")?;
            let stops: &Int64Array = column(&batch, "stop")?;
            for row in 0..batch.num_rows() {
                let (part, file) = (parts.value(row), files.value(row));
                let (start, stop) = (starts.value(row), stops.value(row));
                if let Some(done) = wanted.take_if(|wanted| wanted.part != part) {
                    each(done).await?;
                }
                let wanted = wanted.get_or_insert_with(|| Wanted { part, ..Default::default() });
                wanted.pieces.push((ids.value(row).try_into().expect("16 bytes"), start, stop));
                match wanted.ranges.last_mut() {
                    Some(range) if range.0 == file => range.2 += stop - start,
                    last => {
                        let begin = last.map_or(0, |range| range.1 + range.2);
                        wanted.ranges.push((file, begin, stop - start));
                    }
                }
            }
        }
        match wanted {
            Some(wanted) => each(wanted).await,
            None => Ok(()),
        }
    }

    /// Copies the wanted tokens out of a part's table of ids (`doc_id, chunk, ids`), as little-endian numbers
    /// of two bytes, or of four if the ids need them.
    ///
    /// # Errors
    /// [`Error::Unbalanced`] if the table does not have all wanted tokens.
    pub fn copy(&self, batches: impl Iterator<Item = Result<RecordBatch>>) -> Result<Vec<u8>> {
        let mut places: HashMap<[u8; 16], Vec<(i64, i64, usize)>> = HashMap::new();
        let mut tokens = 0;
        for (doc_id, start, stop) in &self.pieces {
            places.entry(*doc_id).or_default().push((*start, *stop, tokens));
            tokens += (stop - start) as usize;
        }
        let (mut out, mut copied) = (Vec::new(), 0);
        for batch in batches {
            let batch = batch?;
            let ids: &FixedSizeBinaryArray = column(&batch, "doc_id")?;
            let chunks: &Int32Array = column(&batch, "chunk")?;
            let lists: &ListArray = column(&batch, "ids")?;
            let values = lists.values().to_data();
            let bytes = values.buffers()[0].as_slice();
            let width = values.data_type().primitive_width().unwrap_or(2);
            let shift = values.offset();
            out.resize(tokens * width, 0);
            for row in 0..batch.num_rows() {
                let Some(places) = places.get(ids.value(row)) else { continue };
                let first = chunks.value(row) as i64 * tables::CHUNK_IDS as i64;
                let (from, to) =
                    (lists.value_offsets()[row] as usize, lists.value_offsets()[row + 1] as usize);
                let last = first + (to - from) as i64;
                for (start, stop, at) in places {
                    let (low, high) = ((*start).max(first), (*stop).min(last));
                    if low >= high {
                        continue;
                    }
                    let length = (high - low) as usize * width;
                    let source = (shift + from + (low - first) as usize) * width;
                    let target = (at + (low - start) as usize) * width;
                    out[target..target + length].copy_from_slice(&bytes[source..source + length]);
                    copied += (high - low) as usize;
                }
            }
        }
        if copied != tokens {
            let message = format!("part {:016x} gave {copied} tokens of {tokens}", self.part);
            return Err(Error::Unbalanced { stage: "shuffle", message });
        }
        Ok(out)
    }

    /// The name of the file of copied ids, without its ending.
    pub fn name(&self) -> String {
        format!("ids-{:016x}", self.part)
    }

    /// The rows of table `ranges` for this part.
    pub fn ranges_batch(&self) -> RecordBatch {
        let files = Int32Array::from_iter_values(self.ranges.iter().map(|r| r.0));
        let parts = Int64Array::from_iter_values(self.ranges.iter().map(|_| self.part));
        let begins = Int64Array::from_iter_values(self.ranges.iter().map(|r| r.1));
        let counts = Int64Array::from_iter_values(self.ranges.iter().map(|r| r.2));
        tables::rows(
            tables::ranges(),
            [
                ("file", Arc::new(files)),
                ("part", Arc::new(parts)),
                ("begin", Arc::new(begins)),
                ("tokens", Arc::new(counts)),
            ],
        )
    }

    /// The name of a job that copies exactly these pieces. It contains a hash of them.
    pub fn job(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for (doc_id, start, stop) in &self.pieces {
            hasher.update(doc_id).update(&start.to_le_bytes()).update(&stop.to_le_bytes());
        }
        format!("{}-{}", self.name(), &hasher.finalize().to_hex()[..16])
    }
}

/// A task that copies a part's wanted ids into one file.
#[derive(Debug, Serialize, Deserialize)]
pub struct Scatter {
    pub wanted: Wanted,
    /// The URL of the folder that has the part's table of ids, `ids`.
    pub from: String,
    pub ids: Table,
    pub folder: String,
}

impl Scatter {
    /// Writes the file as table `ids`, whose rows are ids.
    pub async fn perform(self, worker: &Worker) -> Result<Output> {
        let Self { wanted, from, ids, folder } = self;
        let name = format!("{}.bin", wanted.name());
        let count = wanted.pieces.iter().map(|piece| (piece.2 - piece.1) as u64).sum();
        let batches: Vec<_> = scan(worker.stores.open(&from)?, ids, None).collect().await;
        let copying = tokio::task::spawn_blocking(move || wanted.copy(batches.into_iter()));
        let copied = copying.await.expect("copying does not panic")?;
        let file = put_file(&worker.stores.open(&folder)?, &name, copied, count).await?;
        let first = u128::from_le_bytes(file.blake3.0[..16].try_into().expect("16 of 32 bytes"));
        let mut output = Output::default();
        output.table("ids", Table { rows: count, digest: RowDigest(first), files: vec![file] });
        Ok(output)
    }
}

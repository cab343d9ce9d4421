//! shuffle: gives every drawn span its place in the packed dataset, and moves its ids near that place.
//!
//! First it makes a plan from metadata alone: drawn spans in training order, laid end to end
//! ([`Mode::Concat`](crate::conf::Mode::Concat)) or fitted into sequences
//! ([`Mode::BestFit`](crate::conf::Mode::BestFit)). The scatter follows: each part's ids are read once, and
//! those that were drawn are written to one file, in the order of the output files. Packing an output file
//! then reads one range per part.

use std::sync::Arc;

use arrow::array::{
    BooleanBuilder, FixedSizeBinaryArray, FixedSizeBinaryBuilder, Int32Builder, Int64Array, Int64Builder,
    RecordBatch, StringArray, StringBuilder,
};
use futures::{Stream, StreamExt, TryStreamExt};
use hashbrown::{HashMap, HashSet};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::tokens::Tokens;
use crate::algorithms::sequences::{Fragment, Layout, Planner, Sequence};
use crate::output::{Output, Published, Table};
use crate::run::{Run, ingredients};
use crate::sql::engine::{TableWriter, query, stream};
use crate::sql::functions::hashes;
use crate::stage::Stage;
use crate::storage::Location;
use crate::tables::column;
use crate::tasks::Task;
use crate::tasks::scatter::{Scatter, Wanted};
use crate::{Error, Result, tables};

/// What became of the tokens of a domain.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, JsonSchema)]
pub struct Placed {
    /// The domain.
    pub domain: String,
    /// How many of its tokens are in sequences.
    pub packed: u64,
    /// How many are left over: the last, incomplete sequence is no part of the dataset.
    pub dropped: u64,
}

/// What the plan came to.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, JsonSchema)]
pub struct Planned {
    /// How many sequences there are.
    pub sequences: u64,
    /// How many files they are in.
    pub files: u64,
    /// How many ids fill up sequences and belong to no document (best fit).
    pub padding: u64,
    /// What became of each domain's tokens.
    pub domains: Vec<Placed>,
}

/// Plans the dataset from drawn spans in training order, and writes the plan of each output file. `seen` gets
/// the number of rows of each batch, for progress.
pub async fn plan(
    layout: Layout,
    mut spans: impl Stream<Item = Result<RecordBatch>> + Unpin,
    folder: &Location,
    mut seen: impl FnMut(u64),
) -> Result<(Table, Planned)> {
    let mut planner = Planner::new(layout);
    let mut writer = PlanWriter::new(layout, folder);
    let mut domains: HashSet<Arc<str>> = HashSet::new();
    while let Some(batch) = spans.next().await {
        let batch = batch?;
        let ids: &FixedSizeBinaryArray = column(&batch, "doc_id")?;
        let starts: &Int64Array = column(&batch, "start")?;
        let stops: &Int64Array = column(&batch, "stop")?;
        let names: &StringArray = column(&batch, "domain")?;
        let lengths: &Int64Array = column(&batch, "tokens")?;
        let parts: &Int64Array = column(&batch, "part")?;
        for row in 0..batch.num_rows() {
            let name = names.value(row);
            let domain = domains.get_or_insert_with(name, |name| name.into()).clone();
            let (start, stop, tokens) = (starts.value(row), stops.value(row), lengths.value(row));
            planner.push(Fragment {
                doc_id: ids.value(row).try_into().expect("16 bytes"),
                domain,
                part: parts.value(row),
                start,
                stop,
                bos: layout.bos && start == 0,
                eos: layout.eos && stop == tokens,
            });
            while let Some(sequence) = planner.pop() {
                writer.write(&sequence).await?;
            }
        }
        seen(batch.num_rows() as u64);
    }
    let dropped = planner.finish();
    while let Some(sequence) = planner.pop() {
        writer.write(&sequence).await?;
    }
    for fragment in &dropped {
        writer.account(fragment).dropped += (fragment.stop - fragment.start) as u64;
    }
    writer.finish().await
}

struct PlanWriter {
    layout: Layout,
    folder: Location,
    /// The output file being planned, and the next position in it, in ids.
    file: usize,
    at: usize,
    rows: PlanRows,
    table: Table,
    planned: Planned,
    domains: HashMap<Arc<str>, Placed>,
}

impl PlanWriter {
    fn new(layout: Layout, folder: &Location) -> Self {
        let (rows, table, planned, domains) = Default::default();
        Self { layout, folder: folder.clone(), file: 0, at: 0, rows, table, planned, domains }
    }

    fn account(&mut self, fragment: &Fragment) -> &mut Placed {
        self.domains
            .entry_ref(&fragment.domain)
            .or_insert_with(|| Placed { domain: fragment.domain.to_string(), ..Default::default() })
    }

    async fn write(&mut self, sequence: &Sequence) -> Result<()> {
        let begin = self.at;
        for fragment in &sequence.fragments {
            self.account(fragment).packed += (fragment.stop - fragment.start) as u64;
            self.rows.push(self.file, self.at, false, fragment);
            self.at += fragment.ids();
        }
        self.planned.padding += (begin + self.layout.sequence_tokens - self.at) as u64;
        self.planned.sequences += 1;
        self.at = begin + self.layout.sequence_tokens;
        if let Some(label) = &sequence.label {
            self.rows.push(self.file, self.at, true, label);
        }
        if self.at == self.layout.sequence_tokens * self.layout.sequences_per_file {
            self.close().await?;
        }
        Ok(())
    }

    async fn close(&mut self) -> Result<()> {
        let mut writer = TableWriter::new(&self.folder, &format!("plan-{:05}", self.file), tables::plan());
        writer.write(std::mem::take(&mut self.rows).finish()).await?;
        self.table.extend(writer.finish().await?);
        (self.file, self.at) = (self.file + 1, 0);
        Ok(())
    }

    async fn finish(mut self) -> Result<(Table, Planned)> {
        if self.at > 0 {
            self.close().await?;
        }
        self.planned.files = self.file as u64;
        self.planned.domains = self.domains.into_values().collect();
        self.planned.domains.sort_by(|a, b| a.domain.cmp(&b.domain));
        Ok((self.table, self.planned))
    }
}

/// Builds rows of table `plan`.
struct PlanRows {
    file: Int32Builder,
    at: Int64Builder,
    label: BooleanBuilder,
    doc_id: FixedSizeBinaryBuilder,
    domain: StringBuilder,
    start: Int64Builder,
    stop: Int64Builder,
    bos: BooleanBuilder,
    eos: BooleanBuilder,
    part: Int64Builder,
}

impl Default for PlanRows {
    fn default() -> Self {
        let (file, at, label, domain, start, stop, bos, eos, part) = Default::default();
        let doc_id = FixedSizeBinaryBuilder::new(16);
        Self { file, at, label, doc_id, domain, start, stop, bos, eos, part }
    }
}

impl PlanRows {
    fn push(&mut self, file: usize, at: usize, label: bool, fragment: &Fragment) {
        self.file.append_value(file as i32);
        self.at.append_value(at as i64);
        self.label.append_value(label);
        self.doc_id.append_value(fragment.doc_id).expect("16 bytes");
        self.domain.append_value(&fragment.domain);
        self.start.append_value(fragment.start);
        self.stop.append_value(fragment.stop);
        self.bos.append_value(fragment.bos);
        self.eos.append_value(fragment.eos);
        self.part.append_value(fragment.part);
    }

    fn finish(mut self) -> RecordBatch {
        tables::rows(
            tables::plan(),
            [
                ("file", Arc::new(self.file.finish())),
                ("at", Arc::new(self.at.finish())),
                ("label", Arc::new(self.label.finish())),
                ("doc_id", Arc::new(self.doc_id.finish())),
                ("domain", Arc::new(self.domain.finish())),
                ("start", Arc::new(self.start.finish())),
                ("stop", Arc::new(self.stop.finish())),
                ("bos", Arc::new(self.bos.finish())),
                ("eos", Arc::new(self.eos.finish())),
                ("part", Arc::new(self.part.finish())),
            ],
        )
    }
}

/// Tables `plan`, `ids` (raw numbers, one file per part) and `ranges`. The notes are the plan's totals, as
/// [`Planned`].
pub async fn obtain(
    run: &Run,
    tokens: &Tokens,
    catalog: &Published,
    drawn: &Drawn,
    layout: Layout,
) -> Result<Published> {
    let sql = run.stage_sql("shuffle")?;
    let seed = run.conf.run.seed as i64;
    // a part's number is a hash of its unit's key, so `parts` says which ids are there and with which
    // encoding
    let list = ingredients(
        Stage::Shuffle,
        [
            ("drawn", drawn.digest()),
            ("parts", json!(tokens.parts_digest())),
            ("sql", json!(sql.key)),
            ("seed", json!(seed)),
            ("layout", json!(layout)),
        ],
    );
    run.obtain(Stage::Shuffle, list, async |draft| {
        let session = run.engine.merging_session();
        hashes::register(&session);
        let table = catalog.table("catalog");
        run.engine
            .register(&session, "catalog", tables::catalog(), &[(&catalog.folder, &table)], &["doc_id"])
            .await?;
        run.engine
            .register(&session, "drawn", tables::drawn(), &[(&drawn.folder, &drawn.table)], &["doc_id"])
            .await?;
        let failed = |e| query("cannot put the drawn spans in order", e);
        let rows =
            sql.plan(&session, &[("seed", seed)].into()).await?.execute_stream().await.map_err(failed)?;
        let bar = run.progress.stage("shuffle", 2 * drawn.table.rows);
        let (table, planned) =
            plan(layout, rows.map_err(failed), &draft.folder, |rows| bar.add(rows, 0, 0, 0)).await?;
        check(&planned, drawn.tokens)?;
        if planned.sequences == 0 {
            let message =
                format!("{} tokens do not fill one sequence of {}", drawn.tokens, layout.sequence_tokens);
            return Err(Error::data(message, "raise `mixture.budget` or lower `pack.sequence_tokens`"));
        }

        let mut output = Output::default();
        output.count("sequences", planned.sequences);
        output.count("files", planned.files);
        output.count("padding", planned.padding);
        let session = run.engine.session();
        run.engine.register(&session, "plan", tables::plan(), &[(&draft.folder, &table)], &[]).await?;
        output.table("plan", table);
        output.notes = serde_json::to_value(&planned).expect("plain numbers");
        let in_parts = "select part, file, doc_id, start, stop, at, label from plan where start < stop \
            order by part, file, at, label desc, doc_id, start";
        let rows = stream(&session, "cannot sort the plan by parts", in_parts).await?;
        let rows = rows.map_err(|e| query("cannot sort the plan by parts", e));
        let mut ranges = TableWriter::new(&draft.folder, "ranges", tables::ranges());
        let mut jobs = futures::stream::FuturesUnordered::new();
        Wanted::gather(rows, async |wanted| {
            ranges.write(wanted.ranges_batch()).await?;
            if jobs.len() >= run.executor.tasks_at_a_time()
                && let Some(done) = jobs.next().await
            {
                output.merge(done?);
            }
            run.check_stop()?;
            let bar = bar.clone();
            let (from, ids) = tokens.ids(wanted.part)?;
            jobs.push(async move {
                let (pieces, job) = (wanted.pieces.len() as u64, wanted.job());
                let task = Scatter { wanted, from: from.url(), ids, folder: draft.folder.url() };
                let done = draft.job(&job, run.executor.perform(Task::Scatter(task), &bar)).await;
                bar.add(pieces, 0, 0, 0);
                done
            });
            Ok(())
        })
        .await?;
        while let Some(done) = jobs.next().await {
            output.merge(done?);
        }
        output.table("ranges", ranges.finish().await?);
        // jobs end in any order, but the manifest must not depend on it
        if let Some(ids) = output.tables.get_mut("ids") {
            ids.files.sort_by(|a, b| a.name.cmp(&b.name));
        }
        Ok(output)
    })
    .await
}

/// The spans that go into a dataset: table `drawn`, or another one with its columns.
pub struct Drawn {
    pub folder: Location,
    pub table: Table,
    pub tokens: u64,
}

impl Drawn {
    fn digest(&self) -> serde_json::Value {
        json!(self.table.digest)
    }
}

/// Checks that every drawn token is packed or dropped.
///
/// # Errors
/// [`Error::Unbalanced`] if the sums differ.
pub fn check(planned: &Planned, drawn: u64) -> Result<()> {
    let placed: u64 = planned.domains.iter().map(|d| d.packed + d.dropped).sum();
    if placed != drawn {
        let message = format!("{drawn} tokens were drawn, {placed} were packed or dropped");
        return Err(Error::Unbalanced { stage: "shuffle", message });
    }
    Ok(())
}

//! shuffle: every drawn span gets its place in the packed dataset, and its ids travel near it.
//!
//! First a plan, made of metadata only: drawn spans in the order of training, laid end to end ([`Mode::Concat`]) or
//! fitted into sequences ([`Mode::BestFit`]). Then a scatter: each part's ids are read once, and what was drawn of them
//! is written as one file, in the order of the output files, so that packing an output file reads one range a part.

use std::collections::VecDeque;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanBuilder, FixedSizeBinaryBuilder, Int32Array, Int32Builder, Int64Array,
    Int64Builder, RecordBatch, StringBuilder,
};
use arrow::datatypes::{Int32Type, Int64Type};
use futures::{Stream, StreamExt, TryStreamExt};
use hashbrown::{HashMap, HashSet};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::places;
use super::tokens::Tokens;
use crate::conf::Mode;
use crate::engine::{TableWriter, put_file, query, scan, stream};
use crate::hash::RowDigest;
use crate::run::{Run, Stage, ingredients};
use crate::stage::{Output, Published, Table};
use crate::store::Location;
use crate::task::{Task, Worker};
use crate::{Error, Result, tables};

pub const VERSION: u32 = 1;

/// How sequences are laid out.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Layout {
    pub sequence_tokens: usize,
    pub sequences_per_file: usize,
    pub mode: Mode,
    /// Whether a token goes before, and after, every document.
    pub bos: bool,
    pub eos: bool,
}

/// A run of ids in the packed dataset: BOS if any, tokens `[start, stop)` of a document, EOS if any.
#[derive(Clone, Debug, PartialEq)]
pub struct Fragment {
    pub doc_id: [u8; 16],
    pub domain: Arc<str>,
    pub part: i64,
    pub start: i64,
    pub stop: i64,
    pub bos: bool,
    pub eos: bool,
}

impl Fragment {
    /// How many ids it fills.
    pub fn ids(&self) -> usize {
        (self.stop - self.start) as usize + self.bos as usize + self.eos as usize
    }

    /// Cuts off the first `ids` ids.
    fn take(&mut self, ids: usize) -> Fragment {
        let mut head = self.clone();
        if ids >= self.ids() {
            (self.start, self.bos, self.eos) = (self.stop, false, false);
            return head;
        }
        if ids == 0 {
            head = Fragment { stop: self.start, bos: false, eos: false, ..head };
            return head;
        }
        // fewer than all ids, so EOS stays behind, and BOS goes first
        head.eos = false;
        head.stop = self.start + (ids - self.bos as usize) as i64;
        (self.start, self.bos) = (head.stop, false);
        head
    }
}

/// A sequence being planned: fragments that tile it from the left, and the fragment whose one id follows it.
#[derive(Debug, PartialEq)]
pub struct Sequence {
    pub fragments: Vec<Fragment>,
    pub label: Option<Fragment>,
}

/// Lays fragments out in sequences, in the order they come.
pub struct Planner {
    layout: Layout,
    /// concat: the sequence being filled; best fit: the window being gathered.
    open: Vec<Fragment>,
    open_ids: usize,
    /// concat: a full sequence that waits for the id after it.
    full: Option<Vec<Fragment>>,
    /// Sequences that are ready.
    ready: VecDeque<Sequence>,
}

/// Best fit works on so many sequences' worth of fragments at a time: enough to fill them well, little enough to
/// keep the order of training.
const WINDOW_SEQUENCES: usize = 256;
const WINDOW_FRAGMENTS: usize = 65_536;

impl Planner {
    pub fn new(layout: Layout) -> Self {
        Self { layout, open: vec![], open_ids: 0, full: None, ready: VecDeque::new() }
    }

    /// Adds the next fragment of the training order.
    pub fn push(&mut self, mut fragment: Fragment) {
        if fragment.ids() == 0 {
            return;
        }
        let size = self.layout.sequence_tokens;
        if self.layout.mode == Mode::BestFit {
            // only what is longer than a sequence is cut; the pieces know the id that follows them
            while fragment.ids() > size {
                let head = fragment.take(size);
                self.ready
                    .push_back(Sequence { fragments: vec![head], label: Some(fragment.clone().take(1)) });
            }
            self.open_ids += fragment.ids();
            self.open.push(fragment);
            if self.open_ids >= WINDOW_SEQUENCES * size || self.open.len() >= WINDOW_FRAGMENTS {
                self.fit();
            }
            return;
        }
        while fragment.ids() > 0 {
            if let Some(fragments) = self.full.take() {
                self.ready.push_back(Sequence { fragments, label: Some(fragment.clone().take(1)) });
            }
            let head = fragment.take(size - self.open_ids);
            self.open_ids += head.ids();
            self.open.push(head);
            if self.open_ids == size {
                self.full = Some(std::mem::take(&mut self.open));
                self.open_ids = 0;
            }
        }
    }

    /// Says that no fragment follows; returns what did not fill a sequence.
    pub fn finish(&mut self) -> Vec<Fragment> {
        if self.layout.mode == Mode::BestFit {
            self.fit();
            return vec![];
        }
        if let Some(fragments) = self.full.take() {
            let label = self.open.first().map(|fragment| fragment.clone().take(1));
            self.ready.push_back(Sequence { fragments, label });
        }
        self.open_ids = 0;
        std::mem::take(&mut self.open)
    }

    /// The next sequence that is ready.
    pub fn pop(&mut self) -> Option<Sequence> {
        self.ready.pop_front()
    }

    /// Best-fit decreasing over the window: the longest fragment first, each into the fullest sequence it fits.
    fn fit(&mut self) {
        let window = std::mem::take(&mut self.open);
        self.open_ids = 0;
        let mut by_length: Vec<usize> = (0..window.len()).collect();
        by_length.sort_by_key(|i| (std::cmp::Reverse(window[*i].ids()), *i));
        let mut sequences: Vec<Vec<usize>> = vec![];
        let mut rooms: std::collections::BTreeSet<(usize, usize)> = Default::default();
        for i in by_length {
            let ids = window[i].ids();
            let fits = rooms.range((ids, 0)..).next().copied();
            let (room, sequence) = fits.unwrap_or_else(|| {
                sequences.push(vec![]);
                (self.layout.sequence_tokens, sequences.len() - 1)
            });
            rooms.remove(&(room, sequence));
            sequences[sequence].push(i);
            if room > ids {
                rooms.insert((room - ids, sequence));
            }
        }
        // back to the order of training: by the fragment that came first
        sequences.iter_mut().for_each(|sequence| sequence.sort_unstable());
        sequences.sort_unstable();
        let mut window: Vec<Option<Fragment>> = window.into_iter().map(Some).collect();
        for sequence in sequences {
            let fragments = sequence.into_iter().map(|i| window[i].take().expect("placed once")).collect();
            self.ready.push_back(Sequence { fragments, label: None });
        }
    }
}

/// What became of the tokens of a domain.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Placed {
    pub domain: String,
    pub packed: u64,
    /// Tokens of the last, incomplete sequence.
    pub dropped: u64,
}

/// What the plan came to.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Planned {
    pub sequences: u64,
    pub files: u64,
    /// Ids that fill up sequences and belong to no document (best fit).
    pub padding: u64,
    pub domains: Vec<Placed>,
}

/// Plans the dataset from drawn spans in the order of training, and writes the plan of each output file.
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
        let ids = batch.column(0).as_fixed_size_binary();
        let numbers = |i: usize| batch.column(i).as_primitive::<Int64Type>();
        let names = batch.column(3).as_string::<i32>();
        for row in 0..batch.num_rows() {
            let name = names.value(row);
            let domain = domains.get_or_insert_with(name, |name| name.into()).clone();
            let (start, stop, tokens) = (numbers(1).value(row), numbers(2).value(row), numbers(4).value(row));
            planner.push(Fragment {
                doc_id: ids.value(row).try_into().expect("16 bytes"),
                domain,
                part: numbers(5).value(row),
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
    /// The output file being planned, and its next position.
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

/// Rows of `plan` being made.
struct PlanRows {
    file: Int32Builder,
    doc_id: FixedSizeBinaryBuilder,
    domain: StringBuilder,
    /// at, start, stop, part
    numbers: [Int64Builder; 4],
    /// label, bos, eos
    flags: [BooleanBuilder; 3],
}

impl Default for PlanRows {
    fn default() -> Self {
        let (file, domain, numbers, flags) = Default::default();
        Self { file, doc_id: FixedSizeBinaryBuilder::new(16), domain, numbers, flags }
    }
}

impl PlanRows {
    fn push(&mut self, file: usize, at: usize, label: bool, fragment: &Fragment) {
        self.file.append_value(file as i32);
        self.doc_id.append_value(fragment.doc_id).expect("16 bytes");
        self.domain.append_value(&fragment.domain);
        let numbers = [at as i64, fragment.start, fragment.stop, fragment.part];
        self.numbers.iter_mut().zip(numbers).for_each(|(column, n)| column.append_value(n));
        let flags = [label, fragment.bos, fragment.eos];
        self.flags.iter_mut().zip(flags).for_each(|(column, flag)| column.append_value(flag));
    }

    fn finish(mut self) -> RecordBatch {
        let [at, start, stop, part] =
            self.numbers.each_mut().map(|column| Arc::new(column.finish()) as ArrayRef);
        let [label, bos, eos] = self.flags.each_mut().map(|column| Arc::new(column.finish()) as ArrayRef);
        let (file, doc_id) = (Arc::new(self.file.finish()), Arc::new(self.doc_id.finish()));
        let domain = Arc::new(self.domain.finish());
        let columns: Vec<ArrayRef> = vec![file, at, label, doc_id, domain, start, stop, bos, eos, part];
        RecordBatch::try_new(tables::plan(), columns).expect("columns as the table has them")
    }
}

/// What to copy out of one part: tokens `[start, stop)` of documents, in the order of the output.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Wanted {
    pub part: i64,
    pub pieces: Vec<([u8; 16], i64, i64)>,
    /// For each output file that takes something: its number, where its tokens begin, how many they are.
    pub ranges: Vec<(i32, i64, i64)>,
}

impl Wanted {
    /// Groups a plan that is sorted by `part, file, at` into parts. Calls `each` with every part that is complete.
    pub async fn gather(
        mut plan: impl Stream<Item = Result<RecordBatch>> + Unpin,
        mut each: impl AsyncFnMut(Wanted) -> Result<()>,
    ) -> Result<()> {
        let mut wanted: Option<Wanted> = None;
        while let Some(batch) = plan.next().await {
            let batch = batch?;
            let numbers = |i: usize| batch.column(i).as_primitive::<Int64Type>();
            let files = batch.column(1).as_primitive::<Int32Type>();
            let ids = batch.column(2).as_fixed_size_binary();
            for row in 0..batch.num_rows() {
                let (part, file) = (numbers(0).value(row), files.value(row));
                let (start, stop) = (numbers(3).value(row), numbers(4).value(row));
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

    /// Copies the wanted tokens out of a part's table of ids (`doc_id, chunk, ids`), as little-endian numbers of
    /// two bytes, or four where the ids need them.
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
            let ids = batch.column(0).as_fixed_size_binary();
            let chunks = batch.column(1).as_primitive::<Int32Type>();
            let lists = batch.column(2).as_list::<i32>();
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

    /// The name of the file of ids.
    pub fn name(&self) -> String {
        format!("ids-{:016x}", self.part)
    }

    fn ranges_batch(&self) -> RecordBatch {
        let files = Int32Array::from_iter_values(self.ranges.iter().map(|r| r.0));
        let parts = Int64Array::from_iter_values(self.ranges.iter().map(|_| self.part));
        let begins = Int64Array::from_iter_values(self.ranges.iter().map(|r| r.1));
        let counts = Int64Array::from_iter_values(self.ranges.iter().map(|r| r.2));
        let columns: Vec<ArrayRef> =
            vec![Arc::new(files), Arc::new(parts), Arc::new(begins), Arc::new(counts)];
        RecordBatch::try_new(tables::ranges(), columns).expect("columns as the table has them")
    }

    /// Names a job that copies just this.
    pub fn job(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for (doc_id, start, stop) in &self.pieces {
            hasher.update(doc_id).update(&start.to_le_bytes()).update(&stop.to_le_bytes());
        }
        format!("{}-{}", self.name(), &hasher.finalize().to_hex()[..16])
    }
}

/// Tables `plan`, `ids` (raw numbers, a file a part) and `ranges`; its notes are what was planned, as [`Planned`].
pub async fn obtain(
    run: &Run,
    tokens: &Tokens,
    catalog: &Published,
    drawn: &Drawn,
    layout: Layout,
) -> Result<Published> {
    let sql = run.stage_sql("shuffle")?;
    let seed = run.conf.run.seed as i64;
    // a part's number is a hash of its unit's key, so that `parts` says which ids lie there, and of which encoding
    let list = ingredients([
        ("version", json!(VERSION)),
        ("drawn", drawn.digest()),
        ("parts", json!(tokens.parts_digest())),
        ("sql", json!(sql.key)),
        ("seed", json!(seed)),
        ("layout", json!(layout)),
    ]);
    run.obtain(Stage::Shuffle, list, async |draft| {
        let session = run.engine.merging_session();
        places::register(&session);
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
            if jobs.len() >= run.tasks_at_a_time()
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
                let done = draft.job(&job, run.perform(Task::Scatter(task), &bar)).await;
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
        // jobs end in any order
        if let Some(ids) = output.tables.get_mut("ids") {
            ids.files.sort_by(|a, b| a.name.cmp(&b.name));
        }
        Ok(output)
    })
    .await
}

/// What goes into a dataset: a table like `drawn`.
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

/// A task of the scatter: a part's wanted ids in, one file out.
#[derive(Debug, Serialize, Deserialize)]
pub struct Scatter {
    wanted: Wanted,
    /// Where the part's table of ids is, and what it is.
    from: String,
    ids: Table,
    folder: String,
}

impl Scatter {
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

/// The accounts of the plan: what was drawn is packed or dropped.
pub fn check(planned: &Planned, drawn: u64) -> Result<()> {
    let placed: u64 = planned.domains.iter().map(|d| d.packed + d.dropped).sum();
    if placed != drawn {
        let message = format!("{drawn} tokens were drawn, {placed} were packed or dropped");
        return Err(Error::Unbalanced { stage: "shuffle", message });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout(mode: Mode, bos: bool, eos: bool) -> Layout {
        Layout { sequence_tokens: 16, sequences_per_file: 3, mode, bos, eos }
    }

    fn fragments(lengths: &[(i64, i64)], layout: Layout) -> Vec<Fragment> {
        let fragment = |(i, (start, length)): (usize, &(i64, i64))| Fragment {
            doc_id: [i as u8; 16],
            domain: "d".into(),
            part: 0,
            start: *start,
            stop: start + length,
            bos: layout.bos && *start == 0,
            eos: layout.eos,
        };
        lengths.iter().enumerate().map(fragment).collect()
    }

    /// Every id as (document, position; -1 for BOS, -2 for EOS).
    fn ids(fragment: &Fragment) -> Vec<(u8, i64)> {
        let mut ids = vec![];
        ids.extend(fragment.bos.then_some(-1));
        ids.extend(fragment.start..fragment.stop);
        ids.extend(fragment.eos.then_some(-2));
        ids.into_iter().map(|at| (fragment.doc_id[0], at)).collect()
    }

    fn planned(input: &[Fragment], layout: Layout) -> (Vec<Sequence>, Vec<Fragment>) {
        let mut planner = Planner::new(layout);
        let mut sequences = vec![];
        for fragment in input {
            planner.push(fragment.clone());
            sequences.extend(std::iter::from_fn(|| planner.pop()));
        }
        let rest = planner.finish();
        sequences.extend(std::iter::from_fn(|| planner.pop()));
        (sequences, rest)
    }

    proptest! {
        #[test]
        fn concat_lays_all_ids_end_to_end_and_labels_with_the_next(
            lengths in prop::collection::vec((0i64..2, 1i64..60), 0..40), bos: bool, eos: bool,
        ) {
            let layout = layout(Mode::Concat, bos, eos);
            let input = fragments(&lengths, layout);
            let stream: Vec<_> = input.iter().flat_map(ids).collect();
            let (sequences, rest) = planned(&input, layout);
            let out: Vec<_> = sequences.iter().flat_map(|s| &s.fragments).chain(&rest).flat_map(ids).collect();
            prop_assert_eq!(&out, &stream);
            prop_assert_eq!(sequences.len(), stream.len() / 16);
            for (i, sequence) in sequences.iter().enumerate() {
                prop_assert_eq!(sequence.fragments.iter().map(Fragment::ids).sum::<usize>(), 16);
                let label = sequence.label.as_ref().map(ids);
                prop_assert_eq!(label, stream.get((i + 1) * 16).map(|id| vec![*id]));
            }
        }

        #[test]
        fn best_fit_cuts_nothing_that_fits_and_loses_nothing(
            lengths in prop::collection::vec((0i64..2, 1i64..60), 0..40), bos: bool, eos: bool,
        ) {
            let layout = layout(Mode::BestFit, bos, eos);
            let input = fragments(&lengths, layout);
            let (sequences, rest) = planned(&input, layout);
            prop_assert!(rest.is_empty());
            let mut out: Vec<_> = sequences.iter().flat_map(|s| &s.fragments).flat_map(ids).collect();
            let mut stream: Vec<_> = input.iter().flat_map(ids).collect();
            // EOS comes last in a document, whatever its number
            out.sort_by_key(|(doc, at)| (*doc, if *at == -2 { i64::MAX } else { *at }));
            stream.sort_by_key(|(doc, at)| (*doc, if *at == -2 { i64::MAX } else { *at }));
            prop_assert_eq!(out, stream);
            for sequence in &sequences {
                let filled: usize = sequence.fragments.iter().map(Fragment::ids).sum();
                prop_assert!(filled <= 16);
                // only what is longer than a sequence is cut, and then the label goes on with it
                for fragment in &sequence.fragments {
                    let whole = &input[fragment.doc_id[0] as usize];
                    prop_assert!(fragment == whole || whole.ids() > 16);
                }
                if let Some(label) = &sequence.label {
                    prop_assert_eq!(filled, 16);
                    prop_assert_eq!(label.ids(), 1);
                    prop_assert_eq!(label.doc_id, sequence.fragments[0].doc_id);
                }
            }
        }
    }
}

//! draw: whole copies of spans out of expected copies, so that every stratum meets its budget to the token.
//!
//! Copy number j of a span with expected copies c gets the key (j + u) / c, u being a hash of the span. Keys in
//! ascending order are taken until the budget is met; the last span is cut there. A key below 1 is exactly
//! `floor(c)` copies and one more with probability `frac(c)`, so the recipe's expectation is met without correction,
//! and the key where a stratum's budget ends lies near 1.
//!
//! Nothing is sorted but the few spans around that key: passes over the mixture count tokens by ranges of keys, each
//! pass inside the range that the one before found, until the range is small enough to sort. One more pass draws. The
//! tasks of a pass have some of the mixture's files each, and answer with small tallies.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use arrow::array::{
    ArrayRef, AsArray, FixedSizeBinaryBuilder, Int32Builder, Int64Builder, RecordBatch, StringBuilder,
};
use arrow::datatypes::{Float64Type, Int64Type};
use datafusion::common::runtime::SpawnedTask;
use futures::{StreamExt, TryStreamExt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::mixture::{Asked, ONE, Span, Stratum};
use crate::engine::{TableWriter, scan};
use crate::hash::unit_hash;
use crate::progress::Bar;
use crate::run::{Run, Stage, check_stop, ingredients};
use crate::stage::{Output, Published, Table};
use crate::store::Location;
use crate::task::{Task, Worker};
use crate::{Error, Result, tables};

const VERSION: u32 = 2;

/// A fixed-point key: (j + u) / c in units of 2⁻⁶⁴.
type Key = u128;

/// A copy's place among all copies of its stratum: ties of keys go by document, start and copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Rank {
    #[serde(with = "text")]
    key: Key,
    doc_id: [u8; 16],
    start: i64,
    copy: u32,
}

/// Ranges of keys that a pass tells apart, in all strata together: what a task answers stays small.
const RANGES: usize = if cfg!(test) { 1 << 6 } else { 1 << 18 };

/// More of them in one stratum would be finer than its copies.
const MOST_BITS: u32 = 14;

/// Copies that are sorted in memory, in all strata together, or else in each. Tests go through more passes.
const SORTED: u64 = if cfg!(test) { 4 } else { 1 << 15 };
const SORTED_OF_A_STRATUM: u64 = if cfg!(test) { 2 } else { 16 };

/// How many copies of each of so many strata are sorted.
fn sorted_of_each(strata: usize) -> u64 {
    (SORTED / strata.max(1) as u64).max(SORTED_OF_A_STRATUM)
}

/// A pass is at most so many tasks: each of them answers with a tally.
const TASKS: usize = 256;

fn key(u: u64, copy: u32, copies: u64) -> Key {
    (((copy as u128) << 64 | u as u128) << 32) / copies as u128
}

/// Where a stratum's budget ends.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Cut {
    domain: String,
    stratum: String,
    budget: u64,
    /// Keys from here on are in question; `below` tokens have smaller keys.
    #[serde(with = "text")]
    from: Key,
    below: u64,
    /// A pass tells 2^`bits` ranges apart, each 2^`shift` keys wide.
    bits: u32,
    shift: u32,
    /// The first range has so few copies that they can be sorted.
    few: bool,
    end: Option<End>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum End {
    /// Everything of smaller rank is taken, of this one so many tokens.
    At { last: Rank, tokens: i64 },
    /// All there is does not meet the budget.
    Everything,
}

/// What a pass finds out about a stratum.
#[derive(Debug, Serialize, Deserialize)]
enum Tally {
    /// Tokens and copies of each range, and tokens beyond the last.
    Counted { ranges: Vec<(u64, u64)>, beyond: u64 },
    /// The copies of the first range, with their lengths.
    Ranked(Vec<(Rank, i64)>),
    /// Nothing is left to be found.
    Done,
}

impl Cut {
    /// `few`: all copies of the stratum can be sorted; of the others, there are `many` strata.
    fn new(asked: &Stratum, few: bool, many: usize) -> Self {
        let nothing = End::At { last: Rank { key: 0, doc_id: [0; 16], start: 0, copy: 0 }, tokens: 0 };
        let bits = (RANGES / many.max(1)).max(2).ilog2().min(MOST_BITS);
        Self {
            domain: asked.domain.clone(),
            stratum: asked.stratum.clone(),
            budget: asked.budget,
            from: 0,
            below: 0,
            bits,
            // the first pass looks at keys from 0 to 4, or at all there are
            shift: if few { Key::BITS - 1 } else { 66 - bits },
            few,
            end: (asked.budget == 0).then_some(nothing),
        }
    }

    /// An empty tally of what is to be found next.
    fn tally(&self) -> Tally {
        match self.end {
            Some(_) => Tally::Done,
            None if self.few => Tally::Ranked(vec![]),
            None => Tally::Counted { ranges: vec![(0, 0); 1 << self.bits], beyond: 0 },
        }
    }

    /// Draws the conclusion of a pass. `sorted` copies may be sorted.
    fn conclude(&mut self, tally: Tally, sorted: u64) {
        match tally {
            Tally::Done => {}
            Tally::Counted { ranges, beyond } => {
                let mut sum = self.below;
                for (range, (tokens, copies)) in ranges.into_iter().enumerate() {
                    if sum + tokens >= self.budget {
                        self.from += (range as Key) << self.shift;
                        self.below = sum;
                        self.few = copies <= sorted || self.shift == 0;
                        if !self.few {
                            self.shift = self.shift.saturating_sub(self.bits);
                        }
                        return;
                    }
                    sum += tokens;
                }
                if sum + beyond < self.budget {
                    self.end = Some(End::Everything);
                    return;
                }
                self.from += (1 as Key) << (self.shift + self.bits);
                self.below = sum;
                self.shift += (self.bits / 2).max(1);
            }
            Tally::Ranked(mut ranked) => {
                ranked.sort_unstable();
                let mut sum = self.below;
                for (last, length) in ranked {
                    let missing = self.budget - sum;
                    if length as u64 >= missing {
                        self.end = Some(End::At { last, tokens: missing as i64 });
                        return;
                    }
                    sum += length as u64;
                }
                self.end = Some(End::Everything);
            }
        }
    }

    /// How many tokens of a copy are drawn, from its start.
    fn drawn(&self, rank: Rank, length: i64) -> i64 {
        match self.end.expect("the draw begins when every end is found") {
            End::Everything => length,
            End::At { last, tokens } => match rank.cmp(&last) {
                std::cmp::Ordering::Less => length,
                std::cmp::Ordering::Equal => tokens,
                std::cmp::Ordering::Greater => 0,
            },
        }
    }
}

impl Tally {
    /// Adds a copy.
    fn add(&mut self, cut: &Cut, rank: Rank, length: i64) {
        let Some(above) = rank.key.checked_sub(cut.from) else { return };
        let range = above >> cut.shift;
        match self {
            Tally::Counted { ranges, beyond } => {
                let range = usize::try_from(range).ok().and_then(|range| ranges.get_mut(range));
                match range {
                    Some((tokens, copies)) => (*tokens, *copies) = (*tokens + length as u64, *copies + 1),
                    None => *beyond += length as u64,
                }
            }
            Tally::Ranked(ranked) if range == 0 => ranked.push((rank, length)),
            _ => {}
        }
    }

    /// Adds what another task of the same pass found.
    fn merge(&mut self, other: Tally) {
        match (self, other) {
            (Tally::Counted { ranges, beyond }, Tally::Counted { ranges: others, beyond: further }) => {
                for (range, (tokens, copies)) in ranges.iter_mut().zip(others) {
                    (range.0, range.1) = (range.0 + tokens, range.1 + copies);
                }
                *beyond += further;
            }
            (Tally::Ranked(ranked), Tally::Ranked(others)) => ranked.extend(others),
            _ => {}
        }
    }
}

/// Numbers that JSON readers don't expect to be so large.
mod text {
    use super::Key;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(key: &Key, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(key)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Key, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// What the draw needs to know beyond the mixture.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Terms {
    pub seed: u64,
    pub max_copies: u32,
    pub long_tokens: u64,
}

/// A task of the draw: a pass over some files of the mixture, to look for the cuts, or to draw once they are found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pass {
    /// Where the mixture is, and the files to read.
    from: String,
    mixture: Table,
    terms: Terms,
    cuts: Vec<Cut>,
    /// Where what is drawn goes, and the table's name there.
    to: Option<(String, String)>,
}

impl Pass {
    /// Table `drawn`, with what was drawn as notes; or else the tallies as notes.
    pub async fn perform(self, worker: &Worker, bar: &Bar) -> Result<Output> {
        let from = worker.stores.open(&self.from)?;
        let to = self.to.as_ref().map(|(url, name)| Ok::<_, Error>((worker.stores.open(url)?, name.clone())));
        let (to, stop, bar) = (to.transpose()?, worker.stop.clone(), bar.clone());
        // as a task, which others go on beside; it ends with whoever waits for it
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

    /// A tally for each cut.
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
            let mut rows = Rows::default();
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

    /// Goes over all copies of all spans of a batch, in the mixture's order: number of the cut, span, rank, length.
    fn each_copy(
        &self,
        batch: &RecordBatch,
        mut each: impl FnMut(usize, &Span<'_>, Rank, i64),
    ) -> Result<()> {
        let ids = batch.column(0).as_fixed_size_binary();
        let numbers = |i: usize| batch.column(i).as_primitive::<Int64Type>();
        let (starts, stops, tokens) = (numbers(1), numbers(2), numbers(6));
        let copies = batch.column(3).as_primitive::<Float64Type>();
        let (strata, domains) = (batch.column(4).as_string::<i32>(), batch.column(5).as_string::<i32>());
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
            // they are sorted, as the strata of the mixture are
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

/// Of each cut's stratum, nothing.
fn nothing_drawn(cuts: &[Cut]) -> Vec<Stratum> {
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

/// Draws from a mixture table and writes `drawn`. Its notes are what came of each stratum, as [`Asked`]. `perform` does
/// passes, `at_a_time` of them at once; those that draw are jobs with a name.
pub async fn draw(
    (from, mixture): (&Location, &Table),
    asked: &Asked,
    terms: Terms,
    folder: &Location,
    at_a_time: usize,
    perform: impl AsyncFn(Pass, Option<&str>) -> Result<Output>,
) -> Result<Output> {
    let strata = asked.strata.len();
    let few = |stratum: &Stratum| stratum.spans * u64::from(terms.max_copies) <= sorted_of_each(strata);
    let many = asked.strata.iter().filter(|stratum| !few(stratum)).count();
    let cuts = asked.strata.iter().map(|stratum| Cut::new(stratum, few(stratum), many));
    let mut cuts: Vec<Cut> = cuts.collect();
    let shares: Vec<Table> = mixture
        .files
        .chunks(mixture.files.len().div_ceil(TASKS).max(1))
        .map(|files| Table { files: files.to_vec(), ..Default::default() })
        .collect();
    let pass = |cuts: &[Cut], mixture: &Table| {
        let (from, mixture, cuts) = (from.url(), mixture.clone(), cuts.to_vec());
        Pass { from, mixture, terms, cuts, to: None }
    };

    while cuts.iter().any(|cut| cut.end.is_none()) {
        let mut tallies: Vec<Tally> = cuts.iter().map(Cut::tally).collect();
        let passes = shares.iter().map(|share| perform(pass(&cuts, share), None));
        let mut passes = futures::stream::iter(passes).buffer_unordered(at_a_time);
        while let Some(done) = passes.try_next().await? {
            let found: Vec<Tally> = read(&done.notes)?;
            tallies.iter_mut().zip(found).for_each(|(tally, found)| tally.merge(found));
        }
        drop(passes);
        for (cut, tally) in cuts.iter_mut().zip(tallies) {
            cut.conclude(tally, sorted_of_each(strata));
        }
    }

    let passes = shares.iter().enumerate().map(|(i, share)| {
        let name = if shares.len() == 1 { "drawn".to_owned() } else { format!("drawn-{i:05}") };
        let job = format!("drawn-{i:05}-of-{:05}", shares.len());
        let pass = Pass { to: Some((folder.url(), name)), ..pass(&cuts, share) };
        let perform = &perform;
        async move { perform(pass, Some(&job)).await }
    });
    // in the order of their documents
    let mut passes = std::pin::pin!(futures::stream::iter(passes).buffered(at_a_time));
    let mut output = Output::default();
    output.table("drawn", Table::default());
    let mut sums = nothing_drawn(&cuts);
    while let Some(done) = passes.try_next().await? {
        let drawn: Vec<Stratum> = read(&done.notes)?;
        sums.iter_mut().zip(&drawn).for_each(|(sum, drawn)| sum.add(drawn));
        output.merge(done);
    }
    for (asked, drawn) in asked.strata.iter().zip(&sums) {
        let owed = asked.budget - asked.shortfall(terms.max_copies);
        if drawn.budget != owed {
            let (domain, stratum, drawn) = (&asked.domain, &asked.stratum, drawn.budget);
            let message = format!("{domain}/{stratum}: drew {drawn} tokens of {owed}");
            return Err(Error::Unbalanced { stage: "draw", message });
        }
        output.count("tokens", drawn.budget);
    }
    sums.retain(|sum| sum.spans > 0);
    let drawn = Asked { strata: sums, most_copies: asked.most_copies.clone() };
    output.notes = serde_json::to_value(drawn).expect("plain numbers");
    Ok(output)
}

/// What a task answers, as a text: a tree of a tally's numbers would be ten times as large.
fn answer(value: &impl Serialize) -> Value {
    serde_json::to_string(value).expect("plain numbers").into()
}

/// What a task answered.
fn read<T: DeserializeOwned>(notes: &Value) -> Result<T> {
    serde_json::from_str(notes.as_str().unwrap_or_default()).map_err(|e| Error::Unbalanced {
        stage: "draw",
        message: format!("a task's answer is not that of a pass: {e}"),
    })
}

/// Rows of `drawn` being made.
struct Rows(FixedSizeBinaryBuilder, [Int64Builder; 3], Int32Builder, [StringBuilder; 2]);

impl Default for Rows {
    fn default() -> Self {
        Rows(FixedSizeBinaryBuilder::new(16), Default::default(), Default::default(), Default::default())
    }
}

impl Rows {
    fn push(&mut self, span: &Span<'_>, copy: u32, length: i64) {
        self.0.append_value(span.doc_id).expect("16 bytes");
        self.1[0].append_value(span.start);
        self.1[1].append_value(span.start + length);
        self.2.append_value(copy as i32);
        self.3[0].append_value(span.stratum);
        self.3[1].append_value(span.domain);
        self.1[2].append_value(span.tokens);
    }

    fn finish(mut self) -> RecordBatch {
        let columns: Vec<ArrayRef> = vec![
            Arc::new(self.0.finish()),
            Arc::new(self.1[0].finish()),
            Arc::new(self.1[1].finish()),
            Arc::new(self.2.finish()),
            Arc::new(self.3[0].finish()),
            Arc::new(self.3[1].finish()),
            Arc::new(self.1[2].finish()),
        ];
        RecordBatch::try_new(tables::drawn(), columns).expect("columns as the table has them")
    }
}

/// Table `drawn`; its notes are what was drawn, as [`Asked`].
pub async fn obtain(run: &Run, mixture: &Published) -> Result<Published> {
    let terms = Terms {
        seed: run.conf.run.seed,
        max_copies: run.conf.mixture.max_copies,
        long_tokens: run.conf.mixture.long_tokens.0,
    };
    // budgets are sums over the mixture's rows; long_tokens only decides what the notes count
    let list = ingredients([
        ("version", json!(VERSION)),
        ("mixture", mixture.digest("mixture")),
        ("seed", json!(terms.seed)),
        ("max_copies", json!(terms.max_copies)),
        ("long_tokens", json!(terms.long_tokens)),
    ]);
    run.obtain(Stage::Draw, list, async |draft| {
        let asked: Asked = serde_json::from_value(mixture.manifest.notes.clone())
            .map_err(|e| Error::Corrupt { url: mixture.folder.url(), message: e.to_string() })?;
        let bar = run.progress.stage("draw", 0);
        let perform = async |pass: Pass, name: Option<&str>| {
            let rows = pass.mixture.files.iter().map(|file| file.rows).sum();
            let work = run.perform(Task::Pass(pass), &bar);
            let done = match name {
                Some(name) => draft.job(name, work).await?,
                None => work.await?,
            };
            if run.is_remote() {
                bar.add(0, rows, 0, 0);
            }
            Ok(done)
        };
        let (from, table) = (&mixture.folder, mixture.table("mixture"));
        let output =
            draw((from, &table), &asked, terms, &draft.folder, run.tasks_at_a_time(), perform).await?;
        let session = run.engine.session();
        let drawn = [(&draft.folder, &output.tables["drawn"])];
        run.engine.register(&session, "drawn", tables::drawn(), &drawn, &["doc_id"]).await?;
        run.check(Stage::Draw, &session).await?;
        Ok(output)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::super::mixture::Sums;
    use super::*;
    use crate::engine::Engine;
    use crate::progress::Progress;
    use crate::store::Stores;
    use proptest::prelude::*;

    /// doc, start, length, copies in 2⁻³², stratum
    type Row = (u8, i64, i64, u64, bool);

    fn id(doc: u8) -> [u8; 16] {
        [doc; 16]
    }

    /// Writes a mixture as so many files, draws from it, and returns the drawn rows as (doc, start, stop, copy).
    async fn drawn(rows: &[Row], files: usize, terms: Terms) -> (Asked, Vec<(u8, i64, i64, u32)>) {
        let stores = Stores::new("/");
        let folder = stores.open("memory:///draw").unwrap();
        let mut table = Table::default();
        let mut sums = Sums::new(terms.long_tokens, terms.max_copies);
        for (i, rows) in rows.chunks(rows.len().div_ceil(files)).enumerate() {
            let mut writer = TableWriter::new(&folder, &format!("mixture-{i}"), tables::mixture());
            let mut batch = super::super::mixture::Rows::default();
            for (doc, start, length, copies, long) in rows {
                let stratum = if *long { "long" } else { "short" };
                let (doc_id, stop) = (&id(*doc), start + length);
                let span =
                    Span { doc_id, start: *start, stop, copies: *copies, stratum, domain: "d", tokens: stop };
                sums.add(&span);
                batch.push(&span);
            }
            writer.write(batch.finish()).await.unwrap();
            table.extend(writer.finish().await.unwrap());
        }
        let asked = sums.asked();
        let engine = Arc::new(Engine::new(1, 1 << 20, None).unwrap());
        let worker = Worker::new(stores, None, engine, Arc::default());
        let bar = Progress::none().stage("draw", 0);
        // as between machines: what is asked and answered is JSON
        let perform = async |pass: Pass, _: Option<&str>| {
            let sent = serde_json::to_value(Task::Pass(pass)).unwrap();
            let task: Task = serde_json::from_value(sent).unwrap();
            let answer = serde_json::to_string(&task.perform(&worker, &bar).await?).unwrap();
            Ok(serde_json::from_str(&answer).unwrap())
        };
        let output = draw((&folder, &table), &asked, terms, &folder, 2, perform).await.unwrap();
        let batches: Vec<RecordBatch> =
            scan(folder, output.tables["drawn"].clone(), None).try_collect().await.unwrap();
        let mut out = vec![];
        for batch in batches {
            let number = |i: usize, row| batch.column(i).as_primitive::<Int64Type>().value(row);
            for row in 0..batch.num_rows() {
                let copy = batch.column(3).as_primitive::<arrow::datatypes::Int32Type>().value(row) as u32;
                out.push((
                    batch.column(0).as_fixed_size_binary().value(row)[0],
                    number(1, row),
                    number(2, row),
                    copy,
                ));
            }
        }
        (asked, out)
    }

    /// The definition, by sorting everything.
    fn by_definition(rows: &[Row], asked: &Asked, terms: Terms) -> Vec<(u8, i64, i64, u32)> {
        let mut out = vec![];
        for stratum in &asked.strata {
            let own = rows.iter().filter(|row| row.4 == (stratum.stratum == "long"));
            let mut copies: Vec<(Rank, u8, i64)> = own
                .flat_map(|(doc, start, length, copies, _)| {
                    let u = unit_hash("draw", terms.seed, &id(*doc), *start as u64, 0);
                    (0..terms.max_copies).map(move |copy| {
                        (
                            Rank { key: key(u, copy, *copies), doc_id: id(*doc), start: *start, copy },
                            *doc,
                            *length,
                        )
                    })
                })
                .collect();
            copies.sort();
            let mut left = stratum.budget as i64;
            for (rank, doc, length) in copies {
                let tokens = length.min(left);
                if tokens > 0 {
                    out.push((doc, rank.start, rank.start + tokens, rank.copy));
                }
                left -= tokens;
            }
        }
        out.sort_by_key(|row| (row.0, row.1, row.3));
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_draw_is_what_sorting_all_keys_would_give(
            docs in prop::collection::btree_map((0u8..200, 0i64..3), (1i64..500, 1u64..(5 << 32), any::<bool>()), 1..60),
            scale in 0u32..34,
            seed in 0u64..4,
            max_copies in 1u32..6,
            files in 1usize..5,
        ) {
            let rows: Vec<Row> = docs
                .into_iter()
                .map(|((doc, start), (length, copies, long))| (doc, start * 1000, length, (copies >> scale).max(1), long))
                .collect();
            let terms = Terms { seed, max_copies, long_tokens: 100 };
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (asked, got) = runtime.block_on(drawn(&rows, files, terms));
            prop_assert_eq!(got, by_definition(&rows, &asked, terms));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn what_a_recipe_asks_for_is_what_is_drawn_on_average(
            docs in prop::collection::btree_map(0u8..200, (1i64..9000, 1u64..(9 << 32), any::<bool>()), 30..60),
            scale in 0u32..8,
            max_copies in 1u32..5,
        ) {
            const SEEDS: u64 = 60;
            let rows: Vec<Row> = docs
                .into_iter()
                .map(|(doc, (length, copies, long))| (doc, 0, length, (copies >> scale).max(1), long))
                .collect();
            let length_of = |doc: u8| rows.iter().find(|row| row.0 == doc).unwrap().2;
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let mut asked = Asked::default();
            let mut sums = [[0i64; 9]; 2];
            for seed in 0..SEEDS {
                let terms = Terms { seed, max_copies, long_tokens: 100 };
                let (said, got) = runtime.block_on(drawn(&rows, 1, terms));
                for (doc, start, stop, _) in got {
                    let long = rows.iter().any(|row| row.0 == doc && row.4);
                    sums[usize::from(!long)][tables::length_bucket(length_of(doc))] += stop - start;
                }
                asked = said;
            }
            for stratum in &asked.strata {
                let owed = stratum.budget - stratum.shortfall(max_copies);
                prop_assert_eq!(stratum.by_length.iter().sum::<u64>(), owed);
                let short = stratum.stratum == "short";
                let own = || rows.iter().filter(|row| row.4 != short).map(|row| row.2 as f64);
                // a mean of so many draws is as near as this, and the key where a budget ends is one span's
                let near = 4.0 * (own().map(|l| l * l).sum::<f64>() / SEEDS as f64).sqrt()
                    + 0.25 * own().fold(0.0, f64::max);
                for (bucket, expected) in stratum.by_length.iter().enumerate() {
                    let mean = sums[usize::from(short)][bucket] as f64 / SEEDS as f64;
                    prop_assert!(
                        (mean - *expected as f64).abs() <= near,
                        "{} {bucket}: {mean} are drawn, {expected} were expected, within {near}", stratum.stratum
                    );
                }
            }
        }
    }

    #[tokio::test]
    async fn whole_expected_copies_are_drawn_exactly_so_often() {
        let rows: Vec<Row> = (0..50).map(|doc| (doc, 0, 100 + doc as i64, 2 * ONE, true)).collect();
        let (_, got) = drawn(&rows, 1, Terms { seed: 1, max_copies: 4, long_tokens: 10 }).await;
        assert_eq!(got.len(), 100);
        assert!(got.iter().all(|row| row.2 == 100 + row.0 as i64 && row.3 < 2));
    }

    #[tokio::test]
    async fn a_span_is_never_drawn_more_than_max_copies_times() {
        let rows = [(1, 0, 100, 9 * ONE, true), (2, 0, 100, ONE, true)];
        let (asked, got) = drawn(&rows, 1, Terms { seed: 1, max_copies: 4, long_tokens: 10 }).await;
        // 1000 tokens are asked, 800 can be had
        assert_eq!(asked.strata[0].shortfall(4), 200);
        assert_eq!(got.iter().map(|row| row.2 - row.1).sum::<i64>(), 800);
    }
}

//! draw: whole copies of spans out of expected copies, so that every stratum meets its budget to the token.
//!
//! Copy number j of a span with expected copies c gets the key (j + u) / c, u being a hash of the span. Keys in
//! ascending order are taken until the budget is met; the last span is cut there. A key below 1 is exactly
//! `floor(c)` copies and one more with probability `frac(c)`, so the recipe's expectation is met without correction,
//! and the key where a stratum's budget ends lies near 1.
//!
//! Nothing is sorted but the few spans around that key: passes over the mixture count tokens by ranges of keys, each
//! pass inside the range that the one before found, until the range is small enough to sort.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, FixedSizeBinaryBuilder, Int32Builder, Int64Builder, RecordBatch, StringBuilder,
};
use arrow::datatypes::{Float64Type, Int64Type};
use futures::StreamExt;
use serde_json::json;

use super::mixture::{Asked, ONE, Span, Stratum};
use crate::engine::{TableWriter, scan};
use crate::hash::unit_hash;
use crate::run::{Run, Stage, ingredients};
use crate::stage::{Output, Published, Table};
use crate::store::Location;
use crate::{Error, Result, tables};

const VERSION: u32 = 2;

/// A fixed-point key: (j + u) / c in units of 2⁻⁶⁴.
type Key = u128;

/// A copy's place among all copies of its stratum: ties of keys go by document, start and copy.
type Rank = (Key, [u8; 16], i64, u32);

/// Ranges of keys that a pass tells apart, in each stratum.
const RANGES: usize = 1 << 14;

/// Copies that are sorted in memory, in each stratum. Tests go through more passes.
const SORTED: u64 = if cfg!(test) { 2 } else { 1 << 15 };

fn key(u: u64, copy: u32, copies: u64) -> Key {
    (((copy as u128) << 64 | u as u128) << 32) / copies as u128
}

/// Where a stratum's budget ends.
struct Cut {
    budget: u64,
    /// Keys from here on are in question; `below` tokens have smaller keys.
    from: Key,
    below: u128,
    /// A range is 2^`shift` keys wide.
    shift: u32,
    state: State,
}

enum State {
    /// Tokens and copies of each range, and tokens beyond the last.
    Counting { tokens: Vec<u64>, copies: Vec<u64>, beyond: u128 },
    /// The copies of the range that holds the end, with their lengths.
    Sorting(Vec<(Rank, i64)>),
    /// Everything of smaller rank is taken, of this one so many tokens.
    Found { last: Rank, tokens: i64 },
    /// All there is does not meet the budget.
    Everything,
}

impl Cut {
    fn new(budget: u64) -> Self {
        // 2^14 ranges of 2^52 keys: the first pass looks at keys from 0 to 4, in steps of 1/4096
        let state = if budget == 0 {
            State::Found { last: (0, [0; 16], 0, 0), tokens: 0 }
        } else {
            State::counting()
        };
        Self { budget, from: 0, below: 0, shift: 52, state }
    }

    fn found(&self) -> bool {
        matches!(self.state, State::Found { .. } | State::Everything)
    }

    fn add(&mut self, rank: Rank, length: i64) {
        let Some(above) = rank.0.checked_sub(self.from) else { return };
        let range = above >> self.shift;
        match &mut self.state {
            State::Counting { tokens, copies, beyond } => match usize::try_from(range) {
                Ok(range) if range < RANGES => {
                    tokens[range] += length as u64;
                    copies[range] += 1;
                }
                _ => *beyond += length as u128,
            },
            State::Sorting(ranked) if range == 0 => ranked.push((rank, length)),
            _ => {}
        }
    }

    /// Draws the conclusion of a pass.
    fn conclude(&mut self) {
        match std::mem::replace(&mut self.state, State::Everything) {
            State::Counting { tokens, copies, beyond } => {
                let budget = self.budget as u128;
                let mut sum = self.below;
                for range in 0..RANGES {
                    let with = sum + tokens[range] as u128;
                    if with >= budget {
                        self.from += (range as u128) << self.shift;
                        self.below = sum;
                        if copies[range] <= SORTED || self.shift == 0 {
                            self.state = State::Sorting(Vec::with_capacity(copies[range] as usize));
                        } else {
                            self.shift = self.shift.saturating_sub(RANGES.ilog2());
                            self.state = State::counting();
                        }
                        return;
                    }
                    sum = with;
                }
                if sum + beyond >= budget {
                    self.from += (RANGES as u128) << self.shift;
                    self.below = sum;
                    self.shift += RANGES.ilog2() / 2;
                    self.state = State::counting();
                }
            }
            State::Sorting(mut ranked) => {
                ranked.sort_unstable();
                let mut sum = self.below;
                for (rank, length) in ranked {
                    let missing = self.budget as u128 - sum;
                    if length as u128 >= missing {
                        self.state = State::Found { last: rank, tokens: missing as i64 };
                        return;
                    }
                    sum += length as u128;
                }
                unreachable!("the counts of the pass before found the budget's end in this range");
            }
            found => self.state = found,
        }
    }

    /// How many tokens of a copy are drawn, from its start.
    fn drawn(&self, rank: Rank, length: i64) -> i64 {
        match &self.state {
            State::Everything => length,
            State::Found { last, tokens } => match rank.cmp(last) {
                std::cmp::Ordering::Less => length,
                std::cmp::Ordering::Equal => *tokens,
                std::cmp::Ordering::Greater => 0,
            },
            _ => unreachable!("the draw begins when every cut is found"),
        }
    }
}

impl State {
    fn counting() -> Self {
        State::Counting { tokens: vec![0; RANGES], copies: vec![0; RANGES], beyond: 0 }
    }
}

/// What the draw needs to know beyond the mixture.
pub struct Terms {
    pub seed: u64,
    pub max_copies: u32,
    pub long_tokens: u64,
}

/// Draws from a mixture table and writes `drawn`. Its notes are what came of each stratum, as [`Asked`].
pub async fn draw(
    mixture: (&Location, &Table),
    asked: &Asked,
    terms: &Terms,
    folder: &Location,
) -> Result<Output> {
    let mut cuts: BTreeMap<(String, String), Cut> =
        asked.strata.iter().map(|s| ((s.domain.clone(), s.stratum.clone()), Cut::new(s.budget))).collect();

    while cuts.values().any(|cut| !cut.found()) {
        each_copy(
            mixture,
            terms,
            &mut cuts,
            |cut, _, rank, length| {
                cut.add(rank, length);
                Ok(None)
            },
            None,
        )
        .await?;
        cuts.values_mut().for_each(Cut::conclude);
    }

    let mut writer = TableWriter::new(folder, "drawn", tables::drawn());
    let mut sums: BTreeMap<(String, String), Stratum> = BTreeMap::new();
    each_copy(
        mixture,
        terms,
        &mut cuts,
        |cut, span, rank, length| {
            let tokens = cut.drawn(rank, length);
            if tokens == 0 {
                return Ok(None);
            }
            let sum =
                sums.entry((span.domain.to_owned(), span.stratum.to_owned())).or_insert_with(|| Stratum {
                    domain: span.domain.to_owned(),
                    stratum: span.stratum.to_owned(),
                    by_length: vec![0; 9],
                    ..Default::default()
                });
            sum.spans += 1;
            sum.budget += tokens as u64;
            sum.by_length[tables::length_bucket(span.tokens)] += tokens as u64;
            if rank.3 == 0 {
                sum.available += length as u64;
            }
            if span.tokens > terms.long_tokens as i64 {
                sum.long += tokens as u64;
            }
            Ok(Some(tokens))
        },
        Some(&mut writer),
    )
    .await?;

    let mut output = Output::default();
    output.table("drawn", writer.finish().await?);
    for stratum in &asked.strata {
        let drawn = sums.get(&(stratum.domain.clone(), stratum.stratum.clone())).map_or(0, |sum| sum.budget);
        let owed = stratum.budget - stratum.shortfall(terms.max_copies);
        if drawn != owed {
            let message = format!("{}/{}: drew {drawn} tokens of {owed}", stratum.domain, stratum.stratum);
            return Err(Error::Unbalanced { stage: "draw", message });
        }
        output.count("tokens", drawn);
    }
    let drawn = Asked { strata: sums.into_values().collect(), most_copies: asked.most_copies.clone() };
    output.notes = serde_json::to_value(drawn).expect("plain numbers");
    Ok(output)
}

/// Goes over all copies of all spans, in the mixture's order. Where `each` returns a number of tokens, that much of the
/// copy is written.
async fn each_copy(
    (folder, table): (&Location, &Table),
    terms: &Terms,
    cuts: &mut BTreeMap<(String, String), Cut>,
    mut each: impl FnMut(&mut Cut, &Span<'_>, Rank, i64) -> Result<Option<i64>>,
    mut writer: Option<&mut TableWriter>,
) -> Result<()> {
    let mut batches = std::pin::pin!(scan(folder.clone(), table.clone(), None));
    let mut name = (String::new(), String::new());
    while let Some(batch) = batches.next().await {
        let batch = batch?;
        let ids = batch.column(0).as_fixed_size_binary();
        let numbers = |i: usize| batch.column(i).as_primitive::<Int64Type>();
        let (starts, stops, tokens) = (numbers(1), numbers(2), numbers(6));
        let copies = batch.column(3).as_primitive::<Float64Type>();
        let (strata, domains) = (batch.column(4).as_string::<i32>(), batch.column(5).as_string::<i32>());
        let mut drawn = Rows::default();
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
            if name.0 != span.domain || name.1 != span.stratum {
                name = (span.domain.to_owned(), span.stratum.to_owned());
            }
            let cut = cuts.get_mut(&name).ok_or_else(|| Error::Unbalanced {
                stage: "draw",
                message: format!("the mixture has no budget for {}/{}", name.0, name.1),
            })?;
            let u = unit_hash("draw", terms.seed, doc_id, span.start as u64, 0);
            for copy in 0..terms.max_copies {
                let rank = (key(u, copy, span.copies), *doc_id, span.start, copy);
                if let Some(length) = each(cut, &span, rank, span.stop - span.start)? {
                    drawn.push(&span, copy, length);
                }
            }
        }
        if let Some(writer) = writer.as_deref_mut() {
            writer.write(drawn.finish()).await?;
        }
    }
    Ok(())
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
        let _bar = run.progress.stage("draw", 0);
        let output =
            draw((&mixture.folder, &mixture.table("mixture")), &asked, &terms, &draft.folder).await?;
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
    use crate::engine::TableWriter;
    use crate::store::Stores;
    use futures::TryStreamExt;
    use proptest::prelude::*;

    /// doc, start, length, copies in 2⁻³², stratum
    type Row = (u8, i64, i64, u64, bool);

    fn id(doc: u8) -> [u8; 16] {
        [doc; 16]
    }

    /// Writes a mixture, draws from it, and returns the drawn rows as (doc, start, stop, copy).
    async fn drawn(rows: &[Row], terms: &Terms) -> (Asked, Vec<(u8, i64, i64, u32)>) {
        let folder = Stores::new("/").open("memory:///draw").unwrap();
        let mut writer = TableWriter::new(&folder, "mixture", tables::mixture());
        let mut sums = Sums::new(terms.long_tokens, terms.max_copies);
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
        let (table, asked) = (writer.finish().await.unwrap(), sums.asked());
        let output = draw((&folder, &table), &asked, terms, &folder).await.unwrap();
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
    fn by_definition(rows: &[Row], asked: &Asked, terms: &Terms) -> Vec<(u8, i64, i64, u32)> {
        let mut out = vec![];
        for stratum in &asked.strata {
            let own = rows.iter().filter(|row| row.4 == (stratum.stratum == "long"));
            let mut copies: Vec<(Rank, u8, i64)> = own
                .flat_map(|(doc, start, length, copies, _)| {
                    let u = unit_hash("draw", terms.seed, &id(*doc), *start as u64, 0);
                    (0..terms.max_copies)
                        .map(move |j| ((key(u, j, *copies), id(*doc), *start, j), *doc, *length))
                })
                .collect();
            copies.sort();
            let mut left = stratum.budget as i64;
            for (rank, doc, length) in copies {
                let tokens = length.min(left);
                if tokens > 0 {
                    out.push((doc, rank.2, rank.2 + tokens, rank.3));
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
        ) {
            let rows: Vec<Row> = docs
                .into_iter()
                .map(|((doc, start), (length, copies, long))| (doc, start * 1000, length, (copies >> scale).max(1), long))
                .collect();
            let terms = Terms { seed, max_copies, long_tokens: 100 };
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (asked, got) = runtime.block_on(drawn(&rows, &terms));
            prop_assert_eq!(got, by_definition(&rows, &asked, &terms));
        }
    }

    #[tokio::test]
    async fn whole_expected_copies_are_drawn_exactly_so_often() {
        let rows: Vec<Row> = (0..50).map(|doc| (doc, 0, 100 + doc as i64, 2 * ONE, true)).collect();
        let (_, got) = drawn(&rows, &Terms { seed: 1, max_copies: 4, long_tokens: 10 }).await;
        assert_eq!(got.len(), 100);
        assert!(got.iter().all(|row| row.2 == 100 + row.0 as i64 && row.3 < 2));
    }

    #[tokio::test]
    async fn a_span_is_never_drawn_more_than_max_copies_times() {
        let rows = [(1, 0, 100, 9 * ONE, true), (2, 0, 100, ONE, true)];
        let (asked, got) = drawn(&rows, &Terms { seed: 1, max_copies: 4, long_tokens: 10 }).await;
        // 1000 tokens are asked, 800 can be had
        assert_eq!(asked.strata[0].shortfall(4), 200);
        assert_eq!(got.iter().map(|row| row.2 - row.1).sum::<i64>(), 800);
    }
}

//! draw: turns expected copies of spans into whole copies, so that every stratum meets its budget to the
//! token.
//!
//! Copy number j of a span with c expected copies gets the key (j + u) / c, where u is a hash of the span in
//! `[0, 1)`. Copies are taken in ascending order of keys until the budget is met, and the last one is cut
//! there. The keys of a span below 1 are exactly `floor(c)` copies, and one more with probability `frac(c)`.
//! The recipe's expectation is therefore met without correction, and the key at which a stratum's budget ends
//! lies near 1.
//!
//! Only the few copies around that key are sorted. Passes over the mixture count tokens by ranges of keys.
//! Each pass divides the range that the one before found, until that is small enough to sort. One more pass
//! draws. Each task of a pass reads some of the mixture's files, and answers with small tallies.

use futures::{StreamExt, TryStreamExt};
use serde_json::json;

use crate::algorithms::cut::{Cut, Tally, sorted_of_each};
use crate::algorithms::strata::{Asked, Stratum};
use crate::output::{Output, Published, Table};
use crate::run::{Run, ingredients};
use crate::stage::Stage;
use crate::storage::Location;
use crate::tasks::Task;
use crate::tasks::pass::{Pass, Terms, nothing_drawn, read};
use crate::{Error, Result, tables};

/// The most tasks of a pass. Each of them answers with a tally.
const TASKS: usize = 256;

/// Draws from a mixture table and writes table `drawn`. The notes are what was drawn from each stratum, as
/// [`Asked`]. `perform` performs passes, `at_a_time` of them at once. Passes that draw have a job's name,
/// under which they are cached.
///
/// # Errors
/// [`Error::Unbalanced`] if a stratum's budget was not met to the token.
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
    // in the order of the mixture's files, which is that of doc_id
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

/// Table `drawn`. The notes are what was drawn, as [`Asked`].
pub async fn obtain(run: &Run, mixture: &Published) -> Result<Published> {
    let terms = Terms {
        seed: run.conf.run.seed,
        max_copies: run.conf.mixture.max_copies,
        long_tokens: run.conf.mixture.long_tokens.0,
    };
    // budgets are not in the key, because they are sums over the mixture's rows; long_tokens only affects the
    // notes
    let list = ingredients(
        Stage::Draw,
        [
            ("mixture", mixture.digest("mixture")),
            ("seed", json!(terms.seed)),
            ("max_copies", json!(terms.max_copies)),
            ("long_tokens", json!(terms.long_tokens)),
        ],
    );
    run.obtain(Stage::Draw, list, async |draft| {
        let asked: Asked = serde_json::from_value(mixture.manifest.notes.clone())
            .map_err(|e| Error::Corrupt { url: mixture.folder.url(), message: e.to_string() })?;
        let bar = run.progress.stage("draw", 0);
        let perform = async |pass: Pass, name: Option<&str>| {
            let rows = pass.mixture.files.iter().map(|file| file.rows).sum();
            let work = run.executor.perform(Task::Pass(pass), &bar);
            let done = match name {
                Some(name) => draft.job(name, work).await?,
                None => work.await?,
            };
            if run.executor.is_remote() {
                bar.add(0, rows, 0, 0);
            }
            Ok(done)
        };
        let (from, table) = (&mixture.folder, mixture.table("mixture"));
        let output =
            draw((from, &table), &asked, terms, &draft.folder, run.executor.tasks_at_a_time(), perform)
                .await?;
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
    use super::*;
    use crate::algorithms::cut::{Rank, key};
    use crate::algorithms::strata::{Span, Sums};
    use crate::hash::unit_hash;
    use crate::progress::Progress;
    use crate::sql::engine::{Engine, TableWriter, scan};
    use crate::storage::Stores;
    use crate::tables::ONE;
    use crate::tasks::Worker;
    use arrow::array::{AsArray, RecordBatch};
    use arrow::datatypes::Int64Type;
    use proptest::prelude::*;
    use std::sync::Arc;

    /// doc, start, length, copies in units of 2⁻³², whether its stratum is `long` and not `short`
    type Row = (u8, i64, i64, u64, bool);

    fn id(doc: u8) -> [u8; 16] {
        [doc; 16]
    }

    /// Writes a mixture to `files` files, draws from it, and returns the drawn rows as (doc, start, stop,
    /// copy).
    async fn drawn(rows: &[Row], files: usize, terms: Terms) -> (Asked, Vec<(u8, i64, i64, u32)>) {
        let stores = Stores::new("/");
        let folder = stores.open("memory:///draw").unwrap();
        let mut table = Table::default();
        let mut sums = Sums::new(terms.long_tokens, terms.max_copies);
        for (i, rows) in rows.chunks(rows.len().div_ceil(files)).enumerate() {
            let mut writer = TableWriter::new(&folder, &format!("mixture-{i}"), tables::mixture());
            let mut batch = super::super::mixture::MixtureRows::new();
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
        // tasks and answers pass through JSON, as between machines
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

    /// The definition: all copies are sorted by key, and taken until the budget is met.
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
                // the tolerance: several standard errors of the mean over the seeds, and a share of the
                // longest span, in which a budget may end
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
        // 1000 tokens are asked for, 800 are there
        assert_eq!(asked.strata[0].shortfall(4), 200);
        assert_eq!(got.iter().map(|row| row.2 - row.1).sum::<i64>(), 800);
    }
}

//! pack: merges the scattered ids into `train-00000-of-000NN.parquet`, one job per output file.
//!
//! The layout is that of the paper authors' published dataset: `input_ids`; `labels`, the one id after them
//! (−100 if there is none); and `source`, the segments that tile the sequence. A padding segment has an empty
//! doc_id.

use arrow::array::{Int32Array, Int64Array, RecordBatch};
use futures::{StreamExt, TryStreamExt};
use hashbrown::HashMap;
use serde_json::json;

use super::shuffle::{self, Drawn};
use super::tokens::{self, Tokens};
use crate::algorithms::sequences::Layout;
use crate::conf::Mode;
use crate::output::{File, Output, Published, Table};
use crate::run::{Run, ingredients};
use crate::sql::engine::{query, stream};
use crate::stage::Stage;
use crate::stages::tokenizer::Tokenizer;
use crate::tables::column;
use crate::tasks::Task;
use crate::tasks::pack::{PackFile, Packing, Range};
use crate::{Error, Result, tables};

/// How the sequences of `train` or `heldout` are laid out.
///
/// # Errors
/// The conf asks for a BOS or EOS that the tokenizer does not have.
pub fn layout(run: &Run, tokenizer: &Tokenizer, split: &str) -> Result<Layout> {
    let conf = &run.conf.pack;
    let (bos, eos) = tokenizer.specials(run)?;
    Ok(Layout {
        sequence_tokens: conf.sequence_tokens.0 as usize,
        sequences_per_file: conf.sequences_per_file as usize,
        // the loss by position needs documents whole, or in pieces that follow each other
        mode: if split == "heldout" { Mode::Concat } else { conf.mode },
        bos: bos.is_some(),
        eos: eos.is_some(),
    })
}

/// Table `train` or `heldout`: the packed files.
///
/// Its key does not depend on the files that ids came from: the same documents in other files give the same
/// key.
pub async fn obtain(
    run: &Run,
    tokenizer: &Tokenizer,
    tokens: &Tokens,
    catalog: &Published,
    drawn: &Drawn,
    split: &'static str,
) -> Result<Published> {
    let conf = &run.conf.pack;
    let (bos, eos) = tokenizer.specials(run)?;
    let layout = layout(run, tokenizer, split)?;
    // the drawn table says which spans of which documents; a document's ids follow from its text, the
    // tokenizer and the encoding
    let list = ingredients(
        Stage::Pack,
        [
            ("shuffle", json!(Stage::Shuffle.about().version)),
            ("encoding", tokens::encoding()),
            ("split", json!(split)),
            ("drawn", json!(drawn.table.digest)),
            ("seed", json!(run.conf.run.seed)),
            ("shuffle_sql", json!(run.stage_sql("shuffle")?.key)),
            ("tokenizer", json!(tokenizer.fingerprint)),
            ("layout", json!(layout)),
            ("sequences_per_row_group", json!(conf.sequences_per_row_group)),
            ("bos", json!(bos)),
            ("eos", json!(eos)),
        ],
    );
    run.obtain(Stage::Pack, list, async |draft| {
        let shuffled = shuffle::obtain(run, tokens, catalog, drawn, layout).await?;
        if shuffled.cached {
            // check whole files here: only ranges of them are read later, and a range has no digest
            for file in shuffled.manifest.tables.values().flat_map(|table| &table.files) {
                file.check(&shuffled.folder).await?;
            }
        }
        let packing = Packing {
            sequence_tokens: layout.sequence_tokens,
            sequences_per_row_group: conf.sequences_per_row_group as usize,
            bos,
            eos,
            padding: eos.or(bos).unwrap_or(0),
            width: tokens.width(),
            files: shuffled.count("files") as usize,
            split: split.to_owned(),
        };
        let files = shuffled.table("ids").files.into_iter();
        let files: HashMap<i64, File> = files.filter_map(|file| Some((part_of(&file.name)?, file))).collect();
        let plans = shuffled.table("plan");

        let session = run.engine.session();
        let ranges = shuffled.table("ranges");
        run.engine
            .register(&session, "ranges", tables::ranges(), &[(&shuffled.folder, &ranges)], &[])
            .await?;
        let doing = "cannot sort the scattered ranges by file";
        let sql = "select file, part, begin, tokens from ranges order by file, part";
        let mut rows = stream(&session, doing, sql).await?.map_err(|e| query(doing, e));

        let bar = run.progress.stage("pack", shuffled.count("sequences"));
        let mut output = Output::default();
        let mut jobs = futures::stream::FuturesUnordered::new();
        let mut next = 0;
        let mut waiting: Vec<(i32, Range)> = vec![];
        while next < packing.files {
            // ranges come sorted by file, so a file's ranges are complete once one of a later file is there
            let complete = loop {
                let own = waiting.partition_point(|(file, _)| *file as usize <= next);
                if own < waiting.len() {
                    break own;
                }
                match rows.try_next().await? {
                    Some(batch) => waiting.extend(ranges_of(&batch)?),
                    None => break own,
                }
            };
            let own: Vec<Range> = waiting.drain(..complete).map(|(_, range)| range).collect();
            if jobs.len() >= run.executor.tasks_at_a_time()
                && let Some(done) = jobs.next().await
            {
                output.merge(done?);
            }
            run.check_stop()?;
            let prefix = format!("plan-{next:05}-");
            let parts: Vec<File> =
                plans.files.iter().filter(|f| f.name.starts_with(&prefix)).cloned().collect();
            let plan = Table { files: parts, ..Default::default() };
            let ids = own.iter().filter_map(|range| Some((range.part, files.get(&range.part)?.clone())));
            let task = PackFile {
                packing: packing.clone(),
                file: next,
                shuffled: shuffled.folder.url(),
                plan,
                ids: ids.collect(),
                ranges: own,
                folder: draft.folder.url(),
            };
            let bar = bar.clone();
            jobs.push(async move {
                let work = run.executor.perform(Task::Pack(task), &bar);
                let done = draft.job(&format!("{split}-{next:05}"), work).await?;
                let sequences = done.counted("sequences");
                bar.add(sequences, sequences, sequences * layout.sequence_tokens as u64, 0);
                Ok::<_, Error>(done)
            });
            next += 1;
        }
        while let Some(done) = jobs.next().await {
            output.merge(done?);
        }
        if let Some(table) = output.tables.get_mut(split) {
            table.files.sort_by(|a, b| a.name.cmp(&b.name));
        }
        if output.counted("sequences") != shuffled.count("sequences") {
            let message = format!(
                "{} sequences were planned, {} were packed",
                shuffled.count("sequences"),
                output.counted("sequences")
            );
            return Err(Error::Unbalanced { stage: "pack", message });
        }
        output.notes = shuffled.manifest.notes.clone();
        Ok(output)
    })
    .await
}

/// The part whose ids a scattered file holds, from the file's name.
fn part_of(name: &str) -> Option<i64> {
    u64::from_str_radix(name.strip_prefix("ids-")?.strip_suffix(".bin")?, 16).ok().map(|part| part as i64)
}

fn ranges_of(batch: &RecordBatch) -> Result<Vec<(i32, Range)>> {
    let files: &Int32Array = column(batch, "file")?;
    let parts: &Int64Array = column(batch, "part")?;
    let begins: &Int64Array = column(batch, "begin")?;
    let tokens: &Int64Array = column(batch, "tokens")?;
    let range = |row| Range { part: parts.value(row), begin: begins.value(row), tokens: tokens.value(row) };
    Ok((0..batch.num_rows()).map(|row| (files.value(row), range(row))).collect())
}

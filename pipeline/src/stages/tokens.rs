//! tokens: source rows become documents, and their texts ids, in one pass; a part is the unit of work and of caching.
//!
//! A unit (a large file, or a bundle of small ones) is published by itself, under the hash of how it is read, its files'
//! sizes and versions, and the tokenizer. So a new source file tokenises only itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{
    ArrayRef, FixedSizeBinaryBuilder, Int32Builder, Int64Builder, ListArray, RecordBatch, StringBuilder,
    UInt16Array, UInt32Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::DataType;
use datafusion::prelude::SessionContext;
use futures::{StreamExt, TryStreamExt};
use hashbrown::{HashMap, HashSet};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::tokenizer::Tokenizer;
use crate::conf;
use crate::engine::TableWriter;
use crate::hash::{Digest, RowDigest, doc_id, text_id};
use crate::progress::Bar;
use crate::publish::{Input, StageKey};
use crate::run::{Goal, Run, Stage, Step, ingredients};
use crate::source::{Part, Reader, Spec, Unit, Unread};
use crate::sources::{self, Source};
use crate::stage::{self, Draft, Ingredients, Manifest, Output, Table};
use crate::store::Location;
use crate::task::{Task, Worker};
use crate::{Error, Result, tables};

const VERSION: u32 = 3;

/// How many units are looked up at a time.
const LOOKUPS: usize = 32;

/// All units of all sources.
pub struct Tokens {
    units: Vec<(Location, Arc<Manifest>)>,
    /// The table of ids of each part.
    parts: HashMap<i64, (Location, Table)>,
    /// The source files that were read …
    pub inputs: Vec<Input>,
    /// … and what looks like one and was not, by source.
    pub not_read: BTreeMap<String, Vec<Unread>>,
    narrow: bool,
}

impl Tokens {
    /// Order-free digest of a table over all units.
    pub fn digest(&self, table: &str) -> RowDigest {
        let mut digest = RowDigest::default();
        for (_, manifest) in &self.units {
            digest.add(manifest.tables.get(table).map(|table| table.digest).unwrap_or_default());
        }
        digest
    }

    /// Names the set of parts: where ids are to be found.
    pub fn parts_digest(&self) -> Digest {
        let mut parts: Vec<i64> = self.parts.keys().copied().collect();
        parts.sort_unstable();
        Digest::of(&parts.iter().flat_map(|part| part.to_le_bytes()).collect::<Vec<_>>())
    }

    pub fn count(&self, name: &str) -> u64 {
        self.units.iter().map(|(_, manifest)| manifest.counts.get(name).copied().unwrap_or(0)).sum()
    }

    pub fn counts(&self) -> BTreeMap<String, u64> {
        let not_read = self.not_read.values().flatten().map(|unread| unread.files).sum();
        let mut counts = BTreeMap::from([("files_not_read".to_owned(), not_read)]);
        for (name, count) in self.units.iter().flat_map(|(_, manifest)| &manifest.counts) {
            *counts.entry(name.clone()).or_default() += count;
        }
        counts
    }

    pub fn keys(&self) -> Vec<StageKey> {
        self.units.iter().map(|(_, m)| StageKey { stage: m.stage.clone(), key: m.key.clone() }).collect()
    }

    /// The ids of a part.
    pub fn ids(&self, part: i64) -> Result<(Location, Table)> {
        self.parts.get(&part).cloned().ok_or_else(|| Error::Unbalanced {
            stage: "shuffle",
            message: format!("the catalog names part {part:016x}, which no unit has"),
        })
    }

    /// Bytes of an id.
    pub fn width(&self) -> usize {
        if self.narrow { 2 } else { 4 }
    }

    /// A table of all units that have it, with their folders.
    pub fn tables(&self, name: &str) -> Vec<(&Location, &Table)> {
        self.units.iter().filter_map(|(folder, m)| Some((folder, m.tables.get(name)?))).collect()
    }

    /// Registers `documents`, `tokens` or `rejects` over all units.
    pub async fn register(&self, run: &Run, session: &SessionContext, name: &str) -> Result<()> {
        let schema = match name {
            "documents" => tables::documents(),
            "tokens" => tables::tokens(self.narrow),
            _ => tables::rejects(),
        };
        run.engine.register(session, name, schema, &self.tables(name), &[]).await
    }
}

/// What decides a text's ids beside the tokenizer's file: this stage, and the encoder with its libraries.
pub fn encoding() -> Value {
    json!([VERSION, crate::tokenizer::ENCODER])
}

/// Finds or computes every unit.
pub async fn obtain(run: &Run, tokenizer: &Tokenizer) -> Result<Tokens> {
    let started = Instant::now();
    let sources = sources::list(run).await?;
    let with_unread = sources.iter().filter(|source| !source.unread.is_empty());
    let not_read: BTreeMap<String, Vec<Unread>> =
        with_unread.map(|source| (source.spec.origin.clone(), source.unread.clone())).collect();
    if run.goal != Goal::Look {
        for (source, unread) in &not_read {
            tracing::warn!("source {source}: {}", Unread::told(unread));
        }
    }
    let narrow = tokenizer.loaded.vocab_size() <= 1 << 16;
    let jobs: Vec<(&Source, &Unit)> =
        sources.iter().flat_map(|s| s.units.iter().map(move |unit| (s, unit))).collect();
    let again = matches!(run.goal, Goal::Compute { from: Some(from) } if Stage::Tokens >= from);

    let lookups = jobs.iter().map(|(source, unit)| async move {
        // files go by what the store says of them: reading them all to know whether to read them would be no cache
        let list = ingredients([
            ("version", json!(VERSION)),
            ("encoder", json!(crate::tokenizer::ENCODER)),
            ("unit", source.unit_identity(unit)),
            ("tokenizer", json!(tokenizer.fingerprint)),
        ]);
        let key = stage::key(Stage::Tokens.name(), &list);
        let folder = run.output.join("stages").join(Stage::Tokens.name()).join(&key);
        let found = if again { None } else { stage::find(&folder).await? };
        Ok::<_, Error>((list, key, folder, found))
    });
    let found: Vec<_> = futures::stream::iter(lookups).buffered(LOOKUPS).try_collect().await?;
    let all: Ingredients = [
        ("sources".to_owned(), json!(run.conf.source)),
        (
            "files".to_owned(),
            json!(Digest::of(
                json!(sources.iter().map(Source::identity).collect::<Vec<_>>()).to_string().as_bytes()
            )),
        ),
        ("tokenizer".to_owned(), json!(tokenizer.fingerprint)),
    ]
    .into();
    let missing: Vec<usize> = (0..jobs.len()).filter(|i| found[*i].3.is_none()).collect();
    if !missing.is_empty() && run.goal == Goal::Look {
        return Err(Error::Absent { stage: Stage::Tokens.name(), key: String::new(), ingredients: all });
    }

    let mut units: Vec<Option<(Location, Manifest)>> = vec![];
    let mut todo = vec![];
    for (i, (list, key, folder, manifest)) in found.into_iter().enumerate() {
        units.push(manifest.map(|manifest| (folder.clone(), manifest)));
        if units[i].is_none() {
            todo.push((i, list, key, folder));
        }
    }
    let bar =
        run.progress.stage(Stage::Tokens.name(), missing.iter().map(|i| sources::size(jobs[*i].1)).sum());
    let at = run.output.join("tokenizers").join(&format!("{}.json", tokenizer.fingerprint));
    run.worker.keep(tokenizer.fingerprint, tokenizer.loaded.clone());
    if run.is_remote() && !todo.is_empty() {
        at.put(tokenizer.json.clone()).await?;
    }
    let computing = todo.into_iter().map(|(i, list, key, folder)| {
        let (source, unit) = jobs[i];
        let (bar, tokenizer_url) = (bar.clone(), at.url());
        async move {
            run.check_stop()?;
            let task = Tokenize {
                source: source.conf.clone(),
                unit: unit.clone(),
                key: key.clone(),
                folder: folder.url(),
                again,
                tokenizer: tokenizer.fingerprint,
                tokenizer_url,
            };
            let output = run.perform(Task::Tokenize(task), &bar).await?;
            if run.is_remote() {
                let counted = |name| output.counted(name);
                bar.add(sources::size(unit), counted("rows"), counted("tokens"), counted("bytes"));
            }
            let Output { tables, counts, notes } = output;
            let manifest = Manifest {
                stage: Stage::Tokens.name().into(),
                key,
                ingredients: list,
                tables,
                counts,
                notes,
            };
            stage::publish(&folder, &manifest).await?;
            Ok::<_, Error>((i, folder, manifest))
        }
    });
    let mut computing = futures::stream::iter(computing).buffer_unordered(run.tasks_at_a_time());
    while let Some((i, folder, manifest)) = computing.try_next().await? {
        units[i] = Some((folder, manifest));
    }
    drop(computing);

    let mut tokens = Tokens { units: vec![], parts: HashMap::new(), inputs: vec![], not_read, narrow };
    for (folder, manifest) in units.into_iter().flatten() {
        for file in manifest.tables.get("tokens").into_iter().flat_map(|table| &table.files) {
            let Some(part) = part_of(&file.name) else { continue };
            let (_, table) = tokens.parts.entry(part).or_insert_with(|| (folder.clone(), Table::default()));
            table.files.push(file.clone());
        }
        let inputs = manifest.notes.get("inputs").cloned().unwrap_or_default();
        tokens.inputs.extend(serde_json::from_value::<Vec<Input>>(inputs).unwrap_or_default());
        tokens.units.push((folder, Arc::new(manifest)));
    }
    tokens.inputs.sort_by(|a, b| a.url.cmp(&b.url));
    let step = Step {
        stage: Stage::Tokens.name().into(),
        key: tokens.parts_digest().short(),
        cached: missing.is_empty(),
        seconds: started.elapsed().as_secs_f64(),
        ended: jiff::Timestamp::now().to_string(),
        counts: tokens.counts(),
        ingredients: all,
    };
    run.steps.lock().expect("no panic while held").push(step);
    if run.goal != Goal::Look {
        check_rejects(&sources, &jobs, &tokens)?;
    }
    Ok(tokens)
}

/// Stops the run where too many of a source's rows are bad.
fn check_rejects(sources: &[Source], jobs: &[(&Source, &Unit)], tokens: &Tokens) -> Result<()> {
    for source in sources {
        let own = jobs.iter().zip(&tokens.units).filter(|((s, _), _)| std::ptr::eq(*s, source));
        let (mut rows, mut rejects, mut empty) = (0, 0, 0);
        let mut reasons = BTreeMap::<String, u64>::new();
        let mut first: Option<String> = None;
        for (_, (_, manifest)) in own {
            rows += manifest.counts.get("rows").copied().unwrap_or(0);
            rejects += manifest.counts.get("rejects").copied().unwrap_or(0);
            empty += manifest.counts.get("empty").copied().unwrap_or(0);
            let counted: BTreeMap<String, u64> =
                serde_json::from_value(manifest.notes.get("reasons").cloned().unwrap_or_default())
                    .unwrap_or_default();
            counted.into_iter().for_each(|(reason, count)| *reasons.entry(reason).or_default() += count);
            first = first.or_else(|| manifest.notes.get("first_reject")?.as_str().map(str::to_owned));
        }
        if empty > 0 {
            tracing::info!(
                "source {}: {empty} of {rows} rows have an empty text, and are no documents",
                source.spec.origin
            );
        }
        if rejects > 0 {
            let listed: Vec<String> =
                reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
            let what = format!(
                "source {}: {rejects} of {rows} rows were rejected ({})",
                source.spec.origin,
                listed.join(", ")
            );
            if rejects as f64 > source.conf.max_reject_share * rows as f64 {
                let message = format!(
                    "{what}, more than max_reject_share = {}\n  the first: {}",
                    source.conf.max_reject_share,
                    first.unwrap_or_default()
                );
                return Err(Error::data(
                    message,
                    "`lengthwise sql CONF \"select * from rejects\"` shows them all; mend the source or the conf's columns, or raise `max_reject_share`",
                ));
            }
            tracing::warn!("{what}");
        }
    }
    Ok(())
}

/// A part's number: stable, and the same for the same unit and index.
fn part_number(unit_key: &str, index: u32) -> i64 {
    let digest = Digest::of(format!("{unit_key} {index}").as_bytes());
    i64::from_le_bytes(digest.0[..8].try_into().expect("8 of 32 bytes")) & i64::MAX
}

fn part_of(name: &str) -> Option<i64> {
    i64::from_str_radix(name.strip_prefix("tokens-")?.split('-').next()?, 16).ok()
}

/// A unit to be tokenised.
#[derive(Debug, Serialize, Deserialize)]
pub struct Tokenize {
    source: conf::Source,
    unit: Unit,
    /// The unit's key, which the numbers of its parts come from.
    key: String,
    /// Where its files go.
    folder: String,
    /// Whether parts that are there are done again.
    again: bool,
    tokenizer: Digest,
    tokenizer_url: String,
}

impl Tokenize {
    pub async fn perform(self, worker: &Worker, bar: &Bar) -> Result<Output> {
        let tokenizer = worker.tokenizer(self.tokenizer, &self.tokenizer_url).await?;
        let spec = sources::spec(&self.source);
        let spec = Arc::new(spec.map_err(|e| Error::data(e.to_string(), "mend the source's globs"))?);
        let reader = worker.reader(worker.stores.open(&self.source.url)?);
        let draft = Draft::begin(worker.stores.open(&self.folder)?, self.again).await?;
        tokenize(worker, &tokenizer, (&reader, &spec), &self.unit, &self.key, &draft, bar).await
    }
}

/// Reads a unit part by part and tokenises each on a worker.
async fn tokenize(
    worker: &Worker,
    tokenizer: &Arc<crate::tokenizer::Tokenizer>,
    (reader, spec): (&Reader, &Arc<Spec>),
    unit: &Unit,
    key: &str,
    draft: &Draft,
    bar: &Bar,
) -> Result<Output> {
    // parts that an earlier attempt finished, as far as they follow each other
    let mut output = Output::default();
    let mut done = 0;
    let mut reasons: BTreeMap<String, u64> = BTreeMap::new();
    let mut first_reject = Value::Null;
    let mut account = |output: &mut Output, part: Output| {
        if let Ok(counted) = serde_json::from_value::<BTreeMap<String, u64>>(part.notes["reasons"].clone()) {
            counted.into_iter().for_each(|(reason, count)| *reasons.entry(reason).or_default() += count);
        }
        if first_reject.is_null() {
            first_reject = part.notes["first_reject"].clone();
        }
        output.merge(part);
    };
    while let Some(part) = draft.done(&format!("part-{done:05}")).await? {
        account(&mut output, part);
        done += 1;
    }
    let mut parts = reader.parts(unit.clone(), spec.clone(), move |index| index < done);
    let mut working = futures::stream::FuturesOrdered::new();
    loop {
        let permit = worker.parts.clone().acquire_owned().await.expect("never closed");
        let Some(part) = parts.next().await? else { break };
        worker.check_stop()?;
        let index = part.index;
        let (spec, loaded) = (spec.clone(), tokenizer.clone());
        let number = part_number(key, index);
        let narrow = loaded.vocab_size() <= 1 << 16;
        let bar = bar.clone();
        // started here and not where it is awaited: the next part waits for this one's permit
        let made = tokio::task::spawn_blocking(move || {
            let made = Rows::make(&part, &spec, &loaded, number, narrow);
            drop(permit);
            made
        });
        let work = async move {
            let made = made.await.expect("a worker does not panic")?;
            bar.add(0, made.rows, made.tokens, made.bytes);
            // as a task: the encoding of Parquet is work, and here it would be done one part after the other
            let written = tokio::spawn(made.write(draft.folder.clone(), number, narrow));
            let written = async { written.await.expect("a worker does not panic") };
            draft.job(&format!("part-{index:05}"), written).await
        };
        working.push_back(work);
        while working.len() > worker.engine.partitions {
            if let Some(part) = working.try_next().await? {
                account(&mut output, part);
            }
        }
    }
    while let Some(part) = working.try_next().await? {
        account(&mut output, part);
    }
    bar.add(sources::size(unit), 0, 0, 0);
    let read = parts.files().iter();
    let inputs: Vec<Input> = read
        .map(|file| Input {
            url: file.url.clone(),
            bytes: file.size,
            blake3: Digest(*file.blake3.as_bytes()),
        })
        .collect();
    output.notes = json!({ "inputs": inputs, "reasons": reasons, "first_reject": first_reject });
    let rows = output.counted("rows");
    let kept: u64 =
        ["documents", "duplicates", "rejects", "empty"].map(|name| output.counted(name)).iter().sum();
    if rows != kept {
        let message =
            format!("{rows} rows were read, {kept} became documents, duplicates or rejects, or were empty");
        return Err(Error::Unbalanced { stage: "tokens", message });
    }
    Ok(output)
}

/// What a part's rows become.
struct Rows {
    documents: RecordBatch,
    ids: RecordBatch,
    rejects: RecordBatch,
    rows: u64,
    /// Whose text is empty.
    empty: u64,
    duplicates: u64,
    tokens: u64,
    bytes: u64,
    reasons: BTreeMap<String, u64>,
    first_reject: Option<String>,
}

impl Rows {
    /// Reads and tokenises a part: pure computation.
    fn make(
        part: &Part,
        spec: &Spec,
        tokenizer: &crate::tokenizer::Tokenizer,
        number: i64,
        narrow: bool,
    ) -> Result<Self> {
        let mut encoder = tokenizer.encoder();
        let mut seen: HashSet<[u8; 16]> = HashSet::new();
        let (mut rows, mut empty, mut duplicates, mut bytes) = (0, 0, 0, 0);
        let mut reasons: BTreeMap<String, u64> = BTreeMap::new();
        let mut first_reject = None;
        // documents
        let mut doc_ids = FixedSizeBinaryBuilder::new(16);
        let mut text_ids = FixedSizeBinaryBuilder::new(16);
        let (mut domains, mut origins) = (StringBuilder::new(), StringBuilder::new());
        let (mut lengths, mut sizes, mut numbers) =
            (Int64Builder::new(), Int64Builder::new(), Int64Builder::new());
        // tokens
        let mut chunk_ids = FixedSizeBinaryBuilder::new(16);
        let mut chunks = Int32Builder::new();
        let (mut offsets, mut narrow_ids, mut wide_ids) = (vec![0i32], Vec::<u16>::new(), Vec::<u32>::new());
        // most texts have more than three bytes a token
        if narrow {
            narrow_ids.reserve(part.bytes() as usize / 3);
        } else {
            wide_ids.reserve(part.bytes() as usize / 3);
        }
        // rejects
        let mut texts: [StringBuilder; 4] = Default::default();
        let mut lines = Int64Builder::new();

        let mut ids = Vec::new();
        part.rows(spec, &mut |row| {
            rows += 1;
            let document = match row.outcome {
                Ok(Some(document)) => document,
                Ok(None) => {
                    empty += 1;
                    return Ok(());
                }
                Err(reject) => {
                    let reason = reject.reason.name();
                    *reasons.entry(reason.to_owned()).or_default() += 1;
                    first_reject.get_or_insert_with(|| {
                        format!("{} line {}: {reason}: {}", row.file, row.line, reject.detail)
                    });
                    let values = [spec.origin.as_str(), row.file, reason, &reject.detail];
                    texts.iter_mut().zip(values).for_each(|(column, value)| column.append_value(value));
                    lines.append_value(row.line as i64);
                    return Ok(());
                }
            };
            let id = doc_id(document.domain, document.text);
            if !seen.insert(id) {
                duplicates += 1;
                return Ok(());
            }
            ids.clear();
            encoder.encode(document.text, &mut ids)?;
            bytes += document.text.len() as u64;
            doc_ids.append_value(id).expect("16 bytes");
            text_ids.append_value(text_id(document.text)).expect("16 bytes");
            domains.append_value(document.domain);
            origins.append_value(&spec.origin);
            lengths.append_value(ids.len() as i64);
            sizes.append_value(document.text.len() as i64);
            numbers.append_value(number);
            for (chunk, ids) in ids.chunks(tables::CHUNK_IDS).enumerate() {
                chunk_ids.append_value(id).expect("16 bytes");
                chunks.append_value(chunk as i32);
                if narrow {
                    narrow_ids.extend(ids.iter().map(|id| *id as u16));
                } else {
                    wide_ids.extend_from_slice(ids);
                }
                let end = i32::try_from(narrow_ids.len() + wide_ids.len()).map_err(|_| {
                    Error::data(
                        format!(
                            "{} line {}: the rows before it have 2 billion tokens already",
                            row.file, row.line
                        ),
                        "cut the file into smaller ones, or lower the source's `max_document_bytes`",
                    )
                })?;
                offsets.push(end);
            }
            Ok(())
        })?;

        let tokens = *offsets.last().expect("begins with 0") as u64;
        let values: ArrayRef = if narrow {
            Arc::new(UInt16Array::from(narrow_ids))
        } else {
            Arc::new(UInt32Array::from(wide_ids))
        };
        let schema = tables::tokens(narrow);
        let DataType::List(item) = schema.field(2).data_type() else { unreachable!("ids is a list") };
        let lists = ListArray::new(item.clone(), OffsetBuffer::new(offsets.into()), values, None);
        let columns: Vec<ArrayRef> =
            vec![Arc::new(chunk_ids.finish()), Arc::new(chunks.finish()), Arc::new(lists)];
        let ids = RecordBatch::try_new(schema, columns).expect("columns as the table has them");
        let columns: Vec<ArrayRef> = vec![
            Arc::new(doc_ids.finish()),
            Arc::new(domains.finish()),
            Arc::new(lengths.finish()),
            Arc::new(sizes.finish()),
            Arc::new(origins.finish()),
            Arc::new(text_ids.finish()),
            Arc::new(numbers.finish()),
        ];
        let documents =
            RecordBatch::try_new(tables::documents(), columns).expect("columns as the table has them");
        let [origin, file, reason, detail] =
            texts.each_mut().map(|column| Arc::new(column.finish()) as ArrayRef);
        let columns: Vec<ArrayRef> = vec![origin, file, Arc::new(lines.finish()), reason, detail];
        let rejects =
            RecordBatch::try_new(tables::rejects(), columns).expect("columns as the table has them");
        Ok(Self { documents, ids, rejects, rows, empty, duplicates, tokens, bytes, reasons, first_reject })
    }

    /// Writes the three tables of a part.
    async fn write(self, folder: Location, number: i64, narrow: bool) -> Result<Output> {
        let mut output = Output::default();
        let documents = self.documents.num_rows() as u64;
        output.count("rows", self.rows);
        output.count("documents", documents);
        output.count("empty", self.empty);
        output.count("duplicates", self.duplicates);
        output.count("rejects", self.rejects.num_rows() as u64);
        output.count("tokens", self.tokens);
        output.count("bytes", self.bytes);
        output.notes = json!({ "reasons": self.reasons, "first_reject": self.first_reject });
        for (name, schema, rows) in [
            ("documents", tables::documents(), self.documents),
            ("tokens", tables::tokens(narrow), self.ids),
            ("rejects", tables::rejects(), self.rejects),
        ] {
            let mut writer = TableWriter::new(&folder, &format!("{name}-{number:016x}"), schema);
            writer.write(rows).await?;
            output.table(name, writer.finish().await?);
        }
        Ok(output)
    }
}

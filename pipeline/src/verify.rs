//! verify: recomputes every digest and every sum of a run, from the stored files alone.

use std::collections::{BTreeMap, BTreeSet};

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::Int32Type;
use bytes::Bytes;
use datafusion::prelude::SessionContext;
use futures::StreamExt;
use object_store::path::Path;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::Serialize;

use crate::directory::{self, RunManifest, output_of, stage_of};
use crate::hash::{Digest, RowDigest};
use crate::output::{File, Manifest, Table};
use crate::sql::engine::{Engine, stream};
use crate::storage::Location;
use crate::{Error, Result, tables};

/// How much was checked, and what was wrong.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Verdict {
    pub files: u64,
    pub bytes: u64,
    pub rows: u64,
    /// One line for everything that differs from its manifest.
    pub wrong: Vec<String>,
    /// URLs of manifests and broken files that were removed, so that the next run computes these outputs
    /// again.
    pub withdrawn: Vec<String>,
}

/// Verifies a run and calls `seen` with the name of each part that it begins. The manifests of broken outputs
/// are removed: what has no manifest does not exist.
pub async fn verify(
    folder: &Location,
    manifest: &RunManifest,
    engine: &Engine,
    mut seen: impl FnMut(&str),
) -> Result<Verdict> {
    let mut verdict = Verdict::default();
    let output = output_of(folder);
    let mut stages: Stages = BTreeMap::new();
    for key in &manifest.stages {
        seen(&key.stage);
        let found = match stage_of(&output, key).await {
            Err(Error::Corrupt { url, message }) => {
                verdict.wrong.push(format!("{url}: {message}"));
                withdraw(&output.join("stages").join(&key.stage).join(&key.key), &mut verdict).await?;
                continue;
            }
            found => found?,
        };
        let Some((at, stage)) = found else {
            verdict.wrong.push(format!(
                "stage {} {} has no manifest; `lengthwise run` computes it again",
                key.stage, key.key
            ));
            continue;
        };
        let before = verdict.wrong.len();
        for (name, table) in &stage.tables {
            check_table(&at, name, table, &mut verdict).await?;
        }
        if verdict.wrong.len() > before {
            withdraw(&at, &mut verdict).await?;
        }
        stages.entry(key.stage.clone()).or_default().push((at, stage));
    }
    seen("run");
    let before = verdict.wrong.len();
    for file in &manifest.files {
        check_file(folder, file, &mut verdict).await?;
    }
    let attempts = directory::attempts(folder).await?;
    let of_attempts: Vec<File> = attempts.into_iter().flat_map(|attempt| attempt.files).collect();
    check_attempts(folder, &of_attempts, &mut verdict).await?;
    check_packed(folder, manifest, &mut verdict).await?;
    // broken files cannot be queried
    if verdict.wrong.is_empty() {
        check_documents(folder, manifest, &stages, engine, &mut verdict).await?;
    }
    if verdict.wrong.len() > before {
        withdraw(folder, &mut verdict).await?;
    }
    check_strays(folder, manifest, &of_attempts, &mut verdict).await?;
    accounts(&stages, manifest, &mut verdict);
    Ok(verdict)
}

/// The outputs of a run's stages, with their folders, by the stage's name.
type Stages = BTreeMap<String, Vec<(Location, Manifest)>>;

async fn withdraw(folder: &Location, verdict: &mut Verdict) -> Result<()> {
    let at = folder.join("manifest.json");
    at.delete().await?;
    verdict.withdrawn.push(at.url());
    Ok(())
}

/// The file's bytes, if they have the digest that the manifest states. A file with other bytes is deleted.
async fn check_file(folder: &Location, file: &File, verdict: &mut Verdict) -> Result<Option<Bytes>> {
    let at = folder.join(&file.name);
    let Some(bytes) = at.get().await? else {
        verdict.wrong.push(format!("{}: missing", at.url()));
        return Ok(None);
    };
    verdict.files += 1;
    verdict.bytes += bytes.len() as u64;
    if Digest::of(&bytes) == file.blake3 {
        return Ok(Some(bytes));
    }
    // a resumed run finds files by their sizes, so the broken file must go
    at.delete().await?;
    verdict.withdrawn.push(at.url());
    if bytes.len() as u64 != file.bytes {
        verdict.wrong.push(format!("{}: {} bytes instead of {}", at.url(), bytes.len(), file.bytes));
    } else {
        verdict.wrong.push(format!("{}: its bytes have another BLAKE3 digest", at.url()));
    }
    Ok(None)
}

async fn check_table(folder: &Location, name: &str, table: &Table, verdict: &mut Verdict) -> Result<()> {
    let (mut digest, mut rows, mut whole) = (RowDigest::default(), 0, true);
    for file in &table.files {
        match check_file(folder, file, verdict).await? {
            Some(bytes) if file.name.ends_with(".parquet") => match digest_of(bytes) {
                Ok((file_digest, file_rows)) => {
                    digest.add(file_digest);
                    rows += file_rows;
                }
                Err(e) => verdict.wrong.push(format!("{}: {e}", folder.join(&file.name).url())),
            },
            // other files only have a digest of their bytes
            _ => whole = false,
        }
    }
    verdict.rows += rows;
    if whole && (rows, digest) != (table.rows, table.digest) {
        verdict.wrong.push(format!("{}: table {name} has other rows than its manifest says", folder.url()));
    }
    Ok(())
}

/// The digest and the number of a Parquet file's rows.
pub fn digest_of(bytes: Bytes) -> Result<(RowDigest, u64), parquet::errors::ParquetError> {
    let (mut digest, mut rows) = (RowDigest::default(), 0);
    for batch in ParquetRecordBatchReaderBuilder::try_new(bytes)?.build()? {
        let batch = batch?;
        let schema = batch.schema();
        let content: Vec<usize> =
            (0..schema.fields().len()).filter(|i| schema.field(*i).name() != "part").collect();
        digest.add(RowDigest::of(&batch.project(&content)?));
        rows += batch.num_rows() as u64;
    }
    Ok((digest, rows))
}

/// Checks the report, the cards and the logs: each has to be what one of the attempts wrote.
async fn check_attempts(folder: &Location, of_attempts: &[File], verdict: &mut Verdict) -> Result<()> {
    let mut written: BTreeMap<&str, Vec<Digest>> = BTreeMap::new();
    for file in of_attempts {
        written.entry(&file.name).or_default().push(file.blake3);
    }
    if !written.contains_key("report.html") {
        verdict.wrong.push(format!("{}: no attempt says what the report was", folder.join("attempts").url()));
    }
    for (name, digests) in written {
        let at = folder.join(name);
        match at.head().await? {
            None => verdict.wrong.push(format!("{}: missing", at.url())),
            Some(_) if digests.contains(&at.digest().await?) => verdict.files += 1,
            Some(_) => verdict.wrong.push(format!("{}: it is not what a run wrote there", at.url())),
        }
    }
    Ok(())
}

/// Folders of a run's directory that other programs read whole.
const READ_WHOLE: [&str; 4] = ["data/", "heldout/", "checkpoint/", "eval/"];

/// Reports files that are not the run's, but lie where `load_dataset` or a trainer would read them. They are
/// not removed.
async fn check_strays(
    folder: &Location,
    manifest: &RunManifest,
    of_attempts: &[File],
    verdict: &mut Verdict,
) -> Result<()> {
    let own = manifest.files.iter().chain(of_attempts);
    let own: BTreeSet<Path> = own.map(|file| folder.join(&file.name).path).collect();
    let below: Vec<Path> = READ_WHOLE.iter().map(|name| folder.join(name).path).collect();
    for meta in folder.list().await? {
        let path = meta.location;
        if !own.contains(&path) && below.iter().any(|folder| path.prefix_matches(folder)) {
            let name: Vec<_> = path.prefix_match(&folder.path).into_iter().flatten().collect();
            let name = name.iter().map(AsRef::as_ref).collect::<Vec<_>>().join("/");
            verdict.wrong.push(format!(
                "{}/{name}: it is none of the run's files, and whoever reads the folder reads it, too; remove it",
                folder.url()
            ));
        }
    }
    Ok(())
}

/// Checks that the packed files contain no more tokens of any document than were drawn of it.
async fn check_documents(
    folder: &Location,
    manifest: &RunManifest,
    stages: &Stages,
    engine: &Engine,
    verdict: &mut Verdict,
) -> Result<()> {
    for (split, below, (stage, table)) in
        [("train", "data/", ("draw", "drawn")), ("heldout", "heldout/", ("catalog", "heldout"))]
    {
        let packs = stages.get("pack").into_iter().flatten();
        let Some((_, pack)) = packs.into_iter().find(|(_, pack)| pack.tables.contains_key(split)) else {
            continue;
        };
        let Some((drawn_folder, drawn)) = stages.get(stage).and_then(|outputs| outputs.first()) else {
            continue;
        };
        let session = engine.session();
        let files = manifest.files.iter().filter(|file| file.name.starts_with(below)).cloned().collect();
        let packed = Table { files, ..Table::default() };
        engine.register(&session, "packed", tables::packed(), &[(folder, &packed)], &[]).await?;
        let drawn = drawn.tables.get(table).cloned().unwrap_or_default();
        engine.register(&session, "drawn", tables::drawn(), &[(drawn_folder, &drawn)], &["doc_id"]).await?;
        let has = |key: &str| u8::from(pack.ingredients.get(key).is_some_and(|id| !id.is_null()));
        let wrong = too_much(&session, has("bos"), has("eos")).await?;
        verdict.wrong.extend(wrong.into_iter().map(|line| format!("{below}: {line}")));
    }
    Ok(())
}

/// How many documents are listed by id.
const MAX_NAMED: usize = 5;

/// The documents with more ids in `packed` than were drawn of them, one line each. `bos` and `eos` are the
/// numbers of ids that stand before and after a document.
async fn too_much(session: &SessionContext, bos: u8, eos: u8) -> Result<Vec<String>> {
    let sql = format!(
        "with segments as (
            select unnest(source) as segment from packed
        ),

        packed_ids as (
            select
                segment['doc_id'] as doc_id,
                sum(cast(segment['end'] - segment['start'] as decimal(38, 0))) as ids
            from segments
            where segment['doc_id'] <> ''
            group by segment['doc_id']
        ),

        drawn_ids as (
            select
                encode(doc_id, 'hex') as doc_id,
                sum(cast(stop - start as decimal(38, 0))
                    + case when start = 0 then {bos} else 0 end
                    + case when stop = tokens then {eos} else 0 end) as ids
            from drawn
            group by doc_id
        )

        select packed_ids.doc_id, packed_ids.ids, coalesce(drawn_ids.ids, 0) as asked
        from packed_ids
        left join drawn_ids on packed_ids.doc_id = drawn_ids.doc_id
        where packed_ids.ids > coalesce(drawn_ids.ids, 0)
        order by packed_ids.doc_id"
    );
    let doing = "cannot ask the packed files for their documents";
    let mut rows = stream(session, doing, &sql).await?;
    let (mut wrong, mut more) = (vec![], 0);
    while let Some(batch) = rows.next().await {
        let batch = batch.map_err(|e| crate::sql::engine::query(doing, e))?;
        let text = |column: usize, row: usize| {
            arrow::util::display::array_value_to_string(batch.column(column), row).unwrap_or_default()
        };
        for row in 0..batch.num_rows() {
            match wrong.len() < MAX_NAMED {
                true => wrong.push(format!(
                    "document {} has {} ids, where {} were drawn of it",
                    text(0, row),
                    text(1, row),
                    text(2, row)
                )),
                false => more += 1,
            }
        }
    }
    wrong.extend((more > 0).then(|| format!("so have {more} documents more")));
    Ok(wrong)
}

/// Checks the packed files: segments tile every sequence, and each domain has at least the tokens that were
/// planned.
async fn check_packed(folder: &Location, manifest: &RunManifest, verdict: &mut Verdict) -> Result<()> {
    let sequence_tokens = manifest.conf.pack.sequence_tokens.0 as i32;
    let mut ids: BTreeMap<String, u64> = BTreeMap::new();
    let packed = |file: &&File| file.name.starts_with("data/") || file.name.starts_with("heldout/");
    for file in manifest.files.iter().filter(packed) {
        // the plan counts the domains of `data/` only, but sequences have the same length in both folders
        let mut none = BTreeMap::new();
        let ids = if file.name.starts_with("data/") { &mut ids } else { &mut none };
        let Some(bytes) = folder.join(&file.name).get().await? else { continue };
        let mut read = || -> Result<(), parquet::errors::ParquetError> {
            for batch in ParquetRecordBatchReaderBuilder::try_new(bytes.clone())?.build()? {
                check_sequences(&batch?, sequence_tokens, &file.name, ids, &mut verdict.wrong);
            }
            Ok(())
        };
        // `check_file` has reported a file that cannot be read
        let _ = read();
    }
    for domain in &manifest.summary.planned.domains {
        // segments include BOS and EOS, which no budget counts, so more ids than planned are right
        let found = ids.get(&domain.domain).copied().unwrap_or(0);
        if found < domain.packed {
            verdict.wrong.push(format!(
                "{}: {found} ids are packed, {} tokens were planned",
                domain.domain, domain.packed
            ));
        }
    }
    Ok(())
}

fn check_sequences(
    batch: &RecordBatch,
    size: i32,
    file: &str,
    ids: &mut BTreeMap<String, u64>,
    wrong: &mut Vec<String>,
) {
    let inputs = batch.column(0).as_list::<i32>();
    let sources = batch.column(2).as_list::<i32>();
    for row in 0..batch.num_rows() {
        let segments = sources.value(row);
        let segments = segments.as_struct();
        let names = segments.column(0).as_string::<i32>();
        let number = |i: usize| segments.column(i).as_primitive::<Int32Type>();
        let mut at = 0;
        for i in 0..segments.len() {
            let (start, end) = (number(2).value(i), number(3).value(i));
            if start != at || end <= start {
                break;
            }
            *ids.entry(names.value(i).to_owned()).or_default() += (end - start) as u64;
            at = end;
        }
        if at != size || inputs.value_length(row) != size {
            wrong.push(format!("{file}: the segments of a sequence do not tile its {size} positions"));
        }
    }
}

/// Checks the accounts, so that nothing is lost or counted twice: what a stage took in is what it passed on
/// plus what it set aside.
fn accounts(stages: &Stages, manifest: &RunManifest, verdict: &mut Verdict) {
    let sum = |stage: &str, name: &str| -> u64 {
        stages.get(stage).into_iter().flatten().map(|(_, m)| m.counts.get(name).copied().unwrap_or(0)).sum()
    };
    let mut equal = |what: &str, a: u64, b: u64| {
        if a != b {
            verdict.wrong.push(format!("{what}: {a} is not {b}"));
        }
    };
    let rows = sum("tokens", "rows");
    let kept = ["documents", "duplicates", "rejects", "empty"].map(|name| sum("tokens", name));
    equal("source rows = documents + duplicates + rejects + empty", rows, kept.iter().sum());
    equal(
        "documents = distinct documents + duplicates",
        sum("tokens", "documents"),
        sum("catalog", "documents") + sum("catalog", "duplicates"),
    );
    let planned = &manifest.summary.planned;
    let placed: u64 = planned.domains.iter().map(|d| d.packed + d.dropped).sum();
    equal("tokens drawn = tokens packed + tokens dropped", sum("draw", "tokens"), placed);
}

/// The error that ends `lengthwise verify` if something was wrong.
pub fn error(verdict: &Verdict) -> Error {
    Error::Differs(format!("{} of what was checked is not as the manifests say", verdict.wrong.len()))
}

//! verify: recomputes every digest and every sum of a run, from the stored files alone.

use std::collections::BTreeMap;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::Int32Type;
use bytes::Bytes;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::Serialize;

use crate::hash::{Digest, RowDigest};
use crate::publish::{RunManifest, output_of, stage_of};
use crate::stage::{File, Manifest, Table};
use crate::store::Location;
use crate::{Error, Result};

/// What was checked and what was wrong.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Verdict {
    pub files: u64,
    pub bytes: u64,
    pub rows: u64,
    /// A line for everything that is not as its manifest says.
    pub wrong: Vec<String>,
    /// Manifests that were withdrawn, so that the next run computes these outputs again.
    pub withdrawn: Vec<String>,
}

/// Verifies a run. The manifests of broken outputs are removed: what has no manifest does not exist.
pub async fn verify(
    folder: &Location,
    manifest: &RunManifest,
    mut seen: impl FnMut(&str),
) -> Result<Verdict> {
    let mut verdict = Verdict::default();
    let output = output_of(folder);
    let mut stages: BTreeMap<String, Vec<Manifest>> = BTreeMap::new();
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
        stages.entry(key.stage.clone()).or_default().push(stage);
    }
    seen("run");
    let before = verdict.wrong.len();
    for file in &manifest.files {
        check_file(folder, file, &mut verdict).await?;
    }
    check_packed(folder, manifest, &mut verdict).await?;
    if verdict.wrong.len() > before {
        withdraw(folder, &mut verdict).await?;
    }
    accounts(&stages, manifest, &mut verdict);
    Ok(verdict)
}

async fn withdraw(folder: &Location, verdict: &mut Verdict) -> Result<()> {
    let at = folder.join("manifest.json");
    at.delete().await?;
    verdict.withdrawn.push(at.url());
    Ok(())
}

/// The file's bytes where they are what the manifest says.
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
    // a run looks at sizes only: a file of the right size and the wrong bytes must not stay
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
            // other files have one digest, that of their bytes
            _ => whole = false,
        }
    }
    verdict.rows += rows;
    if whole && (rows, digest) != (table.rows, table.digest) {
        verdict.wrong.push(format!("{}: table {name} has other rows than its manifest says", folder.url()));
    }
    Ok(())
}

/// Digest and number of a Parquet file's rows.
fn digest_of(bytes: Bytes) -> Result<(RowDigest, u64), parquet::errors::ParquetError> {
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

/// Reads the packed files alone: segments tile every sequence, and each domain has the tokens that were planned.
async fn check_packed(folder: &Location, manifest: &RunManifest, verdict: &mut Verdict) -> Result<()> {
    let sequence_tokens = manifest.conf.pack.sequence_tokens.0 as i32;
    let mut ids: BTreeMap<String, u64> = BTreeMap::new();
    for file in manifest.files.iter().filter(|f| f.name.starts_with("data/")) {
        let Some(bytes) = folder.join(&file.name).get().await? else { continue };
        let mut read = || -> Result<(), parquet::errors::ParquetError> {
            for batch in ParquetRecordBatchReaderBuilder::try_new(bytes.clone())?.build()? {
                check_sequences(&batch?, sequence_tokens, &file.name, &mut ids, &mut verdict.wrong);
            }
            Ok(())
        };
        // a file that can't be read was found above
        let _ = read();
    }
    for domain in &manifest.summary.planned.domains {
        // BOS and EOS belong to segments but to no budget
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

/// Nothing lost, nothing twice: what a stage took in is what it gave out and what it set aside.
fn accounts(stages: &BTreeMap<String, Vec<Manifest>>, manifest: &RunManifest, verdict: &mut Verdict) {
    let sum = |stage: &str, name: &str| -> u64 {
        stages.get(stage).into_iter().flatten().map(|m| m.counts.get(name).copied().unwrap_or(0)).sum()
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

/// The error that ends `lengthwise verify` when something was wrong.
pub fn error(verdict: &Verdict) -> Error {
    Error::Differs(format!("{} of what was checked is not as the manifests say", verdict.wrong.len()))
}

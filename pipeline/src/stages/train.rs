//! train: the packed sequences feed a Llama; its checkpoint is a stage's output like any other.

use lengthwise_model::{Location as Folder, Step as Metrics, TrainConf, TrainJob, checkpoint_parts};
use serde_json::json;

use super::tokenizer::Tokenizer;
use crate::engine::put_file;
use crate::hash::{Digest, RowDigest};
use crate::run::{Run, Stage, ingredients};
use crate::stage::{Output, Published, Table};
use crate::store::Location;
use crate::{Error, Result};

const VERSION: u32 = 1;

fn folder(at: &Location) -> Folder {
    Folder { store: at.store.clone(), path: at.path.clone() }
}

/// The conf's `[train]` table; wrong values point into the conf.
pub fn conf(run: &Run) -> Result<Option<TrainConf>> {
    let Some(conf) = run.conf.train::<TrainConf>()? else { return Ok(None) };
    conf.check().map_err(|e| run.conf.wrong(&["train"], e.to_string(), "in this table", None))?;
    Ok(Some(conf))
}

/// Table `checkpoint`: a Hugging Face folder with `metrics.jsonl`; `None` where the conf doesn't train.
///
/// Devices are not in its key: what comes out should not depend on them.
pub async fn obtain(run: &Run, tokenizer: &Tokenizer, packed: &Published) -> Result<Option<Published>> {
    let Some(conf) = conf(run)? else { return Ok(None) };
    let checkpoint = conf.checkpoint.as_ref().map(|url| run.stores.open(url)).transpose()?;
    let start = match &checkpoint {
        Some(at) => {
            let mut parts = vec![];
            for name in checkpoint_parts(&folder(at)).await? {
                let bytes = at.join(&name).read().await?;
                parts.push(json!([name, Digest::of(&bytes)]));
            }
            json!(parts)
        }
        None => json!(null),
    };
    let mut settings = json!(conf);
    for key in ["devices", "checkpoint"] {
        if let Some(settings) = settings.as_object_mut() {
            settings.remove(key);
        }
    }
    let (bos, eos) = tokenizer.specials(run)?;
    let list = ingredients([
        ("version", json!(VERSION)),
        ("dataset", packed.digest("train")),
        ("sequences", json!(packed.count("sequences"))),
        ("settings", settings),
        ("checkpoint", start),
        ("tokenizer", json!(tokenizer.fingerprint)),
    ]);
    let published = run
        .obtain(Stage::Train, list, async |draft| {
            let steps = conf.steps;
            let job = TrainJob {
                conf,
                dataset: folder(&packed.folder),
                checkpoint: checkpoint.as_ref().map(folder),
                vocab_size: tokenizer.loaded.vocab_size(),
                sequence_tokens: run.conf.pack.sequence_tokens.0 as usize,
                bos,
                eos,
                tokenizer: Some(tokenizer.json.clone()),
            };
            let bar = run.progress.stage("train", steps);
            let stop = run.stop.clone();
            let mut on_step = |step: &Metrics| {
                bar.say(
                    step.step,
                    format!(
                        "step {} of {steps}, loss {:.3}, {:.0} tokens/s",
                        step.step, step.loss, step.tokens_per_second
                    ),
                );
                match stop.load(std::sync::atomic::Ordering::Relaxed) {
                    true => Err(lengthwise_model::Error::Stopped(step.step)),
                    false => Ok(()),
                }
            };
            let trained = lengthwise_model::train(&job, &mut on_step).await.map_err(|error| match error {
                lengthwise_model::Error::Stopped(_) => Error::Stopped,
                error => error.into(),
            })?;
            let mut output = Output::default();
            output.count("parameters", trained.parameters);
            output.count("steps", steps);
            output.count("tokens", trained.tokens);
            for (name, bytes) in trained.files {
                let file = put_file(&draft.folder, &name, bytes, 0).await?;
                // metrics say how fast it went, which is no content
                let content = if name == "metrics.jsonl" { 0 } else { first_16(&file.blake3) };
                output.table("checkpoint", Table { rows: 0, digest: RowDigest(content), files: vec![file] });
            }
            Ok(output)
        })
        .await?;
    Ok(Some(published))
}

fn first_16(digest: &Digest) -> u128 {
    u128::from_le_bytes(digest.0[..16].try_into().expect("16 of 32 bytes"))
}

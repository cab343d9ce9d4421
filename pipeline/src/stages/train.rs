//! train: trains a Llama on the packed sequences. Its checkpoint is a stage's output like any other.

use std::sync::atomic::Ordering;

use lengthwise_model::checkpoint::Checkpoint;
use lengthwise_model::comm::LaunchEnv;
use lengthwise_model::plan::Plan;
use lengthwise_model::train::model_config;
use lengthwise_model::{
    Location as Folder, StepMetrics as Metrics, TrainConf, TrainJob, checkpoint_parts, resume,
};
use object_store::ObjectStore;
use serde_json::{Value, json};

use super::tokenizer::Tokenizer;
use crate::hash::{Digest, RowDigest};
use crate::output::{self, File, Ingredients, Output, Published, Table};
use crate::run::{Run, ingredients};
use crate::stage::Stage;
use crate::storage::Location;
use crate::{Error, Result};

/// The conf's `[train]` table, if it has one. Errors point into the conf.
pub fn conf(run: &Run) -> Result<Option<TrainConf>> {
    let Some(conf) = run.conf.train::<TrainConf>()? else { return Ok(None) };
    conf.check().map_err(|e| run.conf.wrong(&["train"], e.to_string(), "in this table", None))?;
    Ok(Some(conf))
}

/// Checks that this build can train on the devices that the conf names, before hours are spent on the
/// training data.
pub fn check_devices(run: &Run) -> Result<()> {
    let Some(conf) = conf(run)? else { return Ok(()) };
    conf.available().map_err(|e| {
        let help = "or end at the packed dataset with `--until pack`".to_owned();
        run.conf.wrong(&["train", "devices"], e.to_string(), "not in this build", Some(help))
    })
}

/// Checks that the checkpoint to start from exists and knows the tokenizer's ids, before hours are spent on
/// the training data.
pub async fn check_checkpoint(run: &Run, tokenizer: &Tokenizer) -> Result<()> {
    let Some(url) = conf(run)?.and_then(|conf| conf.checkpoint) else { return Ok(()) };
    let place = ["train", "checkpoint"];
    let at = run.stores.open(&url).map_err(|e| run.conf.names_wrong(&place, e))?;
    let checkpoint = Checkpoint::open(&(&at).into()).await.map_err(|e| match e {
        lengthwise_model::Error::Checkpoint { .. } => {
            run.conf.wrong(&place, e.to_string(), "named here", None)
        }
        other => other.into(),
    })?;
    if let Some((message, help)) = beyond(&tokenizer.loaded, checkpoint.config.vocab_size) {
        return Err(run.conf.wrong(&["tokenizer"], message, "this tokenizer", Some(help)));
    }
    if let Some(own) = at.join("tokenizer.json").get().await?
        && Digest::of(&own) != tokenizer.fingerprint
    {
        tracing::warn!("the tokenizer is not the checkpoint's own {}", at.join("tokenizer.json").url());
    }
    Ok(())
}

/// What is wrong with a tokenizer for a checkpoint that knows `known` ids, and what to do. Added tokens count
/// too: a text that contains one literally gets its id, and among billions of tokens some do.
fn beyond(tokenizer: &crate::algorithms::tokenizer::Tokenizer, known: usize) -> Option<(String, String)> {
    let (own, all) = (tokenizer.own_vocab_size(), tokenizer.vocab_size());
    let most = own.max(all);
    if most <= known {
        return None;
    }
    let mut message = format!("the tokenizer has ids up to {}, and the checkpoint knows {known}", most - 1);
    if own > known {
        return Some((message, "take the tokenizer.json that the checkpoint was trained with".to_owned()));
    }
    let added: Vec<String> = tokenizer
        .added()
        .into_iter()
        .filter(|(id, _)| *id as usize >= known)
        .map(|(id, token)| format!("{:?} ({id})", token.content))
        .collect();
    let more = if added.len() > 4 { ", …" } else { "" };
    message += &format!(": beyond are its added tokens {}{more}", added[..added.len().min(4)].join(", "));
    let help = "a document with the text of one would end the training; take them out of `added_tokens` in a copy of the \
                tokenizer.json, and such a text is encoded as any other";
    Some((message, help.to_owned()))
}

/// The names of the files of a Hugging Face folder, each with its digest.
pub async fn identity(checkpoint: &Location) -> Result<Value> {
    let mut parts = vec![];
    for name in checkpoint_parts(&checkpoint.into()).await? {
        parts.push(json!([name, checkpoint.join(&name).digest().await?]));
    }
    Ok(json!(parts))
}

/// Table `checkpoint`, a Hugging Face folder, and table `logs` with its `metrics.jsonl`. `None` if the conf
/// has no `[train]` table, or if another process leads the training and publishes.
///
/// Devices are not part of its key, because the result should not depend on them.
pub async fn obtain(run: &Run, tokenizer: &Tokenizer, packed: &Published) -> Result<Option<Published>> {
    let Some(conf) = conf(run)? else { return Ok(None) };
    let checkpoint = conf.checkpoint.as_ref().map(|url| run.stores.open(url)).transpose()?;
    let start = match &checkpoint {
        Some(at) => identity(at).await?,
        None => json!(null),
    };
    let (bos, eos) = tokenizer.specials(run)?;
    // digests of the files, not of their rows: the same sequences in another order train another model
    let files: Vec<Digest> = packed.table("train").files.into_iter().map(|file| file.blake3).collect();
    let list = ingredients(
        Stage::Train,
        [
            ("dataset", json!(files)),
            ("sequences", json!(packed.count("sequences"))),
            ("settings", conf.content()),
            ("checkpoint", start),
            ("tokenizer", json!(tokenizer.fingerprint)),
        ],
    );
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let attempt = format!("attempt-{}-{}", now.as_millis(), std::process::id());
    let job_in = |at: &Location| TrainJob {
        conf: conf.clone(),
        dataset: (&packed.folder).into(),
        dataset_digest: digest_of(&json!(files)),
        checkpoint: checkpoint.as_ref().map(Folder::from),
        output: at.into(),
        checkpoints: (&at.join("checkpoints")).into(),
        logs: (&at.join(&attempt)).into(),
        vocab_size: tokenizer.loaded.vocab_size(),
        sequence_tokens: run.conf.pack.sequence_tokens.0 as usize,
        bos,
        eos,
        tokenizer: Some(tokenizer.json.clone()),
    };
    if follows()? {
        // the first rank publishes; this one takes part in the computation, unless there is nothing to
        // compute
        let (_, at) = run.place(Stage::Train, &mut list.clone())?;
        if output::find(&at).await?.is_none() {
            train(run, &job_in(&at), &mut |_| {}).await?;
        }
        return Ok(None);
    }
    let published = run
        .obtain(Stage::Train, list.clone(), async |draft| {
            warn_of_other_lengths(run, &list, &draft.folder).await?;
            // check the files here: the trainer cannot tell a broken file from another one
            for file in packed.table("train").files {
                file.check(&packed.folder).await?;
            }
            let job = job_in(&draft.folder);
            let steps = job.conf.steps(job.sequence_tokens);
            let bar = run.progress.stage("train", steps);
            let mut on_step = |step: &Metrics| bar.say(step.step, line(step, steps));
            let trained = train(run, &job, &mut on_step).await?;
            let mut output = Output::default();
            output.count("parameters", trained.parameters);
            output.count("steps", trained.steps);
            output.count("tokens", trained.tokens);
            for written in trained.files {
                let blake3 = Digest(written.blake3);
                let digest = RowDigest(first_16(&blake3));
                let file = File { name: written.name, bytes: written.bytes, rows: 0, blake3 };
                output.table("checkpoint", Table { rows: 0, digest, files: vec![file] });
            }
            // logs say how fast the training was, which is not part of the content: their digest of rows is 0
            for written in trained.logs {
                let name = format!("{attempt}/{}", written.name);
                let file = File { name, bytes: written.bytes, rows: 0, blake3: Digest(written.blake3) };
                output.table("logs", Table { rows: 0, digest: RowDigest(0), files: vec![file] });
            }
            Ok(output)
        })
        .await?;
    // the training is published, so it will not be resumed from its intermediate checkpoints
    resume::clear(&(&published.folder.join("checkpoints")).into()).await?;
    Ok(Some(published))
}

/// Warns if this training starts from the beginning although there is another one that differs only in its
/// length.
async fn warn_of_other_lengths(run: &Run, list: &Ingredients, folder: &Location) -> Result<()> {
    let saved = async |folder: &Location| resume::latest(&(&folder.join("checkpoints")).into()).await;
    if saved(folder).await?.is_some() {
        return Ok(());
    }
    let all = run.output.join("stages").join(Stage::Train.name());
    let listed = all.store.list_with_delimiter(Some(&all.path)).await;
    let listed = listed.map_err(|source| Error::Storage { doing: "list", url: all.url(), source })?;
    for name in listed.common_prefixes.iter().filter_map(|path| path.filename()) {
        let other = all.join(name);
        let url = other.url();
        if let Some(manifest) = output::find(&other).await? {
            let same =
                |name: &str| but_for_length(&manifest.ingredients[name]) == but_for_length(&list[name]);
            if list.keys().all(|name| manifest.ingredients.contains_key(name) && same(name)) {
                tracing::warn!(
                    "a training of {} steps with the same settings is finished; it keeps no optimizer to go on with, so \
                     this one begins anew. To train its model further, set train.checkpoint to {url}",
                    manifest.counts.get("steps").copied().unwrap_or(0)
                );
            }
        } else if let Ok(Some(saved)) = saved(&other).await
            && saved.dataset == digest_of(&list["dataset"])
            && but_for_length(&saved.settings) == but_for_length(&list["settings"])
        {
            tracing::warn!(
                "a training of another length with the same settings was stopped after step {}, in {url}; it goes on \
                 with the length that it was begun with, and this one begins anew",
                saved.step
            );
        }
    }
    Ok(())
}

/// A training's settings without its length.
fn but_for_length(settings: &Value) -> Value {
    let mut settings = settings.clone();
    if let Some(settings) = settings.as_object_mut() {
        settings.shift_remove("steps");
        settings.shift_remove("tokens");
    }
    settings
}

/// Identifies a dataset by the digests of its files.
fn digest_of(files: &Value) -> String {
    Digest::of(files.to_string().as_bytes()).short()
}

/// Whether this process is a rank of a training that another process leads. The leading process runs the
/// stages and publishes.
pub fn follows() -> Result<bool> {
    Ok(LaunchEnv::from_env()?.is_some_and(|launch| launch.rank > 0))
}

async fn train(
    run: &Run,
    job: &TrainJob,
    on_step: &mut (dyn FnMut(&Metrics) + Send),
) -> Result<lengthwise_model::Summary> {
    run.training.store(true, Ordering::Relaxed);
    let trained = lengthwise_model::train(job, &run.stop, on_step).await;
    run.training.store(false, Ordering::Relaxed);
    trained.map_err(|error| match error {
        lengthwise_model::Error::Stopped(_) => Error::Stopped,
        error => error.into(),
    })
}

/// What the conf's training will need; `None` if the conf has no `[train]` table.
pub async fn plan(run: &Run) -> Result<Option<Plan>> {
    let Some(conf) = conf(run)? else { return Ok(None) };
    let checkpoint = conf.checkpoint.as_ref().map(|url| run.stores.open(url)).transpose()?;
    let vocab_size = match (&run.conf.tokenizer.train, &run.conf.tokenizer.url) {
        _ if checkpoint.is_some() => 0,
        (Some(train), _) => train.vocab as usize,
        (None, _) => super::tokenizer::find(run).await?.loaded.vocab_size(),
    };
    let sequence_tokens = run.conf.pack.sequence_tokens.0 as usize;
    let checkpoint = checkpoint.as_ref().map(Folder::from);
    let config = model_config(&conf, checkpoint.as_ref(), vocab_size, sequence_tokens).await?;
    Ok(Some(Plan::new(&conf, &config, sequence_tokens)))
}

/// The progress line of a training step.
fn line(step: &Metrics, steps: u64) -> String {
    let mut line = format!(
        "step {} of {steps}, loss {:.3}, gradients {:.2}, {:.0} tokens/s",
        step.step, step.loss, step.grad_norm, step.tokens_per_second
    );
    if let Some(fraction) = step.peak_fraction {
        line += &format!(", {:.1} % of peak", 100.0 * fraction);
    }
    if let Some(bytes) = step.memory_bytes {
        line += &format!(", {:.1} GB", bytes as f64 / 1e9);
    }
    line
}

fn first_16(digest: &Digest) -> u128 {
    u128::from_le_bytes(digest.0[..16].try_into().expect("16 of 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithms::tokenizer::tests::{added, sentencepiece};

    #[test]
    fn ids_that_a_text_can_have_and_a_checkpoint_has_not_are_named() {
        let tokenizer = |extra: &[&str]| {
            let json = sentencepiece(|file| {
                let list = file["added_tokens"].as_array_mut().unwrap();
                list.extend((5_000..).zip(extra).map(|(id, token)| added(id, token)));
            });
            crate::algorithms::tokenizer::Tokenizer::from_json(&json, "t").unwrap()
        };
        let plain = tokenizer(&[]);
        let own = plain.own_vocab_size();
        assert_eq!(plain.vocab_size(), own);
        // Llama 3 has as many embedding rows as ids; Qwen and Phi-3 have more
        assert_eq!((beyond(&plain, own), beyond(&plain, own + 64)), (None, None));
        let (message, help) = beyond(&plain, own - 1).unwrap();
        assert_eq!(
            message,
            format!("the tokenizer has ids up to {}, and the checkpoint knows {}", own - 1, own - 1)
        );
        assert!(help.contains("that the checkpoint was trained with"), "{help}");
        // LLaMA's tokenizer with an added token for padding, as many copies of it have
        let padded = tokenizer(&["<pad>"]);
        assert_eq!((padded.own_vocab_size(), padded.vocab_size()), (own, own + 1));
        assert_eq!(beyond(&padded, own + 1), None);
        let (message, help) = beyond(&padded, own).unwrap();
        assert_eq!(
            message,
            format!(
                "the tokenizer has ids up to {own}, and the checkpoint knows {own}: beyond are its added tokens \"<pad>\" ({own})"
            )
        );
        assert!(help.contains("take them out of `added_tokens`"), "{help}");
    }
}

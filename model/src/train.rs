//! Training: sequences in, a checkpoint out. Thin: one device, one rank, a batch at a time.

use std::time::Instant;

use burn::tensor::Device;
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::json;

use crate::backprop::{NO_TARGET, backprop};
use crate::dataset::{Dataset, Sequence};
use crate::llama::{Config, Rope, Weights};
use crate::optim::{AdamW, rate};
use crate::{Error, Location, Result, checkpoint};

/// The conf's `[train]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConf {
    /// The folder of a Hugging Face Llama to go on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
    /// The shape of a fresh model, where there is no checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<Shape>,
    pub steps: u64,
    /// 2e-5 by default, constant after the warm-up (paper §4).
    #[serde(default = "default_rate")]
    pub learning_rate: f64,
    #[serde(default)]
    pub warmup_steps: u64,
    /// Tokens a step, rounded to whole sequences; one sequence by default. The paper's are 4M.
    #[serde(default, deserialize_with = "count", skip_serializing_if = "Option::is_none")]
    pub batch_tokens: Option<u64>,
    #[serde(default = "default_decay")]
    pub weight_decay: f64,
    /// The base of RoPE, where it is not the checkpoint's: the paper's runs raise it (§4).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// `["flex"]`: the embedded device.
    #[serde(default = "default_devices")]
    pub devices: Vec<String>,
    /// Of a fresh model's weights.
    #[serde(default)]
    pub seed: u64,
}

/// `[train.shape]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    /// As many as heads by default.
    #[serde(default)]
    pub kv_heads: Option<usize>,
    #[serde(default)]
    pub tied: bool,
}

fn default_rate() -> f64 {
    2e-5
}

fn default_decay() -> f64 {
    0.1
}

fn default_devices() -> Vec<String> {
    vec!["flex".into()]
}

/// A number, or a text such as "4M".
fn count<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a number of tokens, such as 65536 or \"4M\"")]
    enum Count {
        Number(u64),
        Text(String),
    }
    let text = match Count::deserialize(from)? {
        Count::Number(number) => return Ok(Some(number)),
        Count::Text(text) => text,
    };
    let (digits, unit) = match text.chars().last() {
        Some('K') => (&text[..text.len() - 1], 1e3),
        Some('M') => (&text[..text.len() - 1], 1e6),
        Some('B') => (&text[..text.len() - 1], 1e9),
        _ => (text.as_str(), 1.0),
    };
    match digits.parse::<f64>() {
        Ok(number) if number > 0.0 && (number * unit).fract() == 0.0 => Ok(Some((number * unit) as u64)),
        _ => Err(serde::de::Error::custom(format!(
            "`{text}` is not a number of tokens, such as 65536 or \"4M\""
        ))),
    }
}

impl TrainConf {
    /// Whether the table makes sense, before anything is computed.
    pub fn check(&self) -> Result<()> {
        let wrong = |message: &str| Err(Error::Conf(message.into()));
        match (&self.checkpoint, &self.shape) {
            (None, None) => return wrong("train: set `checkpoint`, or `shape` for a fresh model"),
            (Some(_), Some(_)) => {
                return wrong(
                    "train: `checkpoint` has a shape of its own; set one of `checkpoint` and `shape`",
                );
            }
            _ => {}
        }
        if self.steps == 0 {
            return wrong("train.steps has to be at least 1");
        }
        if !(self.learning_rate.is_finite() && self.learning_rate > 0.0) {
            return wrong("train.learning_rate has to be a positive number");
        }
        match self.devices.as_slice() {
            [name] if name == "flex" => Ok(()),
            [] => wrong("train.devices is empty; this build has \"flex\""),
            [name] => {
                Err(Error::Conf(format!("train.devices: this build has no device `{name}`; it has \"flex\"")))
            }
            _ => wrong("train.devices: this version trains on one device; name one"),
        }
    }

    /// The fresh model's config.
    fn config(&self, shape: &Shape, job: &TrainJob) -> Result<Config> {
        let config = json!({
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads.unwrap_or(shape.heads),
            "vocab_size": job.vocab_size,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": shape.tied,
            "max_position_embeddings": job.sequence_tokens,
            "bos_token_id": job.bos,
            "eos_token_id": job.eos,
        });
        let config: Config =
            serde_json::from_value(config).map_err(|e| Error::Conf(format!("train.shape: {e}")))?;
        config.check().map_err(|e| Error::Conf(format!("train.shape: {e}")))?;
        Ok(config)
    }
}

/// What to train on what.
#[derive(Clone, Debug)]
pub struct TrainJob {
    pub conf: TrainConf,
    /// The folder of `train-*.parquet`.
    pub dataset: Location,
    pub checkpoint: Option<Location>,
    /// The tokenizer's: a fresh model gets it.
    pub vocab_size: usize,
    pub sequence_tokens: usize,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// Goes into the checkpoint's folder.
    pub tokenizer: Option<Bytes>,
}

/// One step, as in `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    pub step: u64,
    pub loss: f64,
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// Tokens seen so far.
    pub tokens: u64,
    pub tokens_per_second: f64,
}

/// What training gave: the files of a checkpoint's folder, `metrics.jsonl` among them.
pub struct Summary {
    pub parameters: u64,
    pub tokens: u64,
    pub loss: f64,
    pub files: Vec<(String, Vec<u8>)>,
}

/// Trains, and calls `on_step` after every step; an error from it ends the training.
pub async fn train(job: &TrainJob, on_step: &mut (dyn FnMut(&Step) -> Result<()> + Send)) -> Result<Summary> {
    job.conf.check()?;
    let device = Device::flex();
    let (mut config, mut weights) = match (&job.checkpoint, &job.conf.shape) {
        (Some(folder), _) => checkpoint::read(folder, &device).await?,
        (None, Some(shape)) => {
            let config = job.conf.config(shape, job)?;
            let weights = Weights::fresh(&config, job.conf.seed, &device);
            (config, weights)
        }
        (None, None) => return Err(Error::Conf("train: set `checkpoint` or `shape`".into())),
    };
    if let Some(theta) = job.conf.rope_theta {
        config.rope_theta = Some(theta);
        if let Some(parameters) = &mut config.rope_parameters {
            parameters["rope_theta"] = json!(theta);
        }
    }
    match config.max_position_embeddings {
        Some(positions) if positions < job.sequence_tokens => {
            tracing::warn!(
                "the checkpoint was made for {positions} positions, sequences have {}",
                job.sequence_tokens
            );
            config.max_position_embeddings = Some(job.sequence_tokens);
        }
        _ => {}
    }
    let rope = Rope::new(&config, job.sequence_tokens, &device)?;
    let mut optimizer = AdamW::new(&config, &weights, job.conf.weight_decay);
    let mut dataset = Dataset::open(&job.dataset, config.vocab_size).await?;
    let batch = job
        .conf
        .batch_tokens
        .map_or(1, |tokens| (tokens as f64 / job.sequence_tokens as f64).round().max(1.0) as usize);
    if job.conf.batch_tokens.is_some() {
        tracing::info!("a step is {batch} sequences, {} tokens", batch * job.sequence_tokens);
    }
    let parameters = config.parameters().iter().map(|(_, [rows, columns])| (rows * columns) as u64).sum();

    let (mut tokens, mut loss, mut metrics) = (0, f64::NAN, Vec::new());
    for step in 1..=job.conf.steps {
        let started = Instant::now();
        let mut sequences = vec![];
        for _ in 0..batch {
            sequences.push(dataset.next().await?);
        }
        tokens += sequences.iter().map(|s| s.ids.len() as u64).sum::<u64>();
        let learning_rate = rate(step, job.conf.learning_rate, job.conf.warmup_steps);
        let (shared_config, shared_rope) = (config.clone(), rope.clone());
        let computing = tokio::task::spawn_blocking(move || {
            let (loss, gradients) = gradients(&shared_config, &weights, &sequences, &shared_rope);
            let (weights, norm) = optimizer.step(&shared_config, weights, gradients, learning_rate);
            (weights, optimizer, loss, norm)
        });
        let (new_weights, new_optimizer, step_loss, grad_norm) =
            computing.await.expect("a step does not panic");
        (weights, optimizer, loss) = (new_weights, new_optimizer, step_loss);
        let seconds = started.elapsed().as_secs_f64();
        let tokens_per_second = (batch * job.sequence_tokens) as f64 / seconds;
        let done = Step { step, loss, grad_norm, learning_rate, tokens, tokens_per_second };
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(Error::Diverged { step, loss });
        }
        metrics.extend(serde_json::to_vec(&done).unwrap_or_default());
        metrics.push(b'\n');
        on_step(&done)?;
    }
    let mut files = checkpoint::files(&config, &weights, job.tokenizer.clone())?;
    files.push(("metrics.jsonl".to_owned(), metrics));
    Ok(Summary { parameters, tokens, loss, files })
}

/// The mean loss over a batch's targets, and its gradients.
fn gradients(config: &Config, weights: &Weights, batch: &[Sequence], rope: &Rope) -> (f64, Weights) {
    let targets = batch.iter().flat_map(|s| &s.targets).filter(|t| **t != NO_TARGET).count().max(1);
    let mut sum: Option<(f64, Vec<burn::tensor::Tensor<2>>)> = None;
    for sequence in batch {
        let (loss, gradients) =
            backprop(config, weights, &sequence.ids, &sequence.targets, rope, 1.0 / targets as f64);
        let flat = gradients.flat();
        sum = Some(match sum {
            None => (loss, flat),
            Some((before, tensors)) => {
                (before + loss, tensors.into_iter().zip(flat).map(|(a, b)| a + b).collect())
            }
        });
    }
    let (loss, flat) = sum.expect("a batch has a sequence");
    (loss / targets as f64, Weights::from_flat(config, flat))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::tests::{folder, packed};

    fn conf(extra: serde_json::Value) -> TrainConf {
        let mut all = json!({
            "shape": { "hidden_size": 16, "intermediate_size": 32, "layers": 2, "heads": 4, "kv_heads": 2 },
            "steps": 30, "learning_rate": 1e-2, "warmup_steps": 2,
        });
        for (key, value) in extra.as_object().unwrap() {
            all[key] = value.clone();
        }
        serde_json::from_value(all).unwrap()
    }

    async fn job(conf: TrainConf) -> TrainJob {
        let row = |seed: i32| {
            let ids: Vec<i32> = (0..32).map(|i| (i * seed) % 11).collect();
            (ids, 1, vec![("a", 0, 32)])
        };
        let dataset = folder(&[("train-00000-of-00001.parquet", packed(&[row(3), row(5)]))]).await;
        let (checkpoint, bos, eos, tokenizer) = (None, Some(0), None, None);
        TrainJob { conf, dataset, checkpoint, vocab_size: 11, sequence_tokens: 32, bos, eos, tokenizer }
    }

    async fn losses(conf: TrainConf) -> Vec<f64> {
        let mut losses = vec![];
        train(&job(conf).await, &mut |step| {
            losses.push(step.loss);
            Ok(())
        })
        .await
        .unwrap();
        losses
    }

    #[tokio::test]
    async fn a_model_learns_what_it_sees_again_and_again() {
        let losses = losses(conf(json!({ "batch_tokens": 64 }))).await;
        assert!((losses[0] - (11f64).ln()).abs() < 0.1, "{}", losses[0]);
        assert!(losses[29] < 0.5 * losses[0], "{losses:?}");
    }

    #[tokio::test]
    async fn the_same_seed_gives_the_same_losses() {
        let first = losses(conf(json!({ "steps": 5 }))).await;
        assert_eq!(first, losses(conf(json!({ "steps": 5 }))).await);
        assert_ne!(first, losses(conf(json!({ "steps": 5, "seed": 2 }))).await);
    }

    #[tokio::test]
    async fn training_goes_on_from_a_checkpoint() {
        let job = job(conf(json!({}))).await;
        let first = train(&job, &mut |_| Ok(())).await.unwrap();
        let files: Vec<(&str, Vec<u8>)> =
            first.files.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
        let mut next = job.clone();
        next.checkpoint = Some(folder(&files).await);
        next.conf.shape = None;
        next.conf.checkpoint = Some("there".into());
        next.conf.steps = 1;
        let second = train(&next, &mut |_| Ok(())).await.unwrap();
        assert!(second.loss < 1.2 * first.loss + 0.1, "{} {}", second.loss, first.loss);
    }

    #[test]
    fn a_train_table_that_makes_no_sense_says_why() {
        for (extra, message) in [
            (json!({ "devices": ["cuda:0"] }), "this build has no device `cuda:0`"),
            (json!({ "checkpoint": "x" }), "set one of `checkpoint` and `shape`"),
            (json!({ "steps": 0 }), "train.steps"),
            (json!({ "learning_rate": -1.0 }), "train.learning_rate"),
        ] {
            let error = conf(extra).check().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        assert_eq!(conf(json!({ "batch_tokens": "4M" })).batch_tokens, Some(4_000_000));
        assert_eq!(conf(json!({ "batch_tokens": "1.5K" })).batch_tokens, Some(1_500));
    }
}

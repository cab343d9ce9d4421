//! The training loop: it reads packed sequences and writes a checkpoint. Every rank runs the same steps on its own shard.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

use burn_tensor::{Device, FloatDType, Tensor};
use bytes::Bytes;
use serde_json::{Map, json};
use tokio::runtime::Handle;
use tokio::sync::mpsc::{Sender, channel};

use crate::backprop::{RankContext, SequenceShard};
use crate::checkpoint::{self, Checkpoint, initial_weights};
use crate::comm::{self, Comm, LaunchEnv, TIMEOUT, threads};
use crate::conf::{Shape, TrainConf};
use crate::config::{Config, Scaling};
use crate::dataset::{Dataset, NO_TARGET, Sequence};
use crate::device::{self, DeviceName};
use crate::metrics::{self, POSITION_RANGES, StepMetrics, range_index};
use crate::optim::{AdamW, all_reduce_sum, global_norm, learning_rate};
use crate::resume::{self, Manifest, TrainingCheckpoint};
use crate::ring::Sharding;
use crate::shards::{Shards, Unit};
use crate::{Error, Location, Result, Written};

/// What to train, on which dataset, and where the results go.
#[derive(Clone, Debug)]
pub struct TrainJob {
    pub conf: TrainConf,
    /// The folder of `train-*.parquet`.
    pub dataset: Location,
    pub dataset_digest: String,
    pub checkpoint: Option<Location>,
    /// Where the model's folder is written.
    pub output: Location,
    /// Where `metrics.jsonl` and TensorBoard's file are written. Each attempt has a folder of its own, because its times differ.
    pub logs: Location,
    /// Where the `step-N/` folders are, from which a stopped training resumes.
    pub checkpoints: Location,
    /// The tokenizer's vocabulary size, which a new model gets.
    pub vocab_size: usize,
    pub sequence_tokens: usize,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// `tokenizer.json`, which is copied into the checkpoint's folder.
    pub tokenizer: Option<Bytes>,
}

/// What a training produced.
#[derive(Clone, Debug)]
pub struct Summary {
    pub parameters: u64,
    pub tokens: u64,
    pub steps: u64,
    pub loss: f64,
    /// The files that this rank wrote into the model's folder.
    pub files: Vec<Written>,
    /// `metrics.jsonl` and TensorBoard's file.
    pub logs: Vec<Written>,
}

/// How many ranges of positions the loss is reported for.
const RANGES: usize = POSITION_RANGES.len();

/// The file beside the checkpoints that holds the metrics of a training that diverged.
const DIVERGED: &str = "metrics-diverged.jsonl";

/// A gradient norm this many times the median of the last [`NORM_WINDOW`] steps counts as divergence …
const NORM_SPIKE: f64 = 100.0;
const NORM_WINDOW: usize = 100;
/// … once this many steps are done.
const MIN_STEPS: usize = 20;

/// Trains, from the latest checkpoint if there is one, and calls `on_step` after every step. When `stop` is set, it finishes
/// the step, writes a checkpoint and returns [`Error::Stopped`].
///
/// The ranks are threads of this process, unless a launcher started the process as one rank of several. Only rank 0's
/// summary has files.
pub async fn train(
    job: &TrainJob,
    stop: &Arc<AtomicBool>,
    on_step: &mut (dyn FnMut(&StepMetrics) + Send),
) -> Result<Summary> {
    job.conf.check()?;
    job.conf.available()?;
    if job.conf.deterministic {
        device::use_deterministic_kernels();
    }
    // Capacity 1, so that a stop request takes effect within a step.
    let (sender, mut receiver) = channel(1);
    let (job, stop, runtime) = (job.clone(), stop.clone(), Handle::current());
    let training = tokio::task::spawn_blocking(move || {
        let rank = |world: &dyn Comm, sequence: &dyn Comm| {
            let steps = (world.rank() == 0).then(|| sender.clone());
            RankTrainer::new(&job, world, sequence, &runtime)?.train(&stop, steps)
        };
        match LaunchEnv::from_env()?.filter(|launch| launch.world_size > 1) {
            None => {
                let (ranks, sequence_ranks) = (job.conf.ranks(), job.conf.sequence_ranks());
                Ok(threads::run(ranks, sequence_ranks, TIMEOUT, rank)?.swap_remove(0))
            }
            Some(launch) => comm::run_process(launch, &job.conf, rank),
        }
    });
    // The loop ends when the ranks have dropped their senders.
    while let Some(step) = receiver.recv().await {
        on_step(&step);
    }
    training.await.map_err(|e| Error::Rank { rank: 0, message: e.to_string() })?
}

/// The config of the model that `conf` asks for. A new model has the tokenizer's vocabulary.
pub async fn model_config(
    conf: &TrainConf,
    checkpoint: Option<&Location>,
    vocab_size: usize,
    sequence_tokens: usize,
) -> Result<Config> {
    let mut config = match (checkpoint, &conf.shape) {
        (Some(folder), _) => checkpoint::read_config(folder).await?,
        (None, Some(shape)) => config_of_shape(shape, vocab_size, sequence_tokens)?,
        (None, None) => return Err(Error::Conf("train: set `checkpoint` or `shape`".into())),
    };
    if let Some(theta) = conf.rope_theta {
        config.set_theta(theta);
    }
    if let Some(scaling) = &conf.rope_scaling {
        config.set_scaling(scaling.clone());
    }
    Ok(config)
}

/// The config of a new model of this shape.
fn config_of_shape(shape: &Shape, vocab_size: usize, sequence_tokens: usize) -> Result<Config> {
    let config = json!({
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads.unwrap_or(shape.heads),
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": sequence_tokens,
    });
    let config: Config =
        serde_json::from_value(config).map_err(|e| Error::Conf(format!("train.shape: {e}")))?;
    config.check().map_err(|e| Error::Conf(format!("train.shape: {e}")))?;
    Ok(config)
}

/// This rank's shards before the first step: from the checkpoint that the training starts from, or of a new model.
fn initial_shards(
    job: &TrainJob,
    units: Vec<Unit>,
    world: &dyn Comm,
    device: &Device,
    runtime: &Handle,
) -> Result<Shards> {
    let pretrained = match &job.checkpoint {
        Some(folder) => Some(runtime.block_on(Checkpoint::open(folder))?),
        None => None,
    };
    let read = |i: usize, range| match &pretrained {
        Some(checkpoint) => runtime.block_on(checkpoint.read(&units[i], range)),
        None => Ok(initial_weights(&units, i, range, job.conf.seed)),
    };
    Shards::new(units.clone(), world, device, read)
}

/// The training loop of one rank.
struct RankTrainer<'a> {
    job: &'a TrainJob,
    world: &'a dyn Comm,
    sequence: &'a dyn Comm,
    runtime: &'a Handle,
    device_name: DeviceName,
    config: Config,
    shards: Shards,
    optimizer: AdamW,
    dataset: Dataset,
    /// The metrics of all steps so far.
    history: Vec<StepMetrics>,
    /// The same steps as the bytes of `metrics.jsonl`.
    metrics_jsonl: Vec<u8>,
}

impl<'a> RankTrainer<'a> {
    fn new(
        job: &'a TrainJob,
        world: &'a dyn Comm,
        sequence: &'a dyn Comm,
        runtime: &'a Handle,
    ) -> Result<Self> {
        let conf = &job.conf;
        let device_name =
            conf.device_of(LaunchEnv::from_env()?.map_or(world.rank(), |launch| launch.local_rank))?;
        let device = device_name.open()?;
        let config = model_config(conf, job.checkpoint.as_ref(), job.vocab_size, job.sequence_tokens);
        let mut config = runtime.block_on(config)?;
        if conf.shape.is_some() {
            config.bos_token_id = job.bos.map(Into::into);
            config.eos_token_id = job.eos.map(Into::into);
        }
        let units = Unit::all(&config);
        let settings = conf.content();
        let saved = runtime.block_on(TrainingCheckpoint::find_latest(
            &job.checkpoints,
            &job.dataset_digest,
            &settings,
        ))?;
        let (shards, optimizer, history, metrics_jsonl) = match &saved {
            Some(saved) => {
                runtime.block_on(saved.verify(world))?;
                let (shards, optimizer) = saved.restore(units, world, &device, conf.weight_decay, runtime)?;
                let lines =
                    runtime.block_on(saved.folder.join("metrics.jsonl").get())?.unwrap_or_default().to_vec();
                let history = metrics::parse_steps(&lines).map_err(|e| Error::Checkpoint {
                    at: saved.folder.url(),
                    message: format!("metrics.jsonl: {e}"),
                })?;
                (shards, optimizer, history, lines)
            }
            None => {
                let shards = initial_shards(job, units, world, &device, runtime)?;
                let optimizer = AdamW::new(&shards, conf.weight_decay);
                (shards, optimizer, vec![], vec![])
            }
        };
        let dataset = runtime.block_on(Dataset::open(&job.dataset, config.vocab_size))?;
        let new = Self {
            job,
            world,
            sequence,
            runtime,
            device_name,
            config,
            shards,
            optimizer,
            dataset,
            history,
            metrics_jsonl,
        };
        if world.rank() == 0 {
            new.log_start(saved.as_ref());
        }
        Ok(new)
    }

    fn log_start(&self, saved: Option<&TrainingCheckpoint>) {
        let (conf, tokens) = (&self.job.conf, self.job.sequence_tokens);
        if let Some(saved) = saved {
            tracing::info!("training goes on from {}", saved.folder.path);
        }
        let positions = self.config.max_position_embeddings;
        if positions < tokens {
            tracing::warn!("the model was made for {positions} positions, sequences have {tokens}");
        }
        let batch = conf.batch(tokens);
        if conf.batch_tokens.is_some() {
            tracing::info!("a step is {batch} sequences, {} tokens", batch * tokens as u64);
        }
        let groups = (self.world.size() / self.sequence.size()) as u64;
        if !batch.is_multiple_of(groups) {
            tracing::warn!("{batch} sequences a step keep {groups} groups of ranks busy only in part");
        }
    }

    fn context(&self) -> Result<RankContext<'a>> {
        let precision = FloatDType::from(self.job.conf.precision);
        let host = if self.job.conf.offload { self.device_name.host_device() } else { None };
        Ok(RankContext {
            config: self.config.clone(),
            world: self.world,
            sequence: self.sequence,
            device: self.device_name.open()?,
            kernel: self.device_name.kernel(precision, self.config.head_dim()),
            precision,
            recompute: self.job.conf.recompute,
            offload: host.map(DeviceName::open).transpose()?,
        })
    }

    /// Runs the remaining steps, then writes the model's folder.
    fn train(mut self, stop: &AtomicBool, on_step: Option<Sender<StepMetrics>>) -> Result<Summary> {
        let conf = &self.job.conf;
        let steps = conf.steps(self.job.sequence_tokens);
        let context = self.context()?;
        while (self.history.len() as u64) < steps {
            let stopped = self.step(&context, steps, stop)?;
            let step = self.history.len() as u64;
            if let (Some(on_step), Some(metrics)) = (&on_step, self.history.last()) {
                // Nobody has to listen: the step is in metrics.jsonl, too.
                let _ = on_step.blocking_send(metrics.clone());
            }
            let due = conf.checkpoint_every.is_some_and(|every| step.is_multiple_of(every));
            if (due || stopped) && step < steps {
                self.save_checkpoint(step)?;
            }
            if stopped && step < steps {
                return Err(Error::Stopped(step));
            }
        }
        let files = self.write_model(&self.job.output)?;
        let logs = self.write_logs(&self.job.logs)?;
        let last = self.history.last();
        Ok(Summary {
            parameters: self.config.parameter_count(),
            tokens: last.map_or(0, |step| step.tokens),
            steps,
            loss: last.map_or(f64::NAN, |step| step.loss),
            files,
            logs,
        })
    }

    /// Trains one step on a batch of sequences. Returns whether any rank was told to stop.
    fn step(&mut self, context: &RankContext<'_>, steps: u64, stop: &AtomicBool) -> Result<bool> {
        let started = Instant::now();
        let (conf, tokens) = (&self.job.conf, self.job.sequence_tokens);
        let step = self.history.len() as u64 + 1;
        let batch = conf.batch(tokens);
        let samples = (step - 1) * batch..step * batch;

        let inputs = self.read_shards(samples.clone())?;
        let targets = inputs.iter().flat_map(|shard| &shard.targets).filter(|t| **t != NO_TARGET).count();
        let targets = all_reduce_sum(self.world, &[targets as f64], &context.device)?[0].max(1.0);

        // The ranks sum losses and counts by range of positions, whether they were told to stop, and each rank's memory.
        let (gradients, mut sums) = self.accumulate(context, inputs, 1.0 / targets)?;
        sums.push(f64::from(stop.load(Ordering::Relaxed)));
        sums.extend(self.one_hot(self.device_name.peak_memory().unwrap_or(0) as f64));
        let sums = all_reduce_sum(self.world, &sums, &context.device)?;
        let memory = sums[2 * RANGES + 1..].iter().copied().fold(0.0, f64::max);
        let grad_norm = global_norm(self.world, &gradients)?;
        let loss = sums[..RANGES].iter().sum::<f64>() / targets;
        self.check_divergence(step, loss, grad_norm, samples)?;

        let learning_rate = learning_rate(conf, step, steps);
        self.optimizer.step(self.world, &mut self.shards, gradients, grad_norm, learning_rate);

        let loss_by_position = POSITION_RANGES.iter().enumerate().filter_map(|(i, (name, _))| {
            let count = sums[RANGES + i];
            (count > 0.0).then(|| ((*name).to_owned(), json!(sums[i] / count)))
        });
        let tokens_per_second = (batch * tokens as u64) as f64 / started.elapsed().as_secs_f64();
        let peak = conf.peak_tflops.map(|peak| peak * 1e12 * self.world.size() as f64);
        let epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let metrics = StepMetrics {
            step,
            loss,
            loss_by_position: loss_by_position.collect::<Map<_, _>>(),
            grad_norm,
            learning_rate,
            tokens: step * batch * tokens as u64,
            tokens_per_second,
            peak_fraction: peak
                .map(|peak| tokens_per_second * operations_per_token(&self.config, tokens) / peak),
            memory_bytes: Some(memory as u64).filter(|bytes| *bytes > 0),
            seconds: epoch.as_secs_f64(),
        };
        self.metrics_jsonl.extend(metrics::json_line(&metrics));
        self.history.push(metrics);
        Ok(sums[2 * RANGES] > 0.0)
    }

    /// Backpropagates this rank's inputs. Returns its shards of the accumulated gradients of `scale` × the loss, and its sums
    /// of losses and counts of targets in each range of positions.
    fn accumulate(
        &self,
        context: &RankContext<'_>,
        inputs: Vec<SequenceShard>,
        scale: f64,
    ) -> Result<(Vec<Tensor<1>>, Vec<f64>)> {
        let mut accumulated: Vec<Option<Tensor<1>>> = self.shards.units.iter().map(|_| None).collect();
        let mut sums = vec![0.0; 2 * RANGES];
        for shard in inputs {
            let losses = context.backprop(&self.shards, &shard, scale, &mut accumulated)?;
            let rows = losses.into_iter().zip(&shard.targets).zip(shard.sharding.indices());
            for ((loss, _), index) in rows.filter(|((_, target), _)| **target != NO_TARGET) {
                sums[range_index(index)] += f64::from(loss);
                sums[RANGES + range_index(index)] += 1.0;
            }
        }
        Ok((accumulated.into_iter().flatten().collect(), sums))
    }

    /// This rank's shard of each of the samples that its group computes.
    fn read_shards(&mut self, samples: Range<u64>) -> Result<Vec<SequenceShard>> {
        let group_size = self.sequence.size();
        let groups = self.world.size() / group_size;
        let group = (self.world.rank() / group_size) as u64;
        let mut shards = vec![];
        for first in samples.clone().step_by(groups) {
            let own = first + group;
            let sequence = self.runtime.block_on(self.dataset.sequence(own.min(samples.end - 1)))?;
            let mut shard = self.shard(&sequence);
            if own >= samples.end {
                // No sample is left for this group. It takes part in the collectives with a sequence without loss.
                shard.targets.fill(NO_TARGET);
            }
            shards.push(shard);
        }
        Ok(shards)
    }

    fn shard(&self, sequence: &Sequence) -> SequenceShard {
        let starts = self.job.conf.document_mask.then(|| sequence.starts());
        let (rank, ranks, length) = (self.sequence.rank(), self.sequence.size(), sequence.ids.len());
        let sharding = Sharding::new(rank, ranks, length, starts.as_deref());
        let mut targets = sequence.targets.clone();
        // A document can't predict the first token of the next one.
        for start in starts.into_iter().flatten().filter(|start| *start > 0) {
            targets[start - 1] = NO_TARGET;
        }
        let ids = sharding.local_rows(&sequence.ids, 0);
        SequenceShard { ids, targets: sharding.local_rows(&targets, NO_TARGET), sharding }
    }

    /// A vector with this rank's number at its index and 0 elsewhere: summed over ranks, it has every rank's number.
    fn one_hot(&self, number: f64) -> Vec<f64> {
        let mut numbers = vec![0.0; self.world.size()];
        numbers[self.world.rank()] = number;
        numbers
    }

    /// # Errors
    /// The loss or the gradient norm is not finite, or the norm is far above the recent median.
    fn check_divergence(&self, step: u64, loss: f64, grad_norm: f64, samples: Range<u64>) -> Result<()> {
        let mut norms: Vec<f64> =
            self.history.iter().rev().take(NORM_WINDOW).map(|step| step.grad_norm).collect();
        norms.sort_by(f64::total_cmp);
        let median = norms.get(norms.len() / 2).copied().unwrap_or_default();
        let what = if !loss.is_finite() {
            format!("the loss is {loss}")
        } else if !grad_norm.is_finite() {
            format!("the gradient norm is {grad_norm}")
        } else if norms.len() >= MIN_STEPS && grad_norm > NORM_SPIKE * median {
            format!("the gradient norm is {grad_norm:.3}, and its recent median {median:.3}")
        } else {
            return Ok(());
        };
        let sequences = samples.map(|sample| sample % self.dataset.sequences).collect();
        let saved = self.runtime.block_on(TrainingCheckpoint::find_latest(
            &self.job.checkpoints,
            &self.job.dataset_digest,
            &self.job.conf.content(),
        ));
        let good = match saved {
            Ok(Some(saved)) => saved.folder.url(),
            Ok(None) => "none: set train.checkpoint_every".to_owned(),
            Err(error) => format!("unreadable: {error}"),
        };
        if self.world.rank() == 0 {
            // The metrics so far explain the divergence, and no checkpoint will contain them.
            let at = self.job.checkpoints.join(DIVERGED);
            if let Err(error) = self.runtime.block_on(at.put(self.metrics_jsonl.clone())) {
                tracing::warn!("{error}");
            }
        }
        Err(Error::Diverged {
            step,
            what,
            sequences,
            good,
            metrics: self.job.checkpoints.join(DIVERGED).url(),
        })
    }

    /// Gathers what every rank wrote of its shard. Sizes and digests are sent as numbers that an all-reduce leaves unchanged.
    fn gather_written(&self, own: &Written) -> Result<Vec<Written>> {
        const NUMBERS: usize = 1 + 32;
        let (rank, ranks) = (self.world.rank(), self.world.size());
        let mut numbers = vec![0.0; ranks * NUMBERS];
        numbers[rank * NUMBERS] = own.bytes as f64;
        let digest = &mut numbers[rank * NUMBERS + 1..(rank + 1) * NUMBERS];
        digest.iter_mut().zip(own.blake3).for_each(|(number, byte)| *number = f64::from(byte));
        let numbers = all_reduce_sum(self.world, &numbers, &self.device_name.open()?)?;
        let written = |(rank, numbers): (usize, &[f64])| Written {
            name: resume::optimizer_file(rank, ranks),
            bytes: numbers[0] as u64,
            blake3: std::array::from_fn(|i| numbers[i + 1] as u8),
        };
        Ok(numbers.chunks(NUMBERS).enumerate().map(written).collect())
    }

    /// Writes a checkpoint from which training can resume.
    fn save_checkpoint(&self, step: u64) -> Result<()> {
        let folder = self.job.checkpoints.join(&format!("step-{step}"));
        let own = resume::write_optimizer_shard(&folder, self.world, &self.shards, &self.optimizer);
        let own = self.runtime.block_on(own)?;
        let shards = self.gather_written(&own)?;
        let mut files = self.write_model(&folder)?;
        // Logs contain times, so the manifest does not list them.
        self.write_logs(&folder)?;
        if self.world.rank() == 0 {
            files.extend(shards);
            let manifest = Manifest {
                step,
                ranks: self.world.size(),
                dataset: self.job.dataset_digest.clone(),
                settings: self.job.conf.content(),
                files: files.into_iter().map(Into::into).collect(),
            };
            self.runtime.block_on(resume::publish(&self.job.checkpoints, &manifest))?;
        }
        self.world.barrier()
    }

    /// Rank 0 writes the metrics, as JSON lines and for TensorBoard.
    fn write_logs(&self, folder: &Location) -> Result<Vec<Written>> {
        if self.world.rank() > 0 {
            return Ok(vec![]);
        }
        let files = [
            ("metrics.jsonl", self.metrics_jsonl.clone()),
            ("events.out.tfevents.0.lengthwise", metrics::tensorboard(&self.history)),
        ];
        files.into_iter().map(|(name, bytes)| self.runtime.block_on(folder.join(name).put(bytes))).collect()
    }

    /// Rank 0 writes the model in Hugging Face's layout and returns the files it wrote.
    fn write_model(&self, folder: &Location) -> Result<Vec<Written>> {
        let gather_unit = |unit: usize| -> Result<Vec<f32>> {
            let flat = self.world.all_gather(self.shards.owned[unit].clone())?;
            let length = self.shards.units[unit].length;
            Ok(if self.world.rank() == 0 {
                flat.into_data().iter::<f32>().take(length).collect()
            } else {
                vec![]
            })
        };
        if self.world.rank() > 0 {
            for unit in 0..self.shards.units.len() {
                gather_unit(unit)?;
            }
            return Ok(vec![]);
        }
        let mut config = self.config.clone();
        config.max_position_embeddings = self.max_positions();
        let companions = checkpoint::companion_files(&config, self.job.tokenizer.as_deref());
        self.runtime.block_on(checkpoint::write(
            folder,
            &config,
            &self.shards.units,
            self.job.conf.precision,
            &companions,
            async |unit| gather_unit(unit),
        ))
    }

    /// `max_position_embeddings` of the trained model. Scalings that are relative to the pretraining length keep it.
    fn max_positions(&self) -> usize {
        let pretrained = self.config.max_position_embeddings;
        match self.config.scaling() {
            Ok(Scaling::Dynamic { .. } | Scaling::Yarn { .. }) => pretrained,
            _ => pretrained.max(self.job.sequence_tokens),
        }
    }
}

/// Floating-point operations per token of training. The forward pass takes 2 per weight, and 4 per attention dimension and
/// earlier key, of which there are half a sequence on average. The backward pass takes twice as many.
pub fn operations_per_token(config: &Config, sequence_tokens: usize) -> f64 {
    let embedding = if config.tie_word_embeddings { 0 } else { config.vocab_size * config.hidden_size };
    let matrices = config.parameter_count() as f64 - embedding as f64;
    let width = config.num_attention_heads * config.head_dim();
    let attention = 2.0 * (config.num_hidden_layers * width) as f64 * sequence_tokens as f64;
    3.0 * (2.0 * matrices + attention)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::tests::{folder, packed};

    fn conf(extra: serde_json::Value) -> TrainConf {
        let mut all = json!({
            "shape": { "hidden_size": 16, "intermediate_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "tied": true },
            "steps": 30, "learning_rate": 1e-2, "warmup_steps": 2,
        });
        for (key, value) in extra.as_object().unwrap() {
            all[key] = value.clone();
        }
        serde_json::from_value(all).unwrap()
    }

    async fn job(conf: TrainConf) -> TrainJob {
        let row = |seed: i32| {
            let ids: Vec<i32> = (0..37).map(|i| (i * seed + i * i % 3) % 11).collect();
            (ids, 1, vec![("a", 0, 20), ("b", 20, 37)])
        };
        let rows: Vec<_> = (3..10).map(row).collect();
        let dataset = folder(&[
            ("train-00000-of-00002.parquet", packed(&rows[..4])),
            ("train-00001-of-00002.parquet", packed(&rows[4..])),
        ])
        .await;
        let out = folder(&[]).await;
        TrainJob {
            conf,
            dataset,
            dataset_digest: "d".into(),
            checkpoint: None,
            output: out.join("model"),
            checkpoints: out.join("checkpoints"),
            logs: out.join("logs"),
            vocab_size: 11,
            sequence_tokens: 37,
            bos: Some(0),
            eos: None,
            tokenizer: None,
        }
    }

    /// Trains until a step and stops there, unless it is the last. Returns the result and the losses of each step.
    async fn until(job: &TrainJob, step: u64) -> (Result<Summary>, Vec<f64>) {
        let stop = Arc::new(AtomicBool::new(false));
        let mut losses = vec![];
        let flag = stop.clone();
        // The trainer sees the flag at the latest in the step after the one that set it.
        let mut on_step = |done: &StepMetrics| {
            losses.push(done.loss);
            if done.step >= step {
                flag.store(true, Ordering::Relaxed);
            }
        };
        let trained = train(job, &stop, &mut on_step).await;
        (trained, losses)
    }

    async fn losses(conf: TrainConf) -> Vec<f64> {
        let (trained, losses) = until(&job(conf).await, u64::MAX).await;
        trained.unwrap();
        losses
    }

    fn close(a: &[f64], b: &[f64], bound: f64) {
        assert_eq!(a.len(), b.len());
        for (step, (a, b)) in a.iter().zip(b).enumerate() {
            assert!((a - b).abs() <= bound * b.abs(), "step {}: {a} {b}", step + 1);
        }
    }

    #[tokio::test]
    async fn a_model_learns_what_it_sees_again_and_again() {
        let losses = losses(conf(json!({ "batch_tokens": 259, "steps": 60, "learning_rate": 2e-2 }))).await;
        assert!((losses[0] - 11f64.ln()).abs() < 0.1, "{}", losses[0]);
        assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
    }

    #[tokio::test]
    async fn the_same_seed_gives_the_same_losses() {
        let first = losses(conf(json!({ "steps": 5, "ranks": 3 }))).await;
        assert_eq!(first, losses(conf(json!({ "steps": 5, "ranks": 3 }))).await);
        assert_ne!(first, losses(conf(json!({ "steps": 5, "ranks": 3, "seed": 2 }))).await);
    }

    #[tokio::test]
    async fn ranks_however_they_share_the_work_see_the_same_losses() {
        for masked in [false, true] {
            let base = json!({ "steps": 8, "batch_tokens": 111, "document_mask": masked });
            let with = |ranks: usize, sequence_ranks: usize| {
                let mut all = base.clone();
                (all["ranks"], all["sequence_ranks"]) = (json!(ranks), json!(sequence_ranks));
                conf(all)
            };
            let one = losses(conf(base.clone())).await;
            // 3 sequences per step, which two groups share unevenly.
            for (ranks, sequence_ranks) in [(2, 2), (3, 1), (4, 2), (8, 8), (8, 4)] {
                close(&losses(with(ranks, sequence_ranks)).await, &one, 2e-5);
            }
        }
    }

    #[tokio::test]
    async fn a_stopped_training_goes_on_with_the_same_losses_to_the_last_bit() {
        for ranks in [1, 2] {
            let settings =
                json!({ "steps": 12, "ranks": ranks, "schedule": "cosine", "checkpoint_every": 4 });
            let want = losses(conf(settings.clone())).await;
            let job = job(conf(settings)).await;
            let mut steps = 0;
            for stop in [3, 7] {
                let (trained, losses) = until(&job, stop).await;
                let error = trained.unwrap_err();
                let Error::Stopped(step) = error else { panic!("{error}") };
                assert_eq!(losses, want[steps..step as usize]);
                steps = step as usize;
            }
            let (trained, losses) = until(&job, u64::MAX).await;
            assert_eq!(losses, want[steps..]);
            let summary = trained.unwrap();
            assert_eq!((summary.steps, summary.tokens), (12, 12 * 37));
            let lines = job.logs.join("metrics.jsonl").get().await.unwrap().unwrap();
            let loss =
                |line: &str| line.split("\"loss\":").nth(1).unwrap().split(',').next().unwrap().to_owned();
            let all: Vec<String> = std::str::from_utf8(&lines).unwrap().lines().map(loss).collect();
            assert_eq!(all, want.iter().map(f64::to_string).collect::<Vec<_>>());
        }
    }

    #[tokio::test]
    async fn another_number_of_ranks_goes_on_too() {
        let want = losses(conf(json!({ "steps": 9 }))).await;
        for (before, after) in [(1, 3), (4, 2), (3, 1)] {
            let mut job = job(conf(json!({ "steps": 9, "ranks": before }))).await;
            let step = match until(&job, 4).await.0 {
                Err(Error::Stopped(step)) => step as usize,
                other => panic!("{other:?}"),
            };
            job.conf.ranks = Some(after);
            let (trained, losses) = until(&job, u64::MAX).await;
            trained.unwrap();
            close(&losses, &want[step..], 2e-5);
        }
    }

    #[tokio::test]
    async fn a_checkpoint_of_another_dataset_or_with_a_file_gone_is_refused() {
        let mut job = job(conf(json!({ "steps": 9 }))).await;
        assert!(matches!(until(&job, 4).await.0, Err(Error::Stopped(_))));
        job.dataset_digest = "other".into();
        let error = until(&job, u64::MAX).await.0.unwrap_err().to_string();
        assert!(error.contains("it was trained on another dataset"), "{error}");
        job.dataset_digest = "d".into();
        let listed = job.checkpoints.store.list_with_delimiter(Some(&job.checkpoints.path)).await.unwrap();
        let step = listed.common_prefixes[0].filename().unwrap().to_owned();
        let file = job.checkpoints.join(&step).join("optimizer-00000-of-00001.safetensors");
        let bytes = file.get().await.unwrap().unwrap();
        file.put(bytes[..bytes.len() - 1].to_vec()).await.unwrap();
        let error = until(&job, u64::MAX).await.0.unwrap_err().to_string();
        assert!(error.contains("optimizer-00000-of-00001.safetensors has"), "{error}");
        let mut flipped = bytes.to_vec();
        flipped[bytes.len() / 2] ^= 1;
        file.put(flipped).await.unwrap();
        let error = until(&job, u64::MAX).await.0.unwrap_err().to_string();
        assert!(error.contains("optimizer-00000-of-00001.safetensors is not what was written"), "{error}");
        file.put(bytes.to_vec()).await.unwrap();
        until(&job, u64::MAX).await.0.unwrap();
    }

    #[tokio::test]
    async fn old_checkpoints_go_and_half_written_ones_are_not_found() {
        let job = job(conf(json!({ "steps": 9, "checkpoint_every": 2 }))).await;
        job.checkpoints.join("step-100/model.safetensors").put(vec![1]).await.unwrap();
        until(&job, u64::MAX).await.0.unwrap();
        let listed = job.checkpoints.store.list_with_delimiter(Some(&job.checkpoints.path)).await.unwrap();
        let names: Vec<_> = listed.common_prefixes.iter().filter_map(|path| path.filename()).collect();
        assert_eq!(names, ["step-100", "step-6", "step-8"]);
        let settings = job.conf.content();
        let found = TrainingCheckpoint::find_latest(&job.checkpoints, "d", &settings).await.unwrap().unwrap();
        assert_eq!(found.manifest.step, 8);
        resume::clear(&job.checkpoints).await.unwrap();
        assert!(TrainingCheckpoint::find_latest(&job.checkpoints, "d", &settings).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn training_goes_on_from_a_model_of_hugging_faces_layout() {
        let mut first = job(conf(json!({}))).await;
        let trained = until(&first, u64::MAX).await.0.unwrap();
        first.checkpoint = Some(first.output.clone());
        first.output = first.output.join("next");
        first.conf = conf(json!({ "shape": null, "checkpoint": "there", "steps": 1, "ranks": 2 }));
        let second = until(&first, u64::MAX).await.0.unwrap();
        assert!(second.loss < 1.2 * trained.loss + 0.1, "{} {}", second.loss, trained.loss);
    }

    #[tokio::test]
    async fn a_loss_that_is_no_number_names_step_sequences_and_the_last_good_checkpoint() {
        let job = job(conf(json!({ "learning_rate": 1e30, "checkpoint_every": 1, "warmup_steps": 0 }))).await;
        let error = until(&job, u64::MAX).await.0.unwrap_err();
        let Error::Diverged { step, sequences, good, .. } = &error else { panic!("{error}") };
        assert_eq!(sequences, &[(step - 1) % 7]);
        assert!(good.ends_with(&format!("step-{}", step - 1)), "{error}");
    }
}

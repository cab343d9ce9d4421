//! The training loop: packed sequences in, a checkpoint out. Every rank runs the same steps on its own part.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

use burn_tensor::{FloatDType, Tensor};
use bytes::Bytes;
use serde_json::{Map, json};
use tokio::runtime::Handle;
use tokio::sync::mpsc::{Sender, channel};

use crate::backprop::{Machine, Rows};
use crate::checkpoint::{self, Checkpoint, fresh};
use crate::comm::{self, Comm, PATIENCE, Place, threads};
use crate::conf::{Precision, Shape, TrainConf};
use crate::config::Config;
use crate::dataset::NO_TARGET;
use crate::dataset::{Dataset, Sequence};
use crate::metrics::{self, POSITIONS, Step, range_of};
use crate::optim::{AdamW, norm, rate, total};
use crate::resume::{self, Manifest, Resume};
use crate::ring::Sharding;
use crate::rope::Rope;
use crate::shards::{Shards, Unit};
use crate::tensors::Kind;
use crate::{Error, Location, Result, Written, device};

/// What to train on what.
#[derive(Clone, Debug)]
pub struct TrainJob {
    pub conf: TrainConf,
    /// The folder of `train-*.parquet`, and its digest.
    pub dataset: Location,
    pub dataset_digest: String,
    pub checkpoint: Option<Location>,
    /// Where the model's folder is written.
    pub output: Location,
    /// Where metrics.jsonl and TensorBoard's file are written: no two attempts have the same times, so each has a place of its
    /// own.
    pub logs: Location,
    /// Where `step-N/` are, which a training that was stopped goes on from.
    pub checkpoints: Location,
    /// The tokenizer's: a fresh model gets it.
    pub vocab_size: usize,
    pub sequence_tokens: usize,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// Goes into the checkpoint's folder.
    pub tokenizer: Option<Bytes>,
}

/// What training gave.
#[derive(Clone, Debug)]
pub struct Summary {
    pub parameters: u64,
    pub tokens: u64,
    pub steps: u64,
    pub loss: f64,
    /// The files of the model's folder that this rank wrote.
    pub files: Vec<Written>,
    /// `metrics.jsonl` and TensorBoard's.
    pub logs: Vec<Written>,
}

/// The metrics of a training that diverged, beside its checkpoints.
const DIVERGED: &str = "metrics-diverged.jsonl";

/// A gradient norm of so many times the median is far out of line, once there have been so many steps.
const OUT_OF_LINE: f64 = 100.0;
const ENOUGH_STEPS: usize = 20;

/// Trains, from the last checkpoint if there is one, and calls `on_step` after every step. When `stop` is set, the step is
/// finished, a checkpoint written, and [`Error::Stopped`] returned.
///
/// The ranks are threads, or this process is one of them, if it was started as one of several. Only the first rank's
/// summary has files.
pub async fn train(
    job: &TrainJob,
    stop: &Arc<AtomicBool>,
    on_step: &mut (dyn FnMut(&Step) + Send),
) -> Result<Summary> {
    job.conf.check()?;
    job.conf.available()?;
    if job.conf.deterministic {
        device::be_deterministic();
    }
    // of one: who stops training when a step is told does so before many more are made
    let (sender, mut receiver) = channel(1);
    let (job, stop, wait) = (job.clone(), stop.clone(), Handle::current());
    let training = tokio::task::spawn_blocking(move || {
        let rank = |world: &dyn Comm, sequence: &dyn Comm| {
            let steps = (world.rank() == 0).then(|| sender.clone());
            Rank::new(&job, world, sequence, &wait)?.train(&stop, steps)
        };
        match Place::of_this_process()?.filter(|place| place.size > 1) {
            None => {
                let (ranks, sequence_ranks) = (job.conf.ranks(), job.conf.sequence_ranks());
                Ok(threads::run(ranks, sequence_ranks, PATIENCE, rank)?.swap_remove(0))
            }
            Some(place) => comm::process(place, &job.conf, rank),
        }
    });
    // ends when the ranks have dropped what they send with
    while let Some(step) = receiver.recv().await {
        on_step(&step);
    }
    training.await.map_err(|e| Error::Rank { rank: 0, message: e.to_string() })?
}

/// The config of the model that a conf asks for; a fresh one has the tokenizer's vocabulary.
pub async fn config_of(
    conf: &TrainConf,
    checkpoint: Option<&Location>,
    vocab_size: usize,
    sequence_tokens: usize,
) -> Result<Config> {
    let mut config = match (checkpoint, &conf.shape) {
        (Some(folder), _) => checkpoint::config(folder).await?,
        (None, Some(shape)) => shaped(shape, vocab_size, sequence_tokens)?,
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

/// The fresh model's config.
fn shaped(shape: &Shape, vocab_size: usize, sequence_tokens: usize) -> Result<Config> {
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

/// A rank's rows of a sequence, before they are computed with.
struct Share {
    ids: Vec<i32>,
    targets: Vec<i32>,
    sharding: Sharding,
}

/// One rank, ready to train.
struct Rank<'a> {
    job: &'a TrainJob,
    world: &'a dyn Comm,
    sequence: &'a dyn Comm,
    wait: &'a Handle,
    name: device::Name,
    config: Config,
    shards: Shards,
    optimizer: AdamW,
    dataset: Dataset,
    /// All steps so far.
    done: Vec<Step>,
    /// … as `metrics.jsonl`, to the letter.
    lines: Vec<u8>,
}

impl<'a> Rank<'a> {
    fn new(job: &'a TrainJob, world: &'a dyn Comm, sequence: &'a dyn Comm, wait: &'a Handle) -> Result<Self> {
        let conf = &job.conf;
        let name = conf.device_of(Place::of_this_process()?.map_or(world.rank(), |place| place.local))?;
        let device = name.open()?;
        let config = config_of(conf, job.checkpoint.as_ref(), job.vocab_size, job.sequence_tokens);
        let mut config = wait.block_on(config)?;
        if conf.shape.is_some() {
            config.bos_token_id = job.bos.map(Into::into);
            config.eos_token_id = job.eos.map(Into::into);
        }
        let units = Unit::all(&config);
        let settings = conf.content();
        let saved = wait.block_on(Resume::find(&job.checkpoints, &job.dataset_digest, &settings))?;
        let (shards, optimizer, done, lines) = match &saved {
            Some(saved) => {
                wait.block_on(saved.check(world))?;
                let (shards, optimizer) = saved.state(units, world, &device, conf.weight_decay, wait)?;
                let lines =
                    wait.block_on(saved.folder.join("metrics.jsonl").get())?.unwrap_or_default().to_vec();
                let done = metrics::steps(&lines).map_err(|e| Error::Checkpoint {
                    at: saved.folder.url(),
                    message: format!("metrics.jsonl: {e}"),
                })?;
                (shards, optimizer, done, lines)
            }
            None => {
                let start = match &job.checkpoint {
                    Some(folder) => Some(wait.block_on(Checkpoint::open(folder))?),
                    None => None,
                };
                let read = |i: usize, range| match &start {
                    Some(start) => wait.block_on(start.read(&units[i], range)),
                    None => Ok(fresh(&units, i, range, conf.seed)),
                };
                let shards = Shards::new(units.clone(), world, &device, read)?;
                let optimizer = AdamW::new(&shards, conf.weight_decay);
                (shards, optimizer, vec![], vec![])
            }
        };
        let dataset = wait.block_on(Dataset::open(&job.dataset, config.vocab_size))?;
        let new = Self { job, world, sequence, wait, name, config, shards, optimizer, dataset, done, lines };
        if world.rank() == 0 {
            new.announce(saved.as_ref());
        }
        Ok(new)
    }

    fn announce(&self, saved: Option<&Resume>) {
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

    fn machine(&self) -> Result<Machine<'a>> {
        let precision = FloatDType::from(self.job.conf.precision);
        let host = if self.job.conf.offload { self.name.host() } else { None };
        Ok(Machine {
            config: self.config.clone(),
            world: self.world,
            sequence: self.sequence,
            device: self.name.open()?,
            kernel: self.name.kernel(precision, self.config.head_dim()),
            precision,
            recompute: self.job.conf.recompute,
            offload: host.map(device::Name::open).transpose()?,
        })
    }

    /// All steps that are left, then the model's folder.
    fn train(mut self, stop: &AtomicBool, on_step: Option<Sender<Step>>) -> Result<Summary> {
        let conf = &self.job.conf;
        let steps = conf.steps(self.job.sequence_tokens);
        let machine = self.machine()?;
        while (self.done.len() as u64) < steps {
            let stopped = self.step(&machine, steps, stop)?;
            let step = self.done.len() as u64;
            if let (Some(on_step), Some(done)) = (&on_step, self.done.last()) {
                // steps are in metrics.jsonl, too: nobody has to listen
                let _ = on_step.blocking_send(done.clone());
            }
            let due = conf.checkpoint_every.is_some_and(|every| step.is_multiple_of(every));
            if (due || stopped) && step < steps {
                self.save(step)?;
            }
            if stopped && step < steps {
                return Err(Error::Stopped(step));
            }
        }
        let files = self.write(&self.job.output)?;
        let logs = self.write_logs(&self.job.logs)?;
        let last = self.done.last();
        Ok(Summary {
            parameters: self.config.parameter_count(),
            tokens: last.map_or(0, |step| step.tokens),
            steps,
            loss: last.map_or(f64::NAN, |step| step.loss),
            files,
            logs,
        })
    }

    /// One step on a batch of sequences; returns whether to stop.
    fn step(&mut self, machine: &Machine<'_>, steps: u64, stop: &AtomicBool) -> Result<bool> {
        let started = Instant::now();
        let (conf, tokens) = (&self.job.conf, self.job.sequence_tokens);
        let step = self.done.len() as u64 + 1;
        let batch = conf.batch(tokens);
        let group_size = self.sequence.size();
        let (groups, group) =
            ((self.world.size() / group_size) as u64, (self.world.rank() / group_size) as u64);
        let place = |i: u64| (step - 1) * batch + i;

        // this rank's share of each sequence that is its group's
        let mut mine = vec![];
        for first in (0..batch).step_by(groups as usize) {
            let own = first + group;
            let sequence = self.wait.block_on(self.dataset.sequence(place(own.min(batch - 1))))?;
            let mut share = self.share(&sequence);
            if own >= batch {
                // there is none left for this group: it computes along, without loss
                share.targets.fill(NO_TARGET);
            }
            mine.push(share);
        }
        let targets = mine.iter().flat_map(|share| &share.targets).filter(|t| **t != NO_TARGET).count();
        let targets = total(self.world, &[targets as f64], &machine.device)?[0].max(1.0);

        let mut sums: Vec<Option<Tensor<1>>> = self.shards.units.iter().map(|_| None).collect();
        // sums and counts by range of positions, whether any rank was told to stop, and the memory of each
        let mut seen = vec![0.0; 2 * POSITIONS.len() + 1];
        for Share { ids, targets: wanted, sharding } in mine {
            let (positions, longest) = (sharding.positions(), sharding.longest());
            let rope = Rope::new(&self.config, &positions, longest, &machine.device, machine.precision)?;
            let rows = Rows { ids, targets: wanted, sharding, rope };
            let losses = machine.backprop(&self.shards, &rows, 1.0 / targets, &mut sums)?;
            for ((loss, target), place) in losses.into_iter().zip(&rows.targets).zip(rows.sharding.places()) {
                if *target != NO_TARGET {
                    seen[range_of(place)] += f64::from(loss);
                    seen[POSITIONS.len() + range_of(place)] += 1.0;
                }
            }
        }
        seen[2 * POSITIONS.len()] = f64::from(stop.load(Ordering::Relaxed));
        seen.extend(self.of_this_rank(self.name.peak().unwrap_or(0) as f64));
        let seen = total(self.world, &seen, &machine.device)?;
        let memory = seen[2 * POSITIONS.len() + 1..].iter().copied().fold(0.0, f64::max);
        let gradients: Vec<Tensor<1>> = sums.into_iter().flatten().collect();
        let grad_norm = norm(self.world, &gradients)?;
        let loss = seen[..POSITIONS.len()].iter().sum::<f64>() / targets;
        self.judge(step, loss, grad_norm, (0..batch).map(place))?;

        let learning_rate = rate(conf, step, steps);
        self.optimizer.step(self.world, &mut self.shards, gradients, grad_norm, learning_rate);

        let ranges = POSITIONS.iter().enumerate().filter_map(|(i, (name, _))| {
            let count = seen[POSITIONS.len() + i];
            (count > 0.0).then(|| ((*name).to_owned(), json!(seen[i] / count)))
        });
        let tokens_per_second = (batch * tokens as u64) as f64 / started.elapsed().as_secs_f64();
        let peak = conf.peak_tflops.map(|peak| peak * 1e12 * self.world.size() as f64);
        let epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let done = Step {
            step,
            loss,
            loss_by_position: ranges.collect::<Map<_, _>>(),
            grad_norm,
            learning_rate,
            tokens: step * batch * tokens as u64,
            tokens_per_second,
            peak_fraction: peak.map(|peak| tokens_per_second * operations(&self.config, tokens) / peak),
            memory_bytes: Some(memory as u64).filter(|bytes| *bytes > 0),
            seconds: epoch.as_secs_f64(),
        };
        self.lines.extend(metrics::line(&done));
        self.done.push(done);
        Ok(seen[2 * POSITIONS.len()] > 0.0)
    }

    /// A number of each rank, as far as this one knows: their sum over ranks has all.
    fn of_this_rank(&self, number: f64) -> Vec<f64> {
        let mut of_ranks = vec![0.0; self.world.size()];
        of_ranks[self.world.rank()] = number;
        of_ranks
    }

    /// # Errors
    /// What is no number, or far out of line, ends the training.
    fn judge(&self, step: u64, loss: f64, grad_norm: f64, places: impl Iterator<Item = u64>) -> Result<()> {
        let mut norms: Vec<f64> = self.done.iter().rev().take(100).map(|done| done.grad_norm).collect();
        norms.sort_by(f64::total_cmp);
        let median = norms.get(norms.len() / 2).copied().unwrap_or_default();
        let what = if !loss.is_finite() {
            format!("the loss is {loss}")
        } else if !grad_norm.is_finite() {
            format!("the norm of the gradients is {grad_norm}")
        } else if norms.len() >= ENOUGH_STEPS && grad_norm > OUT_OF_LINE * median {
            format!("the norm of the gradients is {grad_norm:.3}, of the steps before {median:.3}")
        } else {
            return Ok(());
        };
        let sequences = places.map(|place| place % self.dataset.sequences).collect();
        let saved = self.wait.block_on(Resume::find(
            &self.job.checkpoints,
            &self.job.dataset_digest,
            &self.job.conf.content(),
        ));
        let good = match saved {
            Ok(Some(saved)) => saved.folder.url(),
            Ok(None) => "none: set train.checkpoint_every".to_owned(),
            Err(error) => format!("not to be read: {error}"),
        };
        if self.world.rank() == 0 {
            // what came before it is wanted now, and no checkpoint will have it
            let at = self.job.checkpoints.join(DIVERGED);
            if let Err(error) = self.wait.block_on(at.put(self.lines.clone())) {
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

    fn share(&self, sequence: &Sequence) -> Share {
        let starts = self.job.conf.document_mask.then(|| sequence.starts());
        let (rank, ranks, length) = (self.sequence.rank(), self.sequence.size(), sequence.ids.len());
        let sharding = Sharding::new(rank, ranks, length, starts.as_deref());
        let mut targets = sequence.targets.clone();
        // what comes after a document's end is not to be known from it
        for start in starts.into_iter().flatten().filter(|start| *start > 0) {
            targets[start - 1] = NO_TARGET;
        }
        Share { ids: sharding.take(&sequence.ids, 0), targets: sharding.take(&targets, NO_TARGET), sharding }
    }

    /// What every rank wrote of its shard, told to all: sizes and digests as numbers that a sum leaves as they are.
    fn of_all_ranks(&self, own: &Written) -> Result<Vec<Written>> {
        const NUMBERS: usize = 1 + 32;
        let (rank, ranks) = (self.world.rank(), self.world.size());
        let mut numbers = vec![0.0; ranks * NUMBERS];
        numbers[rank * NUMBERS] = own.bytes as f64;
        let digest = &mut numbers[rank * NUMBERS + 1..(rank + 1) * NUMBERS];
        digest.iter_mut().zip(own.blake3).for_each(|(number, byte)| *number = f64::from(byte));
        let numbers = total(self.world, &numbers, &self.name.open()?)?;
        let written = |(rank, numbers): (usize, &[f64])| Written {
            name: resume::ranks_file(rank, ranks),
            bytes: numbers[0] as u64,
            blake3: std::array::from_fn(|i| numbers[i + 1] as u8),
        };
        Ok(numbers.chunks(NUMBERS).enumerate().map(written).collect())
    }

    /// A checkpoint that training goes on from.
    fn save(&self, step: u64) -> Result<()> {
        let folder = self.job.checkpoints.join(&format!("step-{step}"));
        let own = resume::write_rank(&folder, self.world, &self.shards, &self.optimizer);
        let own = self.wait.block_on(own)?;
        let shards = self.of_all_ranks(&own)?;
        let mut files = self.write(&folder)?;
        // with times in them, they are none of what the manifest answers for
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
            self.wait.block_on(resume::publish(&self.job.checkpoints, &manifest))?;
        }
        self.world.barrier()
    }

    /// What one watches; rank 0 writes.
    fn write_logs(&self, folder: &Location) -> Result<Vec<Written>> {
        if self.world.rank() > 0 {
            return Ok(vec![]);
        }
        let files = [
            ("metrics.jsonl", self.lines.clone()),
            ("events.out.tfevents.0.lengthwise", metrics::tensorboard(&self.done)),
        ];
        files.into_iter().map(|(name, bytes)| self.wait.block_on(folder.join(name).put(bytes))).collect()
    }

    /// The model as Hugging Face's; rank 0 writes, and returns what it wrote.
    fn write(&self, folder: &Location) -> Result<Vec<Written>> {
        let kind = match self.job.conf.precision {
            Precision::F32 => Kind::F32,
            Precision::Bf16 => Kind::BF16,
        };
        let whole = |unit: usize| -> Result<Vec<f32>> {
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
                whole(unit)?;
            }
            return Ok(vec![]);
        }
        let mut config = self.config.clone();
        config.max_position_embeddings = self.positions();
        let beside = checkpoint::companions(&config, self.job.tokenizer.as_deref());
        self.wait.block_on(checkpoint::write(
            folder,
            &config,
            &self.shards.units,
            kind,
            &beside,
            async |unit| whole(unit),
        ))
    }

    /// What `config.json` says of the trained model. A scaling that is relative to the positions of pretraining keeps them.
    fn positions(&self) -> usize {
        let before = self.config.max_position_embeddings;
        match self.config.scaling() {
            Ok(crate::config::Scaling::Dynamic { .. } | crate::config::Scaling::Yarn { .. }) => before,
            _ => before.max(self.job.sequence_tokens),
        }
    }
}

/// Operations that a token of training takes: 2 a parameter and key forward, causal, and twice that backward.
pub fn operations(config: &Config, sequence_tokens: usize) -> f64 {
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

    /// Trains until a step, and stops there if it is not the last; what it gave, and the losses that were said.
    async fn until(job: &TrainJob, step: u64) -> (Result<Summary>, Vec<f64>) {
        let stop = Arc::new(AtomicBool::new(false));
        let mut losses = vec![];
        let flag = stop.clone();
        // the flag is seen in the step after the one that set it, at the latest
        let mut on_step = |done: &Step| {
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
            // 3 sequences a step: two groups share them unevenly
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
        let found = Resume::find(&job.checkpoints, "d", &settings).await.unwrap().unwrap();
        assert_eq!(found.manifest.step, 8);
        resume::clear(&job.checkpoints).await.unwrap();
        assert!(Resume::find(&job.checkpoints, "d", &settings).await.unwrap().is_none());
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

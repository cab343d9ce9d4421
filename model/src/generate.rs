//! The greedy continuation of a prompt. Without a cache: every token computes the whole sequence again.

use burn::tensor::{FloatDType, Tensor};
use serde_json::Value;
use tokio::runtime::Handle;
use tokio::sync::mpsc::unbounded_channel;

use crate::backprop::{Machine, Rows};
use crate::checkpoint::Checkpoint;
use crate::comm::{Comm, PATIENCE, threads};
use crate::device::Name;
use crate::ring::Sharding;
use crate::rope::Rope;
use crate::shards::{Shards, Unit};
use crate::{Error, Location, Result};

/// What to continue, with what.
#[derive(Clone, Debug)]
pub struct GenerateJob {
    /// A Hugging Face Llama's folder.
    pub checkpoint: Location,
    pub device: Name,
    /// How many ranks share the sequence.
    pub ranks: usize,
    /// The prompt; at least one id.
    pub ids: Vec<i32>,
    /// How many tokens to add at most; the checkpoint's own EOS ends sooner.
    pub tokens: usize,
}

/// A model on a rank, ready to compute logits.
pub struct Model<'a> {
    machine: Machine<'a>,
    shards: Shards,
}

impl<'a> Model<'a> {
    pub fn open(checkpoint: &Checkpoint, device: Name, comm: &'a dyn Comm, wait: &Handle) -> Result<Self> {
        let units = Unit::all(&checkpoint.config);
        let read = |i: usize, range| wait.block_on(checkpoint.read(&units[i], range));
        let shards = Shards::new(units.clone(), comm, &device.open(), read)?;
        let precision = FloatDType::F32;
        let machine = Machine {
            config: checkpoint.config.clone(),
            world: comm,
            sequence: comm,
            device: device.open(),
            kernel: device.kernel(precision),
            precision,
            recompute: true,
            offload: None,
        };
        Ok(Self { machine, shards })
    }

    /// Logits at some positions, of those that this rank has: positions and `[positions, vocab]`.
    pub fn logits(&self, ids: &[i32], positions: &[usize]) -> Result<(Vec<usize>, Option<Tensor<2>>)> {
        let Machine { sequence, config, device, precision, .. } = &self.machine;
        let sharding = Sharding::new(sequence.rank(), sequence.size(), ids.len(), None);
        let rope = Rope::new(config, &sharding.positions(), sharding.longest(), device, *precision)?;
        let (own, rows): (Vec<usize>, Vec<usize>) = sharding
            .places()
            .enumerate()
            .filter(|(_, place)| positions.contains(place))
            .map(|(row, place)| (place, row))
            .unzip();
        let sharded = Rows { ids: sharding.take(ids, 0), targets: vec![], rope, sharding };
        let logits = self.machine.logits(&self.shards, &sharded, &rows)?;
        Ok((own, logits))
    }
}

/// Calls `on_token` with each id as it comes, and returns all.
pub async fn generate(job: &GenerateJob, on_token: &mut (dyn FnMut(u32) + Send)) -> Result<Vec<u32>> {
    if job.ids.is_empty() {
        return Err(Error::Conf("the prompt is empty, and the tokenizer puts no token before it".into()));
    }
    let checkpoint = Checkpoint::open(&job.checkpoint).await?;
    let vocab = checkpoint.config.vocab_size;
    if let Some(id) = job.ids.iter().find(|id| **id < 0 || **id as usize >= vocab) {
        return Err(Error::Conf(format!(
            "id {id} of the prompt is not in the model's vocabulary of {vocab}"
        )));
    }
    let ends: Vec<i64> = match &checkpoint.config.eos_token_id {
        Some(Value::Array(several)) => several.iter().filter_map(Value::as_i64).collect(),
        Some(one) => one.as_i64().into_iter().collect(),
        None => vec![],
    };
    let (sender, mut receiver) = unbounded_channel();
    let (job, wait) = (job.clone(), Handle::current());
    let working = tokio::task::spawn_blocking(move || {
        threads::run(job.ranks, job.ranks, PATIENCE, |comm, _| {
            let sender = (comm.rank() == 0).then(|| sender.clone());
            let model = Model::open(&checkpoint, job.device, comm, &wait)?;
            let mut ids = job.ids.clone();
            for _ in 0..job.tokens {
                let (_, logits) = model.logits(&ids, &[ids.len() - 1])?;
                // one rank has the last position, and says it to the others
                let own = logits.map_or(0.0, |logits| {
                    f64::from(logits.argmax(1).into_data().iter::<i32>().next().unwrap_or_default())
                });
                let next = crate::optim::total(comm, &[own], &job.device.open())?[0] as i32;
                ids.push(next);
                if let Some(sender) = &sender {
                    let _ = sender.send(next as u32);
                }
                if ends.contains(&i64::from(next)) {
                    break;
                }
            }
            Ok(())
        })
    });
    let mut new = vec![];
    while let Some(id) = receiver.recv().await {
        on_token(id);
        new.push(id);
    }
    working.await.map_err(|e| Error::Rank { rank: 0, message: e.to_string() })??;
    Ok(new)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::tensors::Reader;
    use object_store::local::LocalFileSystem;

    fn fixture(name: &str) -> Location {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
        let store = LocalFileSystem::new_with_prefix(root).unwrap();
        Location { store: Arc::new(store), path: name.into() }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn logits_are_those_of_transformers_with_each_scaling_on_any_ranks() {
        for scaling in ["default", "linear", "dynamic", "yarn", "llama3"] {
            let at = fixture(scaling);
            let expected = Reader::open(at.join("expected.safetensors")).await.unwrap();
            let ids: Vec<i32> =
                expected.read("ids", 0..80).await.unwrap().into_iter().map(|id| id as i32).collect();
            let want = expected.read("logits", 0..16 * 64).await.unwrap();
            let largest = want.iter().fold(0f32, |most, w| most.max(w.abs()));
            let checkpoint = Checkpoint::open(&at).await.unwrap();
            let positions: Vec<usize> = (64..80).collect();
            for device in Name::anywhere() {
                for ranks in [1, 2, 3, 4] {
                    let (checkpoint, ids, positions) = (&checkpoint, &ids, &positions);
                    let wait = Handle::current();
                    let parts = tokio::task::block_in_place(|| {
                        threads::run(ranks, ranks, PATIENCE, |comm, _| {
                            let model = Model::open(checkpoint, device, comm, &wait)?;
                            let (own, logits) = model.logits(ids, positions)?;
                            let logits = logits.map(|l| l.into_data().iter::<f32>().collect::<Vec<f32>>());
                            Ok((own, logits.unwrap_or_default()))
                        })
                    });
                    let mut seen = 0;
                    for (own, logits) in parts.unwrap() {
                        for (position, row) in own.into_iter().zip(logits.chunks(64)) {
                            let at = (position - 64) * 64;
                            for (got, want) in row.iter().zip(&want[at..at + 64]) {
                                let error = (got - want).abs() / largest;
                                assert!(error <= 2e-5, "{scaling} {device:?} {ranks}: {got} {want}");
                            }
                            seen += 1;
                        }
                    }
                    assert_eq!(seen, 16);
                }
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_continuation_is_the_same_on_any_ranks_and_devices() {
        let mut all = vec![];
        for device in Name::anywhere() {
            for ranks in [1, 2, 4] {
                let ids = vec![1, 40, 7];
                let job = GenerateJob { checkpoint: fixture("llama3"), device, ranks, ids, tokens: 12 };
                let mut said = vec![];
                let new = generate(&job, &mut |id| said.push(id)).await.unwrap();
                assert_eq!(new, said);
                assert!(!new.is_empty());
                all.push(new);
            }
        }
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{all:?}");
    }
}

//! Generation: the continuation of a prompt, by greedy decoding or by sampling with a temperature.

use tokio::runtime::Handle;
use tokio::sync::mpsc::unbounded_channel;

use crate::checkpoint::{Checkpoint, uniform};
use crate::comm::{Comm, TIMEOUT, threads};
use crate::conf::Precision;
use crate::decoder::{KvCache, Model};
use crate::device::DeviceName;
use crate::{Error, Location, Result};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    /// The likeliest token; of equals the lowest id.
    Greedy,
    /// A random token, drawn with probabilities proportional to p^(1 / temperature).
    Temperature { temperature: f64, seed: u64 },
}

/// A prompt, and the model and settings with which to continue it.
#[derive(Clone, Debug)]
pub struct GenerateJob {
    /// The folder of a Hugging Face Llama.
    pub checkpoint: Location,
    pub device: DeviceName,
    /// The type of matrix products and of cached keys and values.
    pub precision: Precision,
    pub sampling: Sampling,
    /// How many ranks share the sequence.
    pub ranks: usize,
    /// The prompt, at least one id.
    pub ids: Vec<i32>,
    /// The largest number of tokens to add. The checkpoint's end-of-text id ends generation sooner.
    pub tokens: usize,
}

/// Calls `on_token` with each new id as it is generated, and returns all new ids.
pub async fn generate(job: &GenerateJob, on_token: &mut (dyn FnMut(u32) + Send)) -> Result<Vec<u32>> {
    if job.ids.is_empty() {
        return Err(Error::Conf("the prompt is empty, and the tokenizer puts no token before it".into()));
    }
    let checkpoint = Checkpoint::open(&job.checkpoint).await?;
    checkpoint.config.check_ids(&job.ids)?;
    let (sender, mut receiver) = unbounded_channel();
    let (job, runtime) = (job.clone(), Handle::current());
    let working = tokio::task::spawn_blocking(move || {
        let model = Model::open(&checkpoint, job.device, job.precision.into(), &runtime)?;
        let ranks = threads::run(job.ranks, job.ranks, TIMEOUT, |comm, _| {
            let sender = (comm.rank() == 0).then(|| sender.clone());
            let mut said = |id| {
                if let Some(sender) = &sender {
                    // Nobody has to listen: the whole continuation is returned, too.
                    let _ = sender.send(id as u32);
                }
            };
            continue_tokens(
                &model,
                comm,
                &mut KvCache::default(),
                &job.ids,
                job.tokens,
                job.sampling,
                &mut said,
            )
        });
        ranks.map(|mut ranks| ranks.swap_remove(0))
    });
    while let Some(id) = receiver.recv().await {
        on_token(id);
    }
    let new = working.await.map_err(|e| Error::Rank { rank: 0, message: e.to_string() })??;
    Ok(new.into_iter().map(|id| id as u32).collect())
}

/// Reads `ids`, at least one, after the cached text, and generates at most `tokens` tokens. The checkpoint's end-of-text id
/// ends it sooner. Every rank returns the same ids.
pub fn continue_tokens(
    model: &Model,
    comm: &dyn Comm,
    cache: &mut KvCache,
    ids: &[i32],
    tokens: usize,
    sampling: Sampling,
    on_token: &mut dyn FnMut(i32),
) -> Result<Vec<i32>> {
    let eos = model.config.eos_ids();
    let mut new: Vec<i32> = vec![];
    while new.len() < tokens {
        let logits = model.next_logits(comm, cache, new.last().map_or(ids, std::slice::from_ref))?;
        let next = sampling.next_id(&logits, new.len() as u64);
        new.push(next);
        on_token(next);
        if eos.contains(&i64::from(next)) {
            break;
        }
    }
    Ok(new)
}

impl Sampling {
    /// Chooses the next id, after `index` generated ones.
    fn next_id(self, logits: &[f32], index: u64) -> i32 {
        let likelier = |a: (usize, f32), b: (usize, f32)| if b.1 > a.1 { b } else { a };
        let best = logits.iter().copied().enumerate().reduce(likelier).unwrap_or_default();
        let Sampling::Temperature { temperature, seed } = self else { return best.0 as i32 };
        let weights = logits.iter().map(|logit| (f64::from(logit - best.1) / temperature).exp());
        let mut left = uniform(seed, index) * weights.clone().sum::<f64>();
        let chosen = weights.enumerate().find(|(_, weight)| {
            left -= weight;
            left < 0.0
        });
        chosen.map_or(best.0, |(id, _)| id) as i32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::tests::fixture;

    fn job(device: DeviceName, ranks: usize, sampling: Sampling) -> GenerateJob {
        let (checkpoint, ids) = (fixture("llama3"), vec![1, 40, 7]);
        GenerateJob { checkpoint, device, precision: Precision::F32, sampling, ranks, ids, tokens: 12 }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_continuation_is_the_same_on_any_ranks_and_devices() {
        for sampling in [Sampling::Greedy, Sampling::Temperature { temperature: 1.0, seed: 3 }] {
            let mut all = vec![];
            for device in DeviceName::available() {
                for ranks in [1, 2, 4] {
                    let mut said = vec![];
                    let new = generate(&job(device, ranks, sampling), &mut |id| said.push(id)).await.unwrap();
                    assert_eq!(new, said);
                    assert!(!new.is_empty());
                    all.push(new);
                }
            }
            assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{all:?}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_continuation_ends_where_generation_config_says() {
        let there = fixture("llama3");
        let folder = crate::dataset::tests::folder(&[]).await;
        for name in crate::checkpoint_parts(&there).await.unwrap() {
            let bytes = there.join(&name).get().await.unwrap().unwrap();
            folder.join(&name).put(bytes.to_vec()).await.unwrap();
        }
        let all = |folder: Location| async {
            let job = GenerateJob { checkpoint: folder, ..job(DeviceName::Flex, 1, Sampling::Greedy) };
            generate(&job, &mut |_| {}).await.unwrap()
        };
        let want = all(folder.clone()).await;
        let third = want[2];
        let first = want.iter().position(|id| *id == third).unwrap();
        let generation = format!("{{ \"eos_token_id\": [1000, {third}] }}");
        folder.join("generation_config.json").put(generation.into_bytes()).await.unwrap();
        assert!(want.len() > first + 1);
        assert_eq!(all(folder).await, want[..=first]);
    }

    #[test]
    fn tokens_are_drawn_as_often_as_their_probability_says() {
        // At temperature 2, odds of 1 : 4 : 16 become 1 : 2 : 4.
        let logits = [0.0, 4f32.ln(), 16f32.ln(), f32::NEG_INFINITY];
        let draw = |seed| Sampling::Temperature { temperature: 2.0, seed }.next_id(&logits, seed % 7);
        let mut counts = [0; 4];
        (0..7_000).for_each(|seed| counts[draw(seed) as usize] += 1);
        for (count, want) in counts.into_iter().zip([1_000, 2_000, 4_000, 0]) {
            assert!(i32::abs(count - want) <= 120, "{counts:?}");
        }
        assert_eq!(Sampling::Greedy.next_id(&logits, 0), 2);
        assert_eq!(Sampling::Temperature { temperature: 1e-3, seed: 1 }.next_id(&logits, 0), 2);
        assert_eq!(Sampling::Greedy.next_id(&[1.0, 3.0, 3.0], 0), 1);
    }
}

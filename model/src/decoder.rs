//! Reading a text, and continuing it: forward only, some tokens at a time, beside the keys and values of what was read
//! before.
//!
//! ```text
//! a chunk's rows    r0 r0 r1 r1 r2 r2     each rank computes its own, and keeps their keys and values
//! attention         all queries ─▶ a rank's keys, of this chunk and of all before
//! out and lse       of all ranks' keys, merged in log space ─▶ each rank's own rows
//! ```
//!
//! Here queries go to where keys are, and not, as in training's ring, keys to where queries are: a token that is added has
//! one query, and may have a hundred thousand keys before it. A rank has the whole model; ranks on one device share it.

use std::ops::Range;

use burn_tensor::{Device, FloatDType, Tensor, TensorData};
use tokio::runtime::Handle;

use crate::Result;
use crate::attention::{Block, Kernel, Partial};
use crate::backprop::{LOGIT_ROWS, ids};
use crate::checkpoint::Checkpoint;
use crate::comm::Comm;
use crate::config::{Config, Scaling};
use crate::device::Name;
use crate::llama::{self, Layer, wide};
use crate::rope::Rope;
use crate::shards::Unit;

/// So many tokens are read at a time: what is computed of a prompt is never larger, only its keys and values are.
pub const CHUNK: usize = 2048;

/// Blocks of keys grow to so many rows.
const BLOCK: usize = 1 << 14;

/// A model, whole, on one device.
pub struct Model {
    pub config: Config,
    device: Device,
    kernel: Kernel,
    precision: FloatDType,
    embedding: Tensor<2>,
    layers: Vec<Layer>,
    norm: Tensor<2>,
    head: Tensor<2>,
}

/// What was read: its ids, and a rank's share of their keys and values, in blocks that never change. So a copy is cheap, and
/// texts that begin alike are read once up to where they part.
#[derive(Clone, Default)]
pub struct Cache {
    ids: Vec<i32>,
    blocks: Vec<Keys>,
}

/// Keys and values `[kv_heads, rows, head_dim]` of some positions, in ascending order, layer by layer.
#[derive(Clone)]
struct Keys {
    positions: Vec<usize>,
    layers: Vec<[Tensor<3>; 2]>,
}

impl Keys {
    /// The first rows.
    fn first(self, rows: usize) -> Self {
        let narrow = |tensor: Tensor<3>| tensor.narrow(1, 0, rows);
        let layers = self.layers.into_iter().map(|kv| kv.map(narrow)).collect();
        Self { positions: self.positions[..rows].to_vec(), layers }
    }

    fn followed_by(self, more: Self) -> Self {
        let both = |([k, v], [more_k, more_v]): ([Tensor<3>; 2], [Tensor<3>; 2])| {
            [Tensor::cat(vec![k, more_k], 1), Tensor::cat(vec![v, more_v], 1)]
        };
        let layers = self.layers.into_iter().zip(more.layers).map(both).collect();
        Self { positions: [self.positions, more.positions].concat(), layers }
    }
}

impl Cache {
    /// What was read.
    pub fn ids(&self) -> &[i32] {
        &self.ids
    }

    /// As if only the first tokens had been read.
    pub fn first(&self, tokens: usize) -> Self {
        let mut blocks = vec![];
        for block in &self.blocks {
            match block.positions.partition_point(|position| *position < tokens) {
                0 => {}
                all if all == block.positions.len() => blocks.push(block.clone()),
                rows => blocks.push(block.clone().first(rows)),
            }
        }
        Self { ids: self.ids[..tokens].to_vec(), blocks }
    }

    /// Adds a block. Blocks of one token grow together as the digits of a binary counter do: there are few of them, and no
    /// row is copied often.
    fn push(&mut self, keys: Keys) {
        self.blocks.push(keys);
        while let [.., a, b] = &self.blocks[..]
            && a.positions.len() < 2 * b.positions.len()
            && a.positions.len() + b.positions.len() <= BLOCK
        {
            let b = self.blocks.pop().expect("there are two");
            let a = self.blocks.pop().expect("there are two");
            self.blocks.push(a.followed_by(b));
        }
    }
}

impl Model {
    /// Reads a checkpoint.
    pub fn open(checkpoint: &Checkpoint, name: Name, precision: FloatDType, wait: &Handle) -> Result<Self> {
        let (config, device) = (checkpoint.config.clone(), name.open()?);
        let mut units = vec![];
        for unit in Unit::all(&config) {
            let numbers = wait.block_on(checkpoint.read(&unit, 0..unit.length))?;
            let flat = Tensor::<1>::from_data(TensorData::new(numbers, [unit.length]), &device);
            units.push(unit.parameters(flat.cast(precision)));
        }
        let mut last = units.pop().unwrap_or_default().into_iter();
        let mut units = units.into_iter();
        let embedding =
            units.next().and_then(|mut unit| unit.pop()).expect("the first unit is the embedding");
        let norm = last.next().expect("the last unit has a norm");
        let head = last.next().unwrap_or_else(|| embedding.clone());
        let layers = units.map(Layer::from_flat).collect();
        let kernel = name.kernel(precision, config.head_dim());
        Ok(Self { config, device, kernel, precision, embedding, layers, norm, head })
    }

    /// What of `cache` is of use for reading `ids`: the tokens that both begin with, but at least one less than `ids`.
    pub fn common(&self, cache: &Cache, ids: &[i32]) -> Cache {
        if matches!(self.config.scaling(), Ok(Scaling::Dynamic { .. })) {
            // with it a key depends on how long its text is
            return Cache::default();
        }
        cache.first(alike(&cache.ids, ids).min(ids.len().saturating_sub(1)))
    }

    /// Reads `ids` after what is in the cache.
    pub fn read(&self, comm: &dyn Comm, cache: &mut Cache, ids: &[i32]) -> Result<()> {
        self.chunks(comm, cache, ids, &mut |_, _, _| Ok(()))
    }

    /// Reads `ids`, at least one, after what is in the cache; the logits of the token after them, the same on every rank.
    pub fn next(&self, comm: &dyn Comm, cache: &mut Cache, ids: &[i32]) -> Result<Vec<f32>> {
        let mut logits = None;
        self.chunks(comm, cache, ids, &mut |first, rows, x| {
            let last = (first + rows == ids.len()).then_some(rows - 1);
            logits = last.map(|row| {
                let x = x.clone().narrow(0, row, 1);
                llama::logits(&self.config, &self.norm, &self.head, &x).reshape([-1])
            });
            Ok(())
        })?;
        // one rank has the last row, and gives it to the others
        let own = logits.unwrap_or_else(|| Tensor::zeros([self.config.vocab_size], &self.device));
        let logits = if comm.size() > 1 { comm.all_reduce(own)? } else { own };
        Ok(logits.into_data().iter::<f32>().collect())
    }

    /// Reads `ids` after what is in the cache; the loss of predicting `targets[i]` after `ids[i]`, for each, on every rank.
    pub fn losses(
        &self,
        comm: &dyn Comm,
        cache: &mut Cache,
        ids: &[i32],
        targets: &[i32],
    ) -> Result<Vec<f32>> {
        let mut own = vec![0.0; ids.len()];
        self.chunks(comm, cache, ids, &mut |first, rows, x| {
            for from in (0..rows).step_by(LOGIT_ROWS) {
                let n = LOGIT_ROWS.min(rows - from);
                let at = first + from..first + from + n;
                let x = x.clone().narrow(0, from, n);
                let logits = llama::logits(&self.config, &self.norm, &self.head, &x);
                let wanted = self::ids(&targets[at.clone()], &self.device).reshape([n, 1]);
                let losses = llama::cross_entropy(logits, wanted);
                for (place, loss) in at.zip(losses.into_data().iter::<f32>()) {
                    own[place] = loss;
                }
            }
            Ok(())
        })?;
        if comm.size() == 1 {
            return Ok(own);
        }
        // of each place one rank has the loss, and the others 0
        let own = Tensor::<1>::from_floats(own.as_slice(), &self.device);
        Ok(comm.all_reduce(own)?.into_data().iter::<f32>().collect())
    }

    /// Reads `ids` in chunks; gives `each` which of them this rank's rows are, the first and how many, and the last layer's
    /// output at them.
    fn chunks(
        &self,
        comm: &dyn Comm,
        cache: &mut Cache,
        ids: &[i32],
        each: &mut dyn FnMut(usize, usize, &Tensor<2>) -> Result<()>,
    ) -> Result<()> {
        let length = cache.ids.len() + ids.len();
        for (i, chunk) in ids.chunks(CHUNK).enumerate() {
            let x = self.chunk(comm, cache, chunk, length)?;
            let places = places(comm, chunk.len());
            if places.start < chunk.len() {
                each(i * CHUNK + places.start, places.end.min(chunk.len()) - places.start, &x)?;
            }
        }
        Ok(())
    }

    /// Reads a chunk of a text that will have `length` tokens in all; the last layer's output at this rank's rows, those
    /// beyond the chunk's end among them.
    fn chunk(&self, comm: &dyn Comm, cache: &mut Cache, chunk: &[i32], length: usize) -> Result<Tensor<2>> {
        // rows beyond the chunk's end are at the end of all, where nothing attends to them
        let places = places(comm, chunk.len());
        let (share, before) = (places.len(), cache.ids.len());
        let own: Vec<i32> = places.clone().map(|place| chunk.get(place).copied().unwrap_or(0)).collect();
        let positions: Vec<usize> = places.clone().map(|place| before + place).collect();
        let rope = Rope::new(&self.config, &positions, length, &self.device, self.precision)?;

        let all = comm.size() * share;
        let to = |queries: Range<usize>, keys: usize, causal| Block { queries, keys: 0..keys, causal };
        let mut x = self.embedding.clone().select(0, ids(&own, &self.device));
        let mut layers = vec![];
        for (i, layer) in self.layers.iter().enumerate() {
            let ([q, k, v], _) = llama::pre(&self.config, layer, &x, &rope);
            let q = gathered(comm, q)?;
            let mut partial = Partial::new(&q);
            partial.forward(self.kernel, &to(places.clone(), share, true), &q, &k, &v);
            if places.end < all {
                partial.forward(self.kernel, &to(places.end..all, share, false), &q, &k, &v);
            }
            for block in &cache.blocks {
                let [k, v] = &block.layers[i];
                partial.forward(self.kernel, &to(0..all, block.positions.len(), false), &q, k, v);
            }
            let (out, lse) = partial.finish();
            let out = merged(comm, out, lse)?.cast(x.dtype());
            x = llama::post(layer, &llama::post_saved(&self.config, layer, &x, &out));
            layers.push([k, v]);
        }
        let rows = chunk.len().saturating_sub(places.start).min(share);
        if rows > 0 {
            cache.push(Keys { positions, layers }.first(rows));
        }
        cache.ids.extend(chunk);
        Ok(x)
    }
}

/// How many ids two texts begin with alike.
pub fn alike(a: &[i32], b: &[i32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Which places of a chunk of so many are a rank's: as many for each, so that the last ones have some beyond its end.
fn places(comm: &dyn Comm, chunk: usize) -> Range<usize> {
    let share = chunk.div_ceil(comm.size());
    comm.rank() * share..(comm.rank() + 1) * share
}

/// The queries of all ranks, those of the first rank first.
fn gathered(comm: &dyn Comm, q: Tensor<3>) -> Result<Tensor<3>> {
    let ranks = comm.size();
    if ranks == 1 {
        return Ok(q);
    }
    let [heads, rows, hd] = q.dims();
    let all = comm.all_gather(q.reshape([-1]))?.reshape([ranks, heads, rows, hd]);
    Ok(all.swap_dims(0, 1).reshape([heads, ranks * rows, hd]))
}

/// This rank's rows of the attention to all ranks' keys, from that of all queries to this rank's.
fn merged(comm: &dyn Comm, out: Tensor<3>, lse: Tensor<3>) -> Result<Tensor<3>> {
    let ranks = comm.size();
    if ranks == 1 {
        return Ok(out);
    }
    let [heads, all, hd] = out.dims();
    let lse = wide(lse);
    let lses = comm.all_gather(lse.clone().reshape([-1]))?.reshape([ranks, heads, all]);
    let most = lses.clone().max_dim(0);
    let total = (lses - most.clone()).exp().sum_dim(0).log() + most;
    let part = wide(out) * (lse - total.reshape([heads, all, 1])).exp();
    let by_rank: Tensor<4> = part.reshape([heads, ranks, all / ranks, hd]).swap_dims(0, 1);
    Ok(comm.reduce_scatter(by_rank.reshape([-1]))?.reshape([heads, all / ranks, hd]))
}

#[cfg(test)]
pub mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::Location;
    use crate::comm::{PATIENCE, threads};
    use crate::tensors::Reader;
    use object_store::local::LocalFileSystem;

    pub fn fixture(name: &str) -> Location {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
        let store = LocalFileSystem::new_with_prefix(root).unwrap();
        Location { store: Arc::new(store), path: name.into(), base: format!("{root}/") }
    }

    /// A fixture's ids, and transformers' logits after each of the last 16 of them, `[16 × 64]`.
    pub async fn expected(at: &Location) -> (Vec<i32>, Vec<f32>) {
        let expected = Reader::open(at.join("expected.safetensors")).await.unwrap();
        let ids = expected.read("ids", 0..80).await.unwrap().into_iter().map(|id| id as i32).collect();
        (ids, expected.read("logits", 0..16 * 64).await.unwrap())
    }

    /// Transformers' losses of the last 15 ids, each after those before it.
    pub fn expected_losses(ids: &[i32], logits: &[f32]) -> Vec<f32> {
        let loss = |(row, id): (&[f32], &i32)| {
            let sum: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
            (sum.ln() - f64::from(row[*id as usize])) as f32
        };
        logits.chunks(VOCAB).zip(&ids[65..]).map(loss).collect()
    }

    fn close(got: &[f32], want: &[f32], all: &[f32], what: &str) {
        assert_eq!(got.len(), want.len());
        let largest = all.iter().fold(0f32, |most, w| most.max(w.abs()));
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() / largest <= 2e-5, "{what}: {got} {want}");
        }
    }

    const VOCAB: usize = 64;

    #[tokio::test(flavor = "multi_thread")]
    async fn logits_are_those_of_transformers_with_each_scaling_on_any_ranks() {
        for scaling in ["default", "linear", "dynamic", "yarn", "llama3"] {
            let at = fixture(scaling);
            let (ids, want) = expected(&at).await;
            let checkpoint = Checkpoint::open(&at).await.unwrap();
            let wait = Handle::current();
            for device in Name::at_hand() {
                for ranks in [1, 2, 3, 4, 7] {
                    let parts = tokio::task::block_in_place(|| {
                        let model = Model::open(&checkpoint, device, FloatDType::F32, &wait)?;
                        threads::run(ranks, ranks, PATIENCE, |comm, _| {
                            let mut own = vec![];
                            model.chunks(comm, &mut Cache::default(), &ids, &mut |first, rows, x| {
                                let x = x.clone().narrow(0, 0, rows);
                                let logits = llama::logits(&model.config, &model.norm, &model.head, &x);
                                let logits: Vec<f32> = logits.into_data().iter::<f32>().collect();
                                own.extend(logits.into_iter().skip(64usize.saturating_sub(first) * VOCAB));
                                Ok(())
                            })?;
                            Ok(own)
                        })
                    });
                    close(&parts.unwrap().concat(), &want, &want, &format!("{scaling} {device:?} {ranks}"));
                }
            }
        }
    }

    /// The logits after the last 16 ids, read in parts of these sizes and then one by one, after another text that begins
    /// with the same 30 ids was read.
    fn in_parts(model: &Model, comm: &dyn Comm, ids: &[i32], parts: &[usize]) -> Result<Vec<f32>> {
        let mut other = Cache::default();
        model.next(comm, &mut other, &[&ids[..30], &[5, 6, 7]].concat())?;
        let mut cache = model.common(&other, ids);
        assert_eq!(cache.ids(), &ids[..30]);
        let (mut all, mut read) = (vec![], 30);
        for part in parts {
            all = model.next(comm, &mut cache, &ids[read..read + part])?;
            read += part;
        }
        for id in &ids[read..] {
            all.extend(model.next(comm, &mut cache, &[*id])?);
        }
        assert_eq!(cache.ids(), ids);
        Ok(all)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_text_in_parts_after_one_that_begins_alike_gives_the_same_logits() {
        for scaling in ["default", "llama3"] {
            let at = fixture(scaling);
            let (ids, want) = expected(&at).await;
            let checkpoint = Checkpoint::open(&at).await.unwrap();
            let wait = Handle::current();
            for device in Name::at_hand() {
                let model = tokio::task::block_in_place(|| {
                    Model::open(&checkpoint, device, FloatDType::F32, &wait).unwrap()
                });
                for ranks in [1, 2, 3] {
                    for parts in [&[35][..], &[1, 20, 14], &[17, 1, 1, 1, 15]] {
                        let got = tokio::task::block_in_place(|| {
                            threads::run(ranks, ranks, PATIENCE, |comm, _| {
                                in_parts(&model, comm, &ids, parts)
                            })
                        });
                        for got in got.unwrap() {
                            close(&got, &want, &want, &format!("{scaling} {device:?} {ranks} {parts:?}"));
                        }
                    }
                }
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn losses_are_those_of_the_logits() {
        let at = fixture("default");
        let (ids, logits) = expected(&at).await;
        let want = expected_losses(&ids, &logits);
        assert_eq!(want.len(), 15);
        let checkpoint = Checkpoint::open(&at).await.unwrap();
        let wait = Handle::current();
        for ranks in [1, 3] {
            let got = tokio::task::block_in_place(|| {
                let model = Model::open(&checkpoint, Name::Flex, FloatDType::F32, &wait)?;
                threads::run(ranks, ranks, PATIENCE, |comm, _| {
                    model.losses(comm, &mut Cache::default(), &ids[..79], &ids[1..])
                })
            });
            for got in got.unwrap() {
                close(&got[64..], &want, &logits, &format!("{ranks}"));
            }
        }
    }

    #[test]
    fn blocks_of_one_token_grow_together() {
        let keys = |position: usize| Keys {
            positions: vec![position],
            layers: vec![[(); 2].map(|()| Tensor::full([1, 1, 1], position as f32, &Device::flex()))],
        };
        let mut cache = Cache::default();
        for position in 0..1000 {
            cache.ids.push(0);
            cache.push(keys(position));
        }
        assert!(cache.blocks.len() <= 10, "{}", cache.blocks.len());
        let first = cache.first(777);
        let rows = |cache: &Cache| -> Vec<f32> {
            let values =
                |block: &Keys| block.layers[0][0].clone().into_data().iter::<f32>().collect::<Vec<_>>();
            cache.blocks.iter().flat_map(values).collect()
        };
        assert_eq!(rows(&first), (0..777).map(|p| p as f32).collect::<Vec<_>>());
        assert_eq!(rows(&cache).len(), 1000);
    }
}

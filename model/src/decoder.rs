//! Inference: the forward pass over a text, a chunk of tokens at a time, with a cache of the keys and values of earlier
//! tokens.
//!
//! ```text
//! a chunk's rows    r0 r0 r1 r1 r2 r2     each rank computes its rows and caches their keys and values
//! attention         all queries ─▶ each rank's keys, of this chunk and of all before
//! out and lse       over all ranks' keys, merged in log space ─▶ each rank's rows
//! ```
//!
//! Queries are sent to the keys. Training's ring sends keys to the queries instead, but here a new token has one query and
//! perhaps a hundred thousand keys. Each rank has the whole model; ranks on one device share it.

use std::ops::Range;

use burn_tensor::{Device, FloatDType, Tensor, TensorData};
use tokio::runtime::Handle;

use crate::Result;
use crate::attention::{Block, Kernel, OnlineSoftmax};
use crate::backprop::{LOGIT_ROWS, id_tensor};
use crate::checkpoint::Checkpoint;
use crate::comm::Comm;
use crate::config::{Config, Scaling};
use crate::device::DeviceName;
use crate::llama::{self, Layer, to_f32};
use crate::rope::Rope;
use crate::shards::Unit;

/// Tokens per chunk of prefill, which bounds the memory of everything but keys and values.
pub const PREFILL_CHUNK: usize = 2048;

/// Cached blocks grow to this many rows.
const MAX_BLOCK_ROWS: usize = 1 << 14;

/// A whole model on one device.
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

/// The text read so far: its ids, and a rank's share of their keys and values. Blocks never change, so a copy is cheap, and
/// texts with a common prefix share it.
#[derive(Clone, Default)]
pub struct KvCache {
    ids: Vec<i32>,
    blocks: Vec<KvBlock>,
}

/// The keys and values `[kv_heads, rows, head_dim]` of ascending positions, layer by layer.
#[derive(Clone)]
struct KvBlock {
    positions: Vec<usize>,
    layers: Vec<[Tensor<3>; 2]>,
}

impl KvBlock {
    /// The block's first rows.
    fn prefix(self, rows: usize) -> Self {
        let narrow = |tensor: Tensor<3>| tensor.narrow(1, 0, rows);
        let layers = self.layers.into_iter().map(|kv| kv.map(narrow)).collect();
        Self { positions: self.positions[..rows].to_vec(), layers }
    }

    fn concat(self, next: Self) -> Self {
        let both = |([k, v], [next_k, next_v]): ([Tensor<3>; 2], [Tensor<3>; 2])| {
            [Tensor::cat(vec![k, next_k], 1), Tensor::cat(vec![v, next_v], 1)]
        };
        let layers = self.layers.into_iter().zip(next.layers).map(both).collect();
        Self { positions: [self.positions, next.positions].concat(), layers }
    }
}

impl KvCache {
    /// The text read so far.
    pub fn ids(&self) -> &[i32] {
        &self.ids
    }

    /// The cache of the first tokens.
    pub fn prefix(&self, tokens: usize) -> Self {
        let mut blocks = vec![];
        for block in &self.blocks {
            match block.positions.partition_point(|position| *position < tokens) {
                0 => {}
                all if all == block.positions.len() => blocks.push(block.clone()),
                rows => blocks.push(block.clone().prefix(rows)),
            }
        }
        Self { ids: self.ids[..tokens].to_vec(), blocks }
    }

    /// Adds a block. Small blocks merge like the digits of a binary counter, so that there are few blocks and each row is
    /// copied only a few times.
    fn push(&mut self, keys: KvBlock) {
        self.blocks.push(keys);
        while let [.., a, b] = &self.blocks[..]
            && a.positions.len() < 2 * b.positions.len()
            && a.positions.len() + b.positions.len() <= MAX_BLOCK_ROWS
        {
            let b = self.blocks.pop().expect("there are two");
            let a = self.blocks.pop().expect("there are two");
            self.blocks.push(a.concat(b));
        }
    }
}

impl Model {
    /// Loads a checkpoint.
    pub fn open(
        checkpoint: &Checkpoint,
        name: DeviceName,
        precision: FloatDType,
        runtime: &Handle,
    ) -> Result<Self> {
        let (config, device) = (checkpoint.config.clone(), name.open()?);
        let mut units = vec![];
        for unit in Unit::all(&config) {
            let numbers = runtime.block_on(checkpoint.read(&unit, 0..unit.length))?;
            let flat = Tensor::<1>::from_data(TensorData::new(numbers, [unit.length]), &device);
            units.push(unit.unflatten(flat.cast(precision)));
        }
        let mut last = units.pop().unwrap_or_default().into_iter();
        let mut units = units.into_iter();
        let embedding =
            units.next().and_then(|mut unit| unit.pop()).expect("the first unit is the embedding");
        let norm = last.next().expect("the last unit has a norm");
        let head = last.next().unwrap_or_else(|| embedding.clone());
        let layers = units.map(Layer::from_parameters).collect();
        let kernel = name.kernel(precision, config.head_dim());
        Ok(Self { config, device, kernel, precision, embedding, layers, norm, head })
    }

    /// The part of `cache` that can be reused to read `ids`: their common prefix, without the last of `ids`.
    pub fn reusable_prefix(&self, cache: &KvCache, ids: &[i32]) -> KvCache {
        if matches!(self.config.scaling(), Ok(Scaling::Dynamic { .. })) {
            // With dynamic scaling, keys depend on the text's length.
            return KvCache::default();
        }
        cache.prefix(common_prefix_len(&cache.ids, ids).min(ids.len().saturating_sub(1)))
    }

    /// Reads `ids` after the cached text.
    pub fn prefill(&self, comm: &dyn Comm, cache: &mut KvCache, ids: &[i32]) -> Result<()> {
        self.forward(comm, cache, ids, &mut |_, _, _| Ok(()))
    }

    /// Reads `ids`, at least one, after the cached text. Returns the logits of the next token, the same on every rank.
    pub fn next_logits(&self, comm: &dyn Comm, cache: &mut KvCache, ids: &[i32]) -> Result<Vec<f32>> {
        let mut logits = None;
        self.forward(comm, cache, ids, &mut |first, rows, x| {
            let last = (first + rows == ids.len()).then_some(rows - 1);
            logits = last.map(|row| {
                let x = x.clone().narrow(0, row, 1);
                llama::logits(&self.config, &self.norm, &self.head, &x).reshape([-1])
            });
            Ok(())
        })?;
        // One rank has the last row, and sends it to the others.
        let own = logits.unwrap_or_else(|| Tensor::zeros([self.config.vocab_size], &self.device));
        let logits = if comm.size() > 1 { comm.all_reduce(own)? } else { own };
        Ok(logits.into_data().iter::<f32>().collect())
    }

    /// Reads `ids` after the cached text. Returns the loss of predicting each `targets[i]` after `ids[i]`, on every rank.
    pub fn losses(
        &self,
        comm: &dyn Comm,
        cache: &mut KvCache,
        ids: &[i32],
        targets: &[i32],
    ) -> Result<Vec<f32>> {
        let mut own = vec![0.0; ids.len()];
        self.forward(comm, cache, ids, &mut |first, rows, x| {
            for from in (0..rows).step_by(LOGIT_ROWS) {
                let n = LOGIT_ROWS.min(rows - from);
                let at = first + from..first + from + n;
                let x = x.clone().narrow(0, from, n);
                let logits = llama::logits(&self.config, &self.norm, &self.head, &x);
                let targets = id_tensor(&targets[at.clone()], &self.device).reshape([n, 1]);
                let losses = llama::cross_entropy(logits, targets);
                for (index, loss) in at.zip(losses.into_data().iter::<f32>()) {
                    own[index] = loss;
                }
            }
            Ok(())
        })?;
        if comm.size() == 1 {
            return Ok(own);
        }
        // Each loss is on one rank; the others have 0 there.
        let own = Tensor::<1>::from_floats(own.as_slice(), &self.device);
        Ok(comm.all_reduce(own)?.into_data().iter::<f32>().collect())
    }

    /// Reads `ids` in chunks. Calls `each` with the index of this rank's first row, their number, and the last layer's output
    /// at them.
    fn forward(
        &self,
        comm: &dyn Comm,
        cache: &mut KvCache,
        ids: &[i32],
        each: &mut dyn FnMut(usize, usize, &Tensor<2>) -> Result<()>,
    ) -> Result<()> {
        let length = cache.ids.len() + ids.len();
        for (i, chunk) in ids.chunks(PREFILL_CHUNK).enumerate() {
            let x = self.forward_chunk(comm, cache, chunk, length)?;
            let local = local_range(comm, chunk.len());
            if local.start < chunk.len() {
                each(i * PREFILL_CHUNK + local.start, local.end.min(chunk.len()) - local.start, &x)?;
            }
        }
        Ok(())
    }

    /// Reads a chunk of a text of `length` tokens. Returns the last layer's output at this rank's rows, including those
    /// beyond the chunk's end.
    fn forward_chunk(
        &self,
        comm: &dyn Comm,
        cache: &mut KvCache,
        chunk: &[i32],
        length: usize,
    ) -> Result<Tensor<2>> {
        // Rows beyond the chunk's end are last, so no other row attends to them.
        let local = local_range(comm, chunk.len());
        let (share, before) = (local.len(), cache.ids.len());
        let own: Vec<i32> = local.clone().map(|index| chunk.get(index).copied().unwrap_or(0)).collect();
        let positions: Vec<usize> = local.clone().map(|index| before + index).collect();
        let rope = Rope::new(&self.config, &positions, length, &self.device, self.precision)?;

        let all = comm.size() * share;
        let to = |queries: Range<usize>, keys: usize, causal| Block { queries, keys: 0..keys, causal };
        let mut x = self.embedding.clone().select(0, id_tensor(&own, &self.device));
        let mut layers = vec![];
        for (i, layer) in self.layers.iter().enumerate() {
            let ([q, k, v], _) = llama::pre_attention(&self.config, layer, &x, &rope);
            let q = all_gather_queries(comm, q)?;
            let mut attention = OnlineSoftmax::new(&q);
            attention.forward(self.kernel, &to(local.clone(), share, true), &q, &k, &v);
            if local.end < all {
                attention.forward(self.kernel, &to(local.end..all, share, false), &q, &k, &v);
            }
            for block in &cache.blocks {
                let [k, v] = &block.layers[i];
                attention.forward(self.kernel, &to(0..all, block.positions.len(), false), &q, k, v);
            }
            let (out, lse) = attention.finish();
            let out = merge_attention(comm, out, lse)?.cast(x.dtype());
            x = llama::layer_output(layer, &llama::post_attention(&self.config, layer, &x, &out));
            layers.push([k, v]);
        }
        let rows = chunk.len().saturating_sub(local.start).min(share);
        if rows > 0 {
            cache.push(KvBlock { positions, layers }.prefix(rows));
        }
        cache.ids.extend(chunk);
        Ok(x)
    }
}

/// The length of the common prefix of two texts.
pub fn common_prefix_len(a: &[i32], b: &[i32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// A rank's rows of a chunk. All ranks have equally many, so those of the last ranks may lie beyond the chunk's end.
fn local_range(comm: &dyn Comm, chunk: usize) -> Range<usize> {
    let share = chunk.div_ceil(comm.size());
    comm.rank() * share..(comm.rank() + 1) * share
}

/// The queries of all ranks, in the order of ranks.
fn all_gather_queries(comm: &dyn Comm, q: Tensor<3>) -> Result<Tensor<3>> {
    let ranks = comm.size();
    if ranks == 1 {
        return Ok(q);
    }
    let [heads, rows, hd] = q.dims();
    let all = comm.all_gather(q.reshape([-1]))?.reshape([ranks, heads, rows, hd]);
    Ok(all.swap_dims(0, 1).reshape([heads, ranks * rows, hd]))
}

/// This rank's rows of the attention to all ranks' keys, from all queries' attention to this rank's keys.
fn merge_attention(comm: &dyn Comm, out: Tensor<3>, lse: Tensor<3>) -> Result<Tensor<3>> {
    let ranks = comm.size();
    if ranks == 1 {
        return Ok(out);
    }
    let [heads, all, hd] = out.dims();
    let lse = to_f32(lse);
    let lses = comm.all_gather(lse.clone().reshape([-1]))?.reshape([ranks, heads, all]);
    let max = lses.clone().max_dim(0);
    let total_lse = (lses - max.clone()).exp().sum_dim(0).log() + max;
    let part = to_f32(out) * (lse - total_lse.reshape([heads, all, 1])).exp();
    let by_rank: Tensor<4> = part.reshape([heads, ranks, all / ranks, hd]).swap_dims(0, 1);
    Ok(comm.reduce_scatter(by_rank.reshape([-1]))?.reshape([heads, all / ranks, hd]))
}

#[cfg(test)]
pub mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::Location;
    use crate::comm::{TIMEOUT, threads};
    use crate::tensors::Reader;
    use object_store::local::LocalFileSystem;

    pub fn fixture(name: &str) -> Location {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
        let store = LocalFileSystem::new_with_prefix(root).unwrap();
        Location { store: Arc::new(store), path: name.into(), base: format!("{root}/") }
    }

    /// A fixture's ids, and transformers' logits `[16 × 64]` after each of the last 16.
    pub async fn expected(at: &Location) -> (Vec<i32>, Vec<f32>) {
        let expected = Reader::open(at.join("expected.safetensors")).await.unwrap();
        let ids = expected.read("ids", 0..80).await.unwrap().into_iter().map(|id| id as i32).collect();
        (ids, expected.read("logits", 0..16 * 64).await.unwrap())
    }

    /// Transformers' losses of the last 15 ids, each given those before it.
    pub fn expected_losses(ids: &[i32], logits: &[f32]) -> Vec<f32> {
        let loss = |(row, id): (&[f32], &i32)| {
            let sum: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
            (sum.ln() - f64::from(row[*id as usize])) as f32
        };
        logits.chunks(VOCAB).zip(&ids[65..]).map(loss).collect()
    }

    fn close(got: &[f32], want: &[f32], all: &[f32], what: &str) {
        assert_eq!(got.len(), want.len());
        let largest = all.iter().fold(0f32, |max, w| max.max(w.abs()));
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
            let runtime = Handle::current();
            for device in DeviceName::available() {
                for ranks in [1, 2, 3, 4, 7] {
                    let parts = tokio::task::block_in_place(|| {
                        let model = Model::open(&checkpoint, device, FloatDType::F32, &runtime)?;
                        threads::run(ranks, ranks, TIMEOUT, |comm, _| {
                            let mut own = vec![];
                            model.forward(comm, &mut KvCache::default(), &ids, &mut |first, rows, x| {
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

    /// The logits after the last 16 ids. The text is read in parts of these sizes and then one by one, after another text
    /// with the same first 30 ids.
    fn in_parts(model: &Model, comm: &dyn Comm, ids: &[i32], parts: &[usize]) -> Result<Vec<f32>> {
        let mut other = KvCache::default();
        model.next_logits(comm, &mut other, &[&ids[..30], &[5, 6, 7]].concat())?;
        let mut cache = model.reusable_prefix(&other, ids);
        assert_eq!(cache.ids(), &ids[..30]);
        let (mut all, mut read) = (vec![], 30);
        for part in parts {
            all = model.next_logits(comm, &mut cache, &ids[read..read + part])?;
            read += part;
        }
        for id in &ids[read..] {
            all.extend(model.next_logits(comm, &mut cache, &[*id])?);
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
            let runtime = Handle::current();
            for device in DeviceName::available() {
                let model = tokio::task::block_in_place(|| {
                    Model::open(&checkpoint, device, FloatDType::F32, &runtime).unwrap()
                });
                for ranks in [1, 2, 3] {
                    for parts in [&[35][..], &[1, 20, 14], &[17, 1, 1, 1, 15]] {
                        let got = tokio::task::block_in_place(|| {
                            threads::run(ranks, ranks, TIMEOUT, |comm, _| in_parts(&model, comm, &ids, parts))
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
        let runtime = Handle::current();
        for ranks in [1, 3] {
            let got = tokio::task::block_in_place(|| {
                let model = Model::open(&checkpoint, DeviceName::Flex, FloatDType::F32, &runtime)?;
                threads::run(ranks, ranks, TIMEOUT, |comm, _| {
                    model.losses(comm, &mut KvCache::default(), &ids[..79], &ids[1..])
                })
            });
            for got in got.unwrap() {
                close(&got[64..], &want, &logits, &format!("{ranks}"));
            }
        }
    }

    #[test]
    fn blocks_of_one_token_grow_together() {
        let keys = |position: usize| KvBlock {
            positions: vec![position],
            layers: vec![[(); 2].map(|()| Tensor::full([1, 1, 1], position as f32, &Device::flex()))],
        };
        let mut cache = KvCache::default();
        for position in 0..1000 {
            cache.ids.push(0);
            cache.push(keys(position));
        }
        assert!(cache.blocks.len() <= 10, "{}", cache.blocks.len());
        let first = cache.prefix(777);
        let rows = |cache: &KvCache| -> Vec<f32> {
            let values =
                |block: &KvBlock| block.layers[0][0].clone().into_data().iter::<f32>().collect::<Vec<_>>();
            cache.blocks.iter().flat_map(values).collect()
        };
        assert_eq!(rows(&first), (0..777).map(|p| p as f32).collect::<Vec<_>>());
        assert_eq!(rows(&cache).len(), 1000);
    }
}

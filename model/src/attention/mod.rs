//! Attention as an explicit pair of forward and backward over blocks of queries and keys, each in time of its own size
//! and in memory linear in the sequence.
//!
//! The log-sum-exp of each query's scores is part of the result: with it, results over several blocks of keys are merged,
//! and a block's backward needs only the merged result.

#[cfg(feature = "libtorch")]
mod flash;
mod plain;

use std::ops::Range;

use burn_tensor::{Device, Tensor};

use crate::llama::wide;

/// Some queries that attend to some keys, as rows of their tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    pub queries: Range<usize>,
    pub keys: Range<usize>,
    /// As many queries as keys, each attending to those up to its own. Otherwise each attends to all.
    pub causal: bool,
}

/// What computes a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kernel {
    /// Plain tensor operations, on any device.
    Plain,
    /// LibTorch's flash attention.
    #[cfg(feature = "libtorch")]
    Flash,
}

impl Kernel {
    /// q `[heads, n, hd]`, k and v `[kv_heads, m, hd]` to out `[heads, n, hd]` and lse `[heads, n, 1]`.
    fn forward(self, q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, causal: bool) -> (Tensor<3>, Tensor<3>) {
        match self {
            Kernel::Plain => plain::forward(&q, &k, &v, causal),
            #[cfg(feature = "libtorch")]
            Kernel::Flash => flash::forward(&q, &k, &v, causal),
        }
    }

    /// Gradients of q, k and v, from that of out, and the out and lse of all blocks together.
    fn backward(
        self,
        dout: Tensor<3>,
        qkv: [Tensor<3>; 3],
        out: Tensor<3>,
        lse: Tensor<3>,
        causal: bool,
    ) -> [Tensor<3>; 3] {
        match self {
            Kernel::Plain => plain::backward(&dout, &qkv, &out, &lse, causal),
            #[cfg(feature = "libtorch")]
            Kernel::Flash => flash::backward(&dout, &qkv, &out, &lse, causal),
        }
    }
}

fn rows(x: &Tensor<3>, rows: &Range<usize>) -> Tensor<3> {
    x.clone().narrow(1, rows.start, rows.len())
}

/// Puts `new` in place of some rows; a range of all rows is just `new`.
fn put(x: Tensor<3>, rows: &Range<usize>, new: Tensor<3>) -> Tensor<3> {
    let [heads, n, width] = x.dims();
    if rows.len() == n { new } else { x.slice_assign([0..heads, rows.clone(), 0..width], new) }
}

fn add(sum: Tensor<3>, at: &Range<usize>, more: Tensor<3>) -> Tensor<3> {
    let new = rows(&sum, at) + wide(more);
    put(sum, at, new)
}

/// The lse of a query that attended to nothing. Not −∞, whose difference to itself is no number.
const NOTHING: f64 = -1e30;

/// Attention over the blocks met so far, in f32.
pub struct Partial {
    /// `[heads, S, hd]` and `[heads, S, 1]`.
    sums: Option<(Tensor<3>, Tensor<3>)>,
    shape: [usize; 3],
    device: Device,
}

impl Partial {
    /// For queries of the shape of `q`.
    pub fn new(q: &Tensor<3>) -> Self {
        Self { sums: None, shape: q.dims(), device: q.device() }
    }

    /// Adds what some queries attend to in some keys.
    pub fn forward(&mut self, kernel: Kernel, block: &Block, q: &Tensor<3>, k: &Tensor<3>, v: &Tensor<3>) {
        let (queries, keys) = (&block.queries, &block.keys);
        let (out, lse) = kernel.forward(rows(q, queries), rows(k, keys), rows(v, keys), block.causal);
        let out = wide(out);
        let [heads, s, hd] = self.shape;
        let Some((sum, sum_lse)) = self.sums.take() else {
            self.sums = Some(if queries.len() == s {
                (out, lse)
            } else {
                let nothing = Tensor::full([heads, s, 1], NOTHING, (&self.device, lse.dtype()));
                let zeros = Tensor::zeros([heads, s, hd], (&self.device, out.dtype()));
                (put(zeros, queries, out), put(nothing, queries, lse))
            });
            return;
        };
        // merged in log space: each side by exp(its lse − the lse of both)
        let before = rows(&sum_lse, queries);
        let most = before.clone().max_pair(lse.clone());
        let (a, b) = ((before - most.clone()).exp(), (lse - most.clone()).exp());
        let total = a.clone() + b.clone();
        let merged = rows(&sum, queries) * (a / total.clone()) + out * (b / total.clone());
        self.sums = Some((put(sum, queries, merged), put(sum_lse, queries, most + total.log())));
    }

    /// The result, and the log-sum-exp of each query's scores.
    pub fn finish(self) -> (Tensor<3>, Tensor<3>) {
        let [heads, s, hd] = self.shape;
        self.sums.unwrap_or_else(|| {
            (Tensor::zeros([heads, s, hd], &self.device), Tensor::full([heads, s, 1], NOTHING, &self.device))
        })
    }
}

/// Gradients of queries, and of some keys and values, as sums over blocks, in f32.
pub struct Gradients {
    pub dq: Tensor<3>,
    pub dk: Tensor<3>,
    pub dv: Tensor<3>,
}

impl Gradients {
    pub fn backward(
        self,
        kernel: Kernel,
        block: &Block,
        dout: &Tensor<3>,
        [q, k, v]: [&Tensor<3>; 3],
        out: &Tensor<3>,
        lse: &Tensor<3>,
    ) -> Self {
        let (queries, keys) = (&block.queries, &block.keys);
        let qkv = [rows(q, queries), rows(k, keys), rows(v, keys)];
        let of_queries = |x: &Tensor<3>| rows(x, queries);
        let [dq, dk, dv] =
            kernel.backward(of_queries(dout), qkv, of_queries(out), of_queries(lse), block.causal);
        Self { dq: add(self.dq, queries, dq), dk: add(self.dk, keys, dk), dv: add(self.dv, keys, dv) }
    }
}

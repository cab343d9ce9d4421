//! Attention as an explicit forward/backward pair over blocks of queries and keys. Memory is linear in the sequence.
//!
//! The result includes the log-sum-exp (lse) of each query's scores. It allows results over several blocks of keys to be
//! merged, and a block's backward needs only the merged result.

#[cfg(feature = "libtorch")]
mod flash;
mod plain;

use std::ops::Range;

use burn_tensor::{Device, Tensor};

use crate::llama::to_f32;

/// A range of queries that attend to a range of keys, as rows of their tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    pub queries: Range<usize>,
    pub keys: Range<usize>,
    /// Whether each query attends only to the keys up to its own row; there are then as many queries as keys. Otherwise each
    /// query attends to all keys.
    pub causal: bool,
}

/// The implementation that computes a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kernel {
    /// Plain tensor operations, on any device.
    Plain,
    /// LibTorch's flash attention.
    #[cfg(feature = "libtorch")]
    Flash,
}

impl Kernel {
    /// From q `[heads, n, hd]`, and k and v `[kv_heads, m, hd]`: out `[heads, n, hd]` and lse `[heads, n, 1]`.
    fn forward(self, q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, causal: bool) -> (Tensor<3>, Tensor<3>) {
        match self {
            Kernel::Plain => plain::forward(&q, &k, &v, causal),
            #[cfg(feature = "libtorch")]
            Kernel::Flash => flash::forward(&q, &k, &v, causal),
        }
    }

    /// The gradients of q, k and v, from the gradient of out. `out` and `lse` are those of all blocks together.
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

fn select_rows(x: &Tensor<3>, rows: &Range<usize>) -> Tensor<3> {
    x.clone().narrow(1, rows.start, rows.len())
}

/// Replaces some rows of `x` by `new`.
fn assign_rows(x: Tensor<3>, rows: &Range<usize>, new: Tensor<3>) -> Tensor<3> {
    let [heads, n, width] = x.dims();
    if rows.len() == n { new } else { x.slice_assign([0..heads, rows.clone(), 0..width], new) }
}

fn add_to_rows(sum: Tensor<3>, rows: &Range<usize>, addend: Tensor<3>) -> Tensor<3> {
    let new = select_rows(&sum, rows) + to_f32(addend);
    assign_rows(sum, rows, new)
}

/// The lse of a query that attended to nothing. It is finite because −∞ − −∞ is NaN.
const EMPTY_LSE: f64 = -1e30;

/// Attention over the blocks added so far, in f32 (online softmax).
pub struct OnlineSoftmax {
    /// out `[heads, S, hd]` and lse `[heads, S, 1]`.
    sums: Option<(Tensor<3>, Tensor<3>)>,
    shape: [usize; 3],
    device: Device,
}

impl OnlineSoftmax {
    /// For queries of the shape of `q`, before any block.
    pub fn new(q: &Tensor<3>) -> Self {
        Self { sums: None, shape: q.dims(), device: q.device() }
    }

    /// Adds a block.
    pub fn forward(&mut self, kernel: Kernel, block: &Block, q: &Tensor<3>, k: &Tensor<3>, v: &Tensor<3>) {
        let (queries, keys) = (&block.queries, &block.keys);
        let (out, lse) =
            kernel.forward(select_rows(q, queries), select_rows(k, keys), select_rows(v, keys), block.causal);
        let out = to_f32(out);
        let [heads, s, hd] = self.shape;
        let Some((sum, sum_lse)) = self.sums.take() else {
            self.sums = Some(if queries.len() == s {
                (out, lse)
            } else {
                let empty = Tensor::full([heads, s, 1], EMPTY_LSE, (&self.device, lse.dtype()));
                let zeros = Tensor::zeros([heads, s, hd], (&self.device, out.dtype()));
                (assign_rows(zeros, queries, out), assign_rows(empty, queries, lse))
            });
            return;
        };
        // Merge in log space: each side is weighted by exp(its lse − the lse of both).
        let before = select_rows(&sum_lse, queries);
        let max = before.clone().max_pair(lse.clone());
        let (a, b) = ((before - max.clone()).exp(), (lse - max.clone()).exp());
        let sum_exp = a.clone() + b.clone();
        let merged = select_rows(&sum, queries) * (a / sum_exp.clone()) + out * (b / sum_exp.clone());
        self.sums =
            Some((assign_rows(sum, queries, merged), assign_rows(sum_lse, queries, max + sum_exp.log())));
    }

    /// out and lse over all blocks.
    pub fn finish(self) -> (Tensor<3>, Tensor<3>) {
        let [heads, s, hd] = self.shape;
        self.sums.unwrap_or_else(|| {
            (
                Tensor::zeros([heads, s, hd], &self.device),
                Tensor::full([heads, s, 1], EMPTY_LSE, &self.device),
            )
        })
    }
}

/// The gradients of queries, keys and values, summed over blocks, in f32.
pub struct AttentionGradients {
    pub dq: Tensor<3>,
    pub dk: Tensor<3>,
    pub dv: Tensor<3>,
}

impl AttentionGradients {
    /// Adds the gradients of a block.
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
        let qkv = [select_rows(q, queries), select_rows(k, keys), select_rows(v, keys)];
        let of_queries = |x: &Tensor<3>| select_rows(x, queries);
        let [dq, dk, dv] =
            kernel.backward(of_queries(dout), qkv, of_queries(out), of_queries(lse), block.causal);
        Self {
            dq: add_to_rows(self.dq, queries, dq),
            dk: add_to_rows(self.dk, keys, dk),
            dv: add_to_rows(self.dv, keys, dv),
        }
    }
}

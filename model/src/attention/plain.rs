//! A block of attention in plain tensor operations, on any device. Queries are processed in chunks, so that memory is
//! linear.

use burn_tensor::{Bool, Int, Tensor};

use crate::llama::to_f32;

/// Queries in a chunk.
const QUERY_CHUNK: usize = 256;

/// The causal mask `[1, groups × n, m]` of queries `from..from + n`: true where a key comes after its query.
fn causal_mask(from: usize, n: usize, groups: usize, m: usize, q: &Tensor<3>) -> Tensor<3, Bool> {
    let device = q.device();
    let queries = Tensor::<1, Int>::arange(from as i64..(from + n) as i64, &device).reshape([1, 1, n, 1]);
    let queries = queries.expand([1, groups, n, 1]).reshape([1, groups * n, 1]);
    let keys = Tensor::<1, Int>::arange(0..m as i64, &device).reshape([1, 1, m]);
    keys.expand([1, groups * n, m]).greater(queries.expand([1, groups * n, m]))
}

/// Rows `from..from + n` of `[heads, S, x]` as `[kv_heads, groups × n, x]`, in f32. The heads that share a key head are
/// adjacent.
fn grouped_rows(t: &Tensor<3>, from: usize, n: usize, kv: usize) -> Tensor<3> {
    let [heads, _, x] = t.dims();
    to_f32(t.clone().narrow(1, from, n).reshape([kv, heads / kv * n, x]))
}

/// As [`Kernel::forward`](super::Kernel::forward).
pub fn forward(q: &Tensor<3>, k: &Tensor<3>, v: &Tensor<3>, causal: bool) -> (Tensor<3>, Tensor<3>) {
    let [heads, s, hd] = q.dims();
    let [kv, keys, _] = k.dims();
    let (k, v) = (to_f32(k.clone()), to_f32(v.clone()));
    let scale = 1.0 / (hd as f64).sqrt();
    let (mut outs, mut lses) = (vec![], vec![]);
    for from in (0..s).step_by(QUERY_CHUNK) {
        let n = QUERY_CHUNK.min(s - from);
        let m = if causal { from + n } else { keys };
        let mut scores = grouped_rows(q, from, n, kv).matmul(k.clone().narrow(1, 0, m).transpose()) * scale;
        if causal {
            let mask = causal_mask(from, n, heads / kv, m, q).expand([kv, heads / kv * n, m]);
            scores = scores.mask_fill(mask, f32::NEG_INFINITY);
        }
        let max = scores.clone().max_dim(2);
        let weights = (scores - max.clone()).exp();
        let sum = weights.clone().sum_dim(2);
        let out = weights.matmul(v.clone().narrow(1, 0, m)) / sum.clone();
        outs.push(out.reshape([heads, n, hd]));
        lses.push((max + sum.log()).reshape([heads, n, 1]));
    }
    (Tensor::cat(outs, 1), Tensor::cat(lses, 1))
}

/// As [`Kernel::backward`](super::Kernel::backward).
pub fn backward(
    dout: &Tensor<3>,
    [q, k, v]: &[Tensor<3>; 3],
    out: &Tensor<3>,
    lse: &Tensor<3>,
    causal: bool,
) -> [Tensor<3>; 3] {
    let [heads, s, hd] = q.dims();
    let [kv, keys, _] = k.dims();
    let (k, v) = (to_f32(k.clone()), to_f32(v.clone()));
    let scale = 1.0 / (hd as f64).sqrt();
    let delta = (to_f32(dout.clone()) * to_f32(out.clone())).sum_dim(2);
    let (mut dq, mut dk, mut dv) = (vec![], k.zeros_like(), v.zeros_like());
    for from in (0..s).step_by(QUERY_CHUNK) {
        let n = QUERY_CHUNK.min(s - from);
        let m = if causal { from + n } else { keys };
        let (q_slice, dout_slice) = (grouped_rows(q, from, n, kv), grouped_rows(dout, from, n, kv));
        let (keys, values) = (k.clone().narrow(1, 0, m), v.clone().narrow(1, 0, m));
        let scores =
            q_slice.clone().matmul(keys.clone().transpose()) * scale - grouped_rows(lse, from, n, kv);
        let mut weights = scores.exp();
        if causal {
            let mask = causal_mask(from, n, heads / kv, m, q).expand([kv, heads / kv * n, m]);
            weights = weights.mask_fill(mask, 0.0);
        }
        let dscores = weights.clone()
            * (dout_slice.clone().matmul(values.transpose()) - grouped_rows(&delta, from, n, kv))
            * scale;
        dq.push(dscores.clone().matmul(keys).reshape([heads, n, hd]));
        dk = super::add_to_rows(dk, &(0..m), dscores.transpose().matmul(q_slice));
        dv = super::add_to_rows(dv, &(0..m), weights.transpose().matmul(dout_slice));
    }
    [Tensor::cat(dq, 1), dk, dv]
}

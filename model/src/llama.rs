//! Llama as Hugging Face's `transformers` computes it, forward and backward. Knows nothing of ranks: a tensor's rows are
//! some positions of one sequence, and there is no batch dimension.
//!
//! A layer comes in two parts around attention, each an explicit pair of forward and backward: [`pre`] (norm, q k v, rope)
//! and [`post`] (projection, residual, MLP). What a forward saves is what its backward takes; the trainer keeps it or
//! computes it again.

use burn_tensor::{FloatDType, IndexingUpdateOp, Int, Tensor, activation};

use crate::config::Config;
use crate::rope::Rope;

/// Parameters of a layer, or their gradients: each matrix `[out, in]`, norms `[1, hidden_size]`.
/// In the order of [`Config::units`].
#[derive(Clone, Debug)]
pub struct Layer {
    pub input_norm: Tensor<2>,
    pub post_norm: Tensor<2>,
    pub q: Tensor<2>,
    pub k: Tensor<2>,
    pub v: Tensor<2>,
    pub o: Tensor<2>,
    pub gate: Tensor<2>,
    pub up: Tensor<2>,
    pub down: Tensor<2>,
}

impl Layer {
    pub fn from_flat(tensors: Vec<Tensor<2>>) -> Self {
        let [input_norm, post_norm, q, k, v, o, gate, up, down] =
            tensors.try_into().expect("a layer has nine parameters");
        Self { input_norm, post_norm, q, k, v, o, gate, up, down }
    }

    pub fn into_flat(self) -> Vec<Tensor<2>> {
        let Self { input_norm, post_norm, q, k, v, o, gate, up, down } = self;
        vec![input_norm, post_norm, q, k, v, o, gate, up, down]
    }
}

/// In f32, whatever is computed in.
pub fn wide<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.cast(FloatDType::F32)
}

fn like(x: Tensor<2>, other: &Tensor<2>) -> Tensor<2> {
    x.cast(other.dtype())
}

/// RMSNorm of the rows of `x` `[S, d]`; also the factor of each row, `[S, 1]`.
fn norm(x: &Tensor<2>, weight: &Tensor<2>, eps: f64) -> (Tensor<2>, Tensor<2>) {
    let wide = wide(x.clone());
    let factor = (wide.clone() * wide.clone()).mean_dim(1).add_scalar(eps).sqrt().recip();
    (scaled(x, &factor) * weight.clone(), factor)
}

/// The rows of `x`, each by its factor.
fn scaled(x: &Tensor<2>, factor: &Tensor<2>) -> Tensor<2> {
    like(wide(x.clone()) * factor.clone(), x)
}

/// Gradients of a norm's input and weight, from that of its result.
fn norm_backward(x: &Tensor<2>, factor: &Tensor<2>, weight: &Tensor<2>, dy: Tensor<2>) -> [Tensor<2>; 2] {
    let normed = wide(x.clone()) * factor.clone();
    let dy = wide(dy);
    let dweight = (dy.clone() * normed.clone()).sum_dim(0);
    let dnormed = dy * wide(weight.clone());
    let along = (dnormed.clone() * normed.clone()).mean_dim(1);
    let dx = (dnormed - normed * along) * factor.clone();
    [like(dx, x), dweight]
}

/// `x` `[n, in]` by a matrix `[out, in]`.
fn linear(x: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    x.clone().matmul(weight.clone().transpose())
}

/// Gradient of a matrix, from that of its result.
fn dweight(dy: &Tensor<2>, x: &Tensor<2>) -> Tensor<2> {
    dy.clone().transpose().matmul(x.clone())
}

/// `[S, heads × head_dim]` to `[heads, S, head_dim]`.
fn split(x: Tensor<2>, heads: usize) -> Tensor<3> {
    let [s, width] = x.dims();
    x.reshape([s, heads, width / heads]).swap_dims(0, 1)
}

/// `[heads, S, head_dim]` to `[S, heads × head_dim]`.
fn join(x: Tensor<3>) -> Tensor<2> {
    let [heads, s, hd] = x.dims();
    x.swap_dims(0, 1).reshape([s, heads * hd])
}

/// What [`pre`] computes on the way.
#[derive(Clone)]
pub struct Pre {
    normed: Tensor<2>,
    factor: Tensor<2>,
}

/// A layer's input `x` `[S, d]` to q `[heads, S, head_dim]`, k and v `[kv_heads, S, head_dim]`.
pub fn pre(config: &Config, layer: &Layer, x: &Tensor<2>, rope: &Rope) -> ([Tensor<3>; 3], Pre) {
    let (normed, factor) = norm(x, &layer.input_norm, config.rms_norm_eps);
    let q = rope.turn(split(linear(&normed, &layer.q), config.num_attention_heads));
    let k = rope.turn(split(linear(&normed, &layer.k), config.kv_heads()));
    let v = split(linear(&normed, &layer.v), config.kv_heads());
    ([q, k, v], Pre { normed, factor })
}

/// Gradients of the norm, q, k, v and of the layer's input, from those of q, k and v.
pub fn pre_backward(
    layer: &Layer,
    x: &Tensor<2>,
    saved: Pre,
    [dq, dk, dv]: [Tensor<3>; 3],
    rope: &Rope,
) -> ([Tensor<2>; 4], Tensor<2>) {
    let [dq, dk, dv] = [dq, dk, dv].map(|d| d.cast(x.dtype()));
    let [dq, dk, dv] = [rope.turn_back(dq), rope.turn_back(dk), dv].map(join);
    let matrices = [&dq, &dk, &dv].map(|d| dweight(d, &saved.normed));
    let dnormed = dq.matmul(layer.q.clone()) + dk.matmul(layer.k.clone()) + dv.matmul(layer.v.clone());
    let [dx, dnorm] = norm_backward(x, &saved.factor, &layer.input_norm, dnormed);
    let [q, k, v] = matrices;
    ([dnorm, q, k, v], dx)
}

/// What [`post`] computes on the way to the MLP's last matrix.
#[derive(Clone)]
pub struct Post {
    middle: Tensor<2>,
    normed: Tensor<2>,
    factor: Tensor<2>,
    gate: Tensor<2>,
    up: Tensor<2>,
}

/// The layer's input `x` `[S, d]` and its attention `[heads, S, head_dim]` up to the MLP's last matrix.
pub fn post_saved(config: &Config, layer: &Layer, x: &Tensor<2>, attention: &Tensor<3>) -> Post {
    let middle = x.clone() + linear(&join(attention.clone()), &layer.o);
    let (normed, factor) = norm(&middle, &layer.post_norm, config.rms_norm_eps);
    let (gate, up) = (linear(&normed, &layer.gate), linear(&normed, &layer.up));
    Post { middle, normed, factor, gate, up }
}

/// The layer's output `[S, d]`.
pub fn post(layer: &Layer, saved: &Post) -> Tensor<2> {
    let inner = activation::silu(saved.gate.clone()) * saved.up.clone();
    saved.middle.clone() + linear(&inner, &layer.down)
}

/// Gradients of o, the norm, gate, up and down, of the layer's input and of its attention, from that of its output.
pub fn post_backward(
    config: &Config,
    layer: &Layer,
    attention: &Tensor<3>,
    saved: Post,
    dy: Tensor<2>,
) -> ([Tensor<2>; 5], Tensor<2>, Tensor<3>) {
    let Post { middle, normed, factor, gate, up } = saved;
    // the widest tensors there are: each is given away where it is needed last, so that the next takes its place
    let sigmoid = activation::sigmoid(gate.clone());
    let silu = gate * sigmoid.clone();
    let ddown = dweight(&dy, &(silu.clone() * up.clone()));
    let dinner = dy.clone().matmul(layer.down.clone());
    let dup = dinner.clone() * silu.clone();
    let (dup_weight, dnormed) = (dweight(&dup, &normed), dup.matmul(layer.up.clone()));
    // (g σ(g))' = σ(g) + g σ(g) (1 − σ(g))
    let slope = silu * (sigmoid.clone().neg() + 1.0) + sigmoid;
    let dgate = dinner * up * slope;
    let dgate_weight = dweight(&dgate, &normed);
    let dnormed = dnormed + dgate.matmul(layer.gate.clone());
    let [dmiddle, dnorm] = norm_backward(&middle, &factor, &layer.post_norm, dnormed);
    let dx = dy + dmiddle;
    let do_weight = dweight(&dx, &join(attention.clone()));
    let dattention = split(dx.clone().matmul(layer.o.clone()), config.num_attention_heads);
    ([dnorm, do_weight, dgate_weight, dup_weight, ddown], dx, dattention)
}

/// Rows `[n, d]` of the last layer's output to logits `[n, vocab]`, in f32.
pub fn logits(config: &Config, norm_weight: &Tensor<2>, head: &Tensor<2>, x: &Tensor<2>) -> Tensor<2> {
    wide(linear(&norm(x, norm_weight, config.rms_norm_eps).0, head))
}

/// Of logits `[n, vocab]`: exponentials over the largest, their sum `[n, 1]`, and the log-sum-exp `[n, 1]`.
fn softmax(logits: &Tensor<2>) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let most = logits.clone().max_dim(1);
    let exponentials = (logits.clone() - most.clone()).exp();
    let sum = exponentials.clone().sum_dim(1);
    let lse = sum.clone().log() + most;
    (exponentials, sum, lse)
}

/// The loss `[n, 1]` of predicting `wanted` `[n, 1]` from logits `[n, vocab]`.
pub fn cross_entropy(logits: Tensor<2>, wanted: Tensor<2, Int>) -> Tensor<2> {
    softmax(&logits).2 - logits.gather(1, wanted)
}

/// What [`loss`] gives.
pub struct Loss {
    /// The loss of each row, `[n, 1]`; 0 where there is none.
    pub losses: Tensor<2>,
    /// Gradients of `scale` × their sum.
    pub dx: Tensor<2>,
    pub dnorm: Tensor<2>,
    pub dhead: Tensor<2>,
}

/// Cross-entropy of rows `[n, d]` of the last layer's output. `wanted` `[n, 1]` are the ids to predict, `counts` `[n, 1]`
/// are 1 where there is a loss and 0 elsewhere.
pub fn loss(
    config: &Config,
    norm_weight: &Tensor<2>,
    head: &Tensor<2>,
    x: &Tensor<2>,
    wanted: Tensor<2, Int>,
    counts: Tensor<2>,
    scale: f64,
) -> Loss {
    let (normed, factor) = norm(x, norm_weight, config.rms_norm_eps);
    let logits = wide(linear(&normed, head));
    let (exponentials, sum, lse) = softmax(&logits);
    let losses = (lse - logits.gather(1, wanted.clone())) * counts.clone();
    let weight = counts * scale;
    let dlogits =
        (exponentials * (weight.clone() / sum)).scatter(1, wanted, weight.neg(), IndexingUpdateOp::Add);
    let dlogits = like(dlogits, x);
    let dhead = dweight(&dlogits, &normed);
    let [dx, dnorm] = norm_backward(x, &factor, norm_weight, dlogits.matmul(head.clone()));
    Loss { losses, dx, dnorm, dhead }
}

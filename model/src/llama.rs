//! The forward and backward passes of Llama, with the results of Hugging Face's `transformers`. This module knows nothing of
//! ranks. The rows of a tensor are positions of one sequence; there is no batch dimension.
//!
//! A layer has two parts around attention, each an explicit forward/backward pair: [`pre_attention`] (norm, q k v, RoPE) and
//! [`post_attention`] (projection, residual, MLP). Each forward returns what its backward takes; the trainer keeps or
//! recomputes it.

use burn_tensor::{FloatDType, IndexingUpdateOp, Int, Tensor, activation};

use crate::config::Config;
use crate::rope::Rope;

/// The parameters of a layer, or their gradients: matrices `[out, in]`, norms `[1, hidden_size]`, in the order of
/// [`Config::units`].
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
    pub fn from_parameters(tensors: Vec<Tensor<2>>) -> Self {
        let [input_norm, post_norm, q, k, v, o, gate, up, down] =
            tensors.try_into().expect("a layer has nine parameters");
        Self { input_norm, post_norm, q, k, v, o, gate, up, down }
    }

    pub fn into_parameters(self) -> Vec<Tensor<2>> {
        let Self { input_norm, post_norm, q, k, v, o, gate, up, down } = self;
        vec![input_norm, post_norm, q, k, v, o, gate, up, down]
    }
}

pub fn to_f32<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.cast(FloatDType::F32)
}

fn cast_like(x: Tensor<2>, other: &Tensor<2>) -> Tensor<2> {
    x.cast(other.dtype())
}

/// RMSNorm of the rows of `x` `[S, d]`, and the scale of each row, `[S, 1]`.
fn rms_norm(x: &Tensor<2>, weight: &Tensor<2>, eps: f64) -> (Tensor<2>, Tensor<2>) {
    let x32 = to_f32(x.clone());
    let factor = (x32.clone() * x32.clone()).mean_dim(1).add_scalar(eps).sqrt().recip();
    (scale_rows(x, &factor) * weight.clone(), factor)
}

/// Multiplies each row of `x` by its factor.
fn scale_rows(x: &Tensor<2>, factor: &Tensor<2>) -> Tensor<2> {
    cast_like(to_f32(x.clone()) * factor.clone(), x)
}

/// The gradients of a norm's input and weight, from the gradient of its output.
fn rms_norm_backward(x: &Tensor<2>, factor: &Tensor<2>, weight: &Tensor<2>, dy: Tensor<2>) -> [Tensor<2>; 2] {
    let normed = to_f32(x.clone()) * factor.clone();
    let dy = to_f32(dy);
    let dweight = (dy.clone() * normed.clone()).sum_dim(0);
    let dnormed = dy * to_f32(weight.clone());
    let along = (dnormed.clone() * normed.clone()).mean_dim(1);
    let dx = (dnormed - normed * along) * factor.clone();
    [cast_like(dx, x), dweight]
}

/// Multiplies `x` `[n, in]` by the transpose of a matrix `[out, in]`.
fn linear(x: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    x.clone().matmul(weight.clone().transpose())
}

/// The gradient of a matrix, from the gradient of its output.
fn dweight(dy: &Tensor<2>, x: &Tensor<2>) -> Tensor<2> {
    dy.clone().transpose().matmul(x.clone())
}

/// `[S, heads × head_dim]` to `[heads, S, head_dim]`.
fn split_heads(x: Tensor<2>, heads: usize) -> Tensor<3> {
    let [s, width] = x.dims();
    x.reshape([s, heads, width / heads]).swap_dims(0, 1)
}

/// `[heads, S, head_dim]` to `[S, heads × head_dim]`.
fn merge_heads(x: Tensor<3>) -> Tensor<2> {
    let [heads, s, hd] = x.dims();
    x.swap_dims(0, 1).reshape([s, heads * hd])
}

/// The intermediates of [`pre_attention`].
#[derive(Clone)]
pub struct PreAttention {
    normed: Tensor<2>,
    factor: Tensor<2>,
}

/// From a layer's input `x` `[S, d]`: q `[heads, S, head_dim]`, and k and v `[kv_heads, S, head_dim]`.
pub fn pre_attention(
    config: &Config,
    layer: &Layer,
    x: &Tensor<2>,
    rope: &Rope,
) -> ([Tensor<3>; 3], PreAttention) {
    let (normed, factor) = rms_norm(x, &layer.input_norm, config.rms_norm_eps);
    let q = rope.rotate(split_heads(linear(&normed, &layer.q), config.num_attention_heads));
    let k = rope.rotate(split_heads(linear(&normed, &layer.k), config.kv_heads()));
    let v = split_heads(linear(&normed, &layer.v), config.kv_heads());
    ([q, k, v], PreAttention { normed, factor })
}

/// The gradients of the norm's weight, of the q, k and v matrices and of the layer's input, from those of q, k and v.
pub fn pre_attention_backward(
    layer: &Layer,
    x: &Tensor<2>,
    saved: PreAttention,
    [dq, dk, dv]: [Tensor<3>; 3],
    rope: &Rope,
) -> ([Tensor<2>; 4], Tensor<2>) {
    let [dq, dk, dv] = [dq, dk, dv].map(|d| d.cast(x.dtype()));
    let [dq, dk, dv] = [rope.rotate_backward(dq), rope.rotate_backward(dk), dv].map(merge_heads);
    let matrices = [&dq, &dk, &dv].map(|d| dweight(d, &saved.normed));
    let dnormed = dq.matmul(layer.q.clone()) + dk.matmul(layer.k.clone()) + dv.matmul(layer.v.clone());
    let [dx, dnorm] = rms_norm_backward(x, &saved.factor, &layer.input_norm, dnormed);
    let [q, k, v] = matrices;
    ([dnorm, q, k, v], dx)
}

/// The intermediates of [`post_attention`].
#[derive(Clone)]
pub struct PostAttention {
    residual: Tensor<2>,
    normed: Tensor<2>,
    factor: Tensor<2>,
    gate: Tensor<2>,
    up: Tensor<2>,
}

/// Everything between attention and the MLP's last matrix, from the layer's input `x` `[S, d]` and its attention
/// `[heads, S, head_dim]`. [`layer_output`] computes the rest.
pub fn post_attention(config: &Config, layer: &Layer, x: &Tensor<2>, attention: &Tensor<3>) -> PostAttention {
    let residual = x.clone() + linear(&merge_heads(attention.clone()), &layer.o);
    let (normed, factor) = rms_norm(&residual, &layer.post_norm, config.rms_norm_eps);
    let (gate, up) = (linear(&normed, &layer.gate), linear(&normed, &layer.up));
    PostAttention { residual, normed, factor, gate, up }
}

/// The layer's output `[S, d]`: the MLP's last matrix and the residual.
pub fn layer_output(layer: &Layer, saved: &PostAttention) -> Tensor<2> {
    let inner = activation::silu(saved.gate.clone()) * saved.up.clone();
    saved.residual.clone() + linear(&inner, &layer.down)
}

/// The gradients of the norm, o, gate, up and down, of the layer's input and of its attention, from the gradient of its
/// output.
pub fn post_attention_backward(
    config: &Config,
    layer: &Layer,
    attention: &Tensor<3>,
    saved: PostAttention,
    dy: Tensor<2>,
) -> ([Tensor<2>; 5], Tensor<2>, Tensor<3>) {
    let PostAttention { residual, normed, factor, gate, up } = saved;
    // These are the largest tensors. Each is moved into its last use, so that its memory is free for the next.
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
    let [dresidual, dnorm] = rms_norm_backward(&residual, &factor, &layer.post_norm, dnormed);
    let dx = dy + dresidual;
    let do_weight = dweight(&dx, &merge_heads(attention.clone()));
    let dattention = split_heads(dx.clone().matmul(layer.o.clone()), config.num_attention_heads);
    ([dnorm, do_weight, dgate_weight, dup_weight, ddown], dx, dattention)
}

/// Logits `[n, vocab]` in f32, from rows `[n, d]` of the last layer's output.
pub fn logits(config: &Config, norm_weight: &Tensor<2>, head: &Tensor<2>, x: &Tensor<2>) -> Tensor<2> {
    to_f32(linear(&rms_norm(x, norm_weight, config.rms_norm_eps).0, head))
}

/// The exponentials of logits `[n, vocab]` less their row's maximum, their sum `[n, 1]`, and the log-sum-exp `[n, 1]`.
fn unnormalized_softmax(logits: &Tensor<2>) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let max = logits.clone().max_dim(1);
    let exponentials = (logits.clone() - max.clone()).exp();
    let sum = exponentials.clone().sum_dim(1);
    let lse = sum.clone().log() + max;
    (exponentials, sum, lse)
}

/// The loss `[n, 1]` of predicting `targets` `[n, 1]` from logits `[n, vocab]`.
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<2, Int>) -> Tensor<2> {
    unnormalized_softmax(&logits).2 - logits.gather(1, targets)
}

/// The result of [`loss`].
pub struct Loss {
    /// The loss of each row, `[n, 1]`; 0 where the mask is 0.
    pub losses: Tensor<2>,
    /// Gradients of `scale` × the sum of the losses.
    pub dx: Tensor<2>,
    pub dnorm: Tensor<2>,
    pub dhead: Tensor<2>,
}

/// Cross-entropy of rows `[n, d]` of the last layer's output, with its gradients. `targets` `[n, 1]` are the ids to predict;
/// `mask` `[n, 1]` is 1 where there is a loss and 0 elsewhere.
pub fn loss(
    config: &Config,
    norm_weight: &Tensor<2>,
    head: &Tensor<2>,
    x: &Tensor<2>,
    targets: Tensor<2, Int>,
    mask: Tensor<2>,
    scale: f64,
) -> Loss {
    let (normed, factor) = rms_norm(x, norm_weight, config.rms_norm_eps);
    let logits = to_f32(linear(&normed, head));
    let (exponentials, sum, lse) = unnormalized_softmax(&logits);
    let losses = (lse - logits.gather(1, targets.clone())) * mask.clone();
    let weight = mask * scale;
    let dlogits =
        (exponentials * (weight.clone() / sum)).scatter(1, targets, weight.neg(), IndexingUpdateOp::Add);
    let dlogits = cast_like(dlogits, x);
    let dhead = dweight(&dlogits, &normed);
    let [dx, dnorm] = rms_norm_backward(x, &factor, norm_weight, dlogits.matmul(head.clone()));
    Loss { losses, dx, dnorm, dhead }
}

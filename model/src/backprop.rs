//! Segmented backprop: forward keeps each layer's input, attention and its log-sum-exp; backward goes from the last layer
//! to the first and runs pre and post again with autodiff. No graph is larger than a part of a layer, and the logits are
//! never whole.

use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData, activation};

use crate::attention;
use crate::llama::{Config, Layer, Rope, Weights, logits, post, pre};

/// A position without loss.
pub const NO_TARGET: i32 = -100;

/// Rows of logits computed at a time.
const LOSS_SLICE: usize = 512;

fn ids(values: &[i32], device: &Device) -> Tensor<1, Int> {
    Tensor::from_data(
        TensorData::new(values.iter().map(|v| *v as i64).collect::<Vec<_>>(), [values.len()]),
        device,
    )
}

/// A tensor as the leaf of a new graph.
fn leaf<const D: usize>(tensor: &Tensor<D>) -> Tensor<D> {
    tensor.clone().autodiff().require_grad()
}

fn leaves(layer: &Layer) -> Layer {
    Layer {
        input_norm: leaf(&layer.input_norm),
        q: leaf(&layer.q),
        k: leaf(&layer.k),
        v: leaf(&layer.v),
        o: leaf(&layer.o),
        post_norm: leaf(&layer.post_norm),
        gate: leaf(&layer.gate),
        up: leaf(&layer.up),
        down: leaf(&layer.down),
    }
}

/// The last layer's output `[S, d]` for a sequence.
pub fn forward(config: &Config, weights: &Weights, input: &[i32], rope: &Rope) -> Tensor<2> {
    let x = weights.embed.clone().select(0, ids(input, &weights.embed.device()));
    weights.layers.iter().fold(x, |x, layer| {
        let [q, k, v] = pre(config, layer, x.clone(), rope);
        post(config, layer, x, attention::forward(&q, &k, &v).0)
    })
}

/// The summed loss of a sequence, and the gradients of `scale` × that sum.
///
/// `targets` are the ids to predict, one a position; [`NO_TARGET`] where there is no loss.
pub fn backprop(
    config: &Config,
    weights: &Weights,
    input: &[i32],
    targets: &[i32],
    rope: &Rope,
    scale: f64,
) -> (f64, Weights) {
    let device = weights.embed.device();
    let input = ids(input, &device);
    let mut x = weights.embed.clone().select(0, input.clone());
    let mut saved = vec![];
    for layer in &weights.layers {
        let [q, k, v] = pre(config, layer, x.clone(), rope);
        let (out, lse) = attention::forward(&q, &k, &v);
        let next = post(config, layer, x.clone(), out.clone());
        saved.push((x, out, lse));
        x = next;
    }

    let Head { loss, mut upstream, norm, head } = head(config, weights, x, targets, scale);
    let mut layers = vec![];
    for (layer, (x, out, lse)) in weights.layers.iter().zip(saved).rev() {
        let (dx, gradients) = layer_backward(config, layer, x, out, lse, rope, upstream);
        upstream = dx;
        layers.push(gradients);
    }
    layers.reverse();
    let embed = weights.embed.zeros_like().select_assign(0, input, upstream, IndexingUpdateOp::Add);
    let gradients = match weights.head {
        Some(_) => Weights { embed, layers, norm, head: Some(head) },
        None => Weights { embed: embed + head, layers, norm, head: None },
    };
    (loss, gradients)
}

struct Head {
    loss: f64,
    /// Gradient of the last layer's output.
    upstream: Tensor<2>,
    norm: Tensor<2>,
    head: Tensor<2>,
}

/// Loss and gradients of the norm and head at the end, a slice of positions at a time.
fn head(config: &Config, weights: &Weights, x: Tensor<2>, targets: &[i32], scale: f64) -> Head {
    let device = x.device();
    let head_weight = weights.head.as_ref().unwrap_or(&weights.embed);
    let (mut loss, mut upstream) = (0.0, vec![]);
    let (mut dnorm, mut dhead) = (weights.norm.zeros_like(), head_weight.zeros_like());
    for (i, targets) in targets.chunks(LOSS_SLICE).enumerate() {
        let n = targets.len();
        let rows = leaf(&x.clone().narrow(0, i * LOSS_SLICE, n));
        let (norm, head) = (leaf(&weights.norm), leaf(head_weight));
        let counts: Vec<f32> = targets.iter().map(|t| if *t == NO_TARGET { 0.0 } else { 1.0 }).collect();
        let counts = Tensor::<2>::from_data(TensorData::new(counts, [n, 1]), &device).autodiff();
        let wanted: Vec<i32> = targets.iter().map(|t| (*t).max(0)).collect();
        let wanted = ids(&wanted, &device).reshape([n, 1]).autodiff();
        let chosen = activation::log_softmax(logits(config, &norm, &head, rows.clone()), 1).gather(1, wanted);
        let sum = (chosen * counts).sum().neg();
        loss += sum.clone().inner().into_scalar::<f32>() as f64;
        let mut gradients = (sum * scale).backward();
        let mut gradient =
            |t: &Tensor<2>| t.grad_remove(&mut gradients).unwrap_or_else(|| t.clone().inner().zeros_like());
        upstream.push(gradient(&rows));
        dnorm = dnorm + gradient(&norm);
        dhead = dhead + gradient(&head);
    }
    Head { loss, upstream: Tensor::cat(upstream, 0), norm: dnorm, head: dhead }
}

/// Gradients of a layer's input and parameters from that of its output.
fn layer_backward(
    config: &Config,
    layer: &Layer,
    x: Tensor<2>,
    out: Tensor<3>,
    lse: Tensor<3>,
    rope: &Rope,
    upstream: Tensor<2>,
) -> (Tensor<2>, Layer) {
    let tracked = leaves(layer);
    let (x_post, out_leaf) = (leaf(&x), leaf(&out));
    let y = post(config, &tracked, x_post.clone(), out_leaf.clone());
    let mut after = (y * upstream.autodiff()).sum().backward();
    let dout = out_leaf.grad_remove(&mut after).unwrap_or_else(|| out.zeros_like());
    let dx_post = x_post.grad_remove(&mut after).unwrap_or_else(|| x.zeros_like());

    let x_pre = leaf(&x);
    let qkv = pre(config, &tracked, x_pre.clone(), rope);
    let plain = qkv.clone().map(Tensor::inner);
    let dqkv = attention::backward(&dout, &plain, &out, &lse);
    let sum = qkv.into_iter().zip(dqkv).map(|(t, d)| (t * d.autodiff()).sum()).reduce(|a, b| a + b);
    let mut before = sum.expect("q, k and v").backward();
    let dx_pre = x_pre.grad_remove(&mut before).unwrap_or_else(|| x.zeros_like());

    let mut gradient = |t: &Tensor<2>| {
        let found = t.grad_remove(&mut after).or_else(|| t.grad_remove(&mut before));
        found.unwrap_or_else(|| t.clone().inner().zeros_like())
    };
    let gradients = Layer {
        input_norm: gradient(&tracked.input_norm),
        q: gradient(&tracked.q),
        k: gradient(&tracked.k),
        v: gradient(&tracked.v),
        o: gradient(&tracked.o),
        post_norm: gradient(&tracked.post_norm),
        gate: gradient(&tracked.gate),
        up: gradient(&tracked.up),
        down: gradient(&tracked.down),
    };
    (dx_post + dx_pre, gradients)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn config(tied: bool) -> Config {
        serde_json::from_value(serde_json::json!({
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
            "num_key_value_heads": 2, "vocab_size": 50, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        }))
        .unwrap()
    }

    /// The same model as one graph, with attention written as softmax.
    fn whole_graph(
        config: &Config,
        weights: &Weights,
        input: &[i32],
        targets: &[i32],
        rope: &Rope,
    ) -> (f64, Vec<Tensor<2>>) {
        let flat: Vec<Tensor<2>> = weights.flat().iter().map(leaf).collect();
        let w = Weights::from_flat(config, flat.clone());
        let device = weights.embed.device();
        let s = input.len();
        let mut x = w.embed.clone().select(0, ids(input, &device).autodiff());
        for layer in &w.layers {
            let [q, k, v] = pre(config, layer, x.clone(), rope);
            let groups = config.num_attention_heads / config.kv_heads();
            let repeat = |t: Tensor<3>| {
                let [h, s, hd] = t.dims();
                t.reshape([h, 1, s, hd]).expand([h, groups, s, hd]).reshape([h * groups, s, hd])
            };
            let later: Vec<f32> = (0..s * s).map(|i| if i % s > i / s { -1e30 } else { 0.0 }).collect();
            let mask = Tensor::<3>::from_data(TensorData::new(later, [1, s, s]), &device).autodiff();
            let scores = q.matmul(repeat(k).transpose()) * (1.0 / (config.head_dim() as f64).sqrt()) + mask;
            x = post(config, layer, x, activation::softmax(scores, 2).matmul(repeat(v)));
        }
        let head = w.head.as_ref().unwrap_or(&w.embed);
        let all = activation::log_softmax(logits(config, &w.norm, head, x), 1);
        let wanted: Vec<i32> = targets.iter().map(|t| (*t).max(0)).collect();
        let counts: Vec<f32> = targets.iter().map(|t| if *t == NO_TARGET { 0.0 } else { 1.0 }).collect();
        let counts = Tensor::<2>::from_data(TensorData::new(counts, [s, 1]), &device).autodiff();
        let loss = (all.gather(1, ids(&wanted, &device).reshape([s, 1]).autodiff()) * counts).sum().neg();
        let value = loss.clone().inner().into_scalar::<f32>() as f64;
        let mut gradients = loss.backward();
        (value, flat.iter().map(|t| t.grad_remove(&mut gradients).unwrap()).collect())
    }

    fn length(t: Tensor<2>) -> f64 {
        (t.clone() * t).sum().into_scalar::<f32>().sqrt() as f64
    }

    #[test]
    fn segmented_gradients_are_those_of_the_whole_graph() {
        let device = Device::flex();
        for (tied, s) in [(false, 7), (true, 300), (false, 523)] {
            let config = config(tied);
            let weights = Weights::fresh(&config, 3, &device);
            // larger than fresh weights, so that attention has something to say
            let weights = Weights::from_flat(&config, weights.flat().into_iter().map(|t| t * 4.0).collect());
            let rope = Rope::new(&config, s, &device).unwrap();
            let input: Vec<i32> = (0..s as i32).map(|i| (i * 7 + i * i) % 50).collect();
            let targets: Vec<i32> =
                (0..s as i32).map(|i| if i % 5 == 0 { NO_TARGET } else { (i * 3) % 50 }).collect();
            let (want_loss, want) = whole_graph(&config, &weights, &input, &targets, &rope);
            let (loss, gradients) = backprop(&config, &weights, &input, &targets, &rope, 1.0);
            assert!((loss - want_loss).abs() < 1e-5 * want_loss, "{loss} {want_loss}");
            for ((name, _), (got, want)) in
                config.parameters().iter().zip(gradients.flat().into_iter().zip(want))
            {
                let error = length(got - want.clone()) / length(want);
                assert!(error < 1e-5, "{name} at {s}: {error:e}");
            }
        }
    }

    #[test]
    fn a_position_without_target_has_no_loss() {
        let device = Device::flex();
        let config = config(false);
        let weights = Weights::fresh(&config, 3, &device);
        let rope = Rope::new(&config, 4, &device).unwrap();
        let loss = |targets: &[i32]| backprop(&config, &weights, &[1, 2, 3, 4], targets, &rope, 1.0).0;
        let each: f64 = (0..4)
            .map(|i| loss(&std::array::from_fn::<i32, 4, _>(|p| if p == i { 9 } else { NO_TARGET })))
            .sum();
        assert!((each - loss(&[9; 4])).abs() < 1e-4);
        assert_eq!(loss(&[NO_TARGET; 4]), 0.0);
    }
}

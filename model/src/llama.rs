//! Llama as Hugging Face's `transformers` computes it. A sequence at a time: tensors have no batch dimension.
//!
//! A layer comes in two parts around attention, so that the trainer can run each by itself: [`pre`] (norm, q k v, rope)
//! and [`post`] (projection, residual, MLP).

use burn::tensor::{Device, Tensor, TensorData, activation};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// `config.json`, as far as the computation depends on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    #[serde(default)]
    pub head_dim: Option<usize>,
    pub vocab_size: usize,
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    #[serde(default)]
    pub rope_theta: Option<f64>,
    /// How transformers 4 writes RoPE's scaling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<serde_json::Value>,
    /// How transformers 5 writes theta and scaling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<serde_json::Value>,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    #[serde(default)]
    pub max_position_embeddings: Option<usize>,
    #[serde(default)]
    pub bos_token_id: Option<serde_json::Value>,
    #[serde(default)]
    pub eos_token_id: Option<serde_json::Value>,
}

fn default_eps() -> f64 {
    1e-6
}

impl Config {
    pub fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    /// The base of RoPE.
    ///
    /// # Errors
    /// The config asks for a scaling of RoPE, which isn't computed yet.
    pub fn theta(&self) -> Result<f64> {
        for (key, value) in [("rope_scaling", &self.rope_scaling), ("rope_parameters", &self.rope_parameters)]
        {
            let kind = value.as_ref().and_then(|v| v.get("rope_type").or_else(|| v.get("type")));
            if let Some(kind) = kind.and_then(|kind| kind.as_str()).filter(|kind| *kind != "default") {
                return Err(Error::Conf(format!(
                    "config.json: {key} of type `{kind}` is not computed by this version"
                )));
            }
        }
        let newer = self.rope_parameters.as_ref().and_then(|v| v.get("rope_theta")?.as_f64());
        Ok(self.rope_theta.or(newer).unwrap_or(10_000.0))
    }

    /// Whether the sizes go together.
    pub fn check(&self) -> Result<()> {
        let (heads, kv) = (self.num_attention_heads, self.kv_heads());
        let wrong =
            if [self.hidden_size, self.intermediate_size, self.num_hidden_layers, self.vocab_size, heads, kv]
                .contains(&0)
            {
                "no size may be 0".to_owned()
            } else if heads % kv != 0 {
                format!("{heads} heads can't be shared by {kv} key/value heads")
            } else if self.head_dim.is_none() && !self.hidden_size.is_multiple_of(heads) {
                format!("hidden_size {} is not divisible by {heads} heads", self.hidden_size)
            } else if !self.head_dim().is_multiple_of(2) {
                format!("a head of {} can't be rotated: it has to be even", self.head_dim())
            } else {
                return self.theta().map(drop);
            };
        Err(Error::Conf(wrong))
    }

    /// Names, as in Hugging Face's checkpoints, and shapes of all parameters, in the order of [`Weights::flat`].
    /// Norms are written `[hidden_size]` and computed with as `[1, hidden_size]`.
    pub fn parameters(&self) -> Vec<(String, [usize; 2])> {
        let (d, ff, hd) = (self.hidden_size, self.intermediate_size, self.head_dim());
        let (q, kv) = (self.num_attention_heads * hd, self.kv_heads() * hd);
        let mut list = vec![("model.embed_tokens.weight".to_owned(), [self.vocab_size, d])];
        for i in 0..self.num_hidden_layers {
            let mut layer = |name: &str, shape| list.push((format!("model.layers.{i}.{name}.weight"), shape));
            layer("input_layernorm", [1, d]);
            layer("self_attn.q_proj", [q, d]);
            layer("self_attn.k_proj", [kv, d]);
            layer("self_attn.v_proj", [kv, d]);
            layer("self_attn.o_proj", [d, q]);
            layer("post_attention_layernorm", [1, d]);
            layer("mlp.gate_proj", [ff, d]);
            layer("mlp.up_proj", [ff, d]);
            layer("mlp.down_proj", [d, ff]);
        }
        list.push(("model.norm.weight".to_owned(), [1, d]));
        if !self.tie_word_embeddings {
            list.push(("lm_head.weight".to_owned(), [self.vocab_size, d]));
        }
        list
    }
}

/// One layer's parameters, each `[out, in]`; norms `[1, hidden_size]`.
#[derive(Clone, Debug)]
pub struct Layer {
    pub input_norm: Tensor<2>,
    pub q: Tensor<2>,
    pub k: Tensor<2>,
    pub v: Tensor<2>,
    pub o: Tensor<2>,
    pub post_norm: Tensor<2>,
    pub gate: Tensor<2>,
    pub up: Tensor<2>,
    pub down: Tensor<2>,
}

/// All parameters, or all of their gradients.
#[derive(Clone, Debug)]
pub struct Weights {
    pub embed: Tensor<2>,
    pub layers: Vec<Layer>,
    pub norm: Tensor<2>,
    /// `None` where it is the embedding itself.
    pub head: Option<Tensor<2>>,
}

impl Weights {
    /// All tensors, in the order of [`Config::parameters`].
    pub fn flat(&self) -> Vec<Tensor<2>> {
        let mut list = vec![self.embed.clone()];
        for l in &self.layers {
            let own = [&l.input_norm, &l.q, &l.k, &l.v, &l.o, &l.post_norm, &l.gate, &l.up, &l.down];
            list.extend(own.into_iter().cloned());
        }
        list.push(self.norm.clone());
        list.extend(self.head.clone());
        list
    }

    /// The reverse of [`flat`](Self::flat): as many tensors as the config has parameters.
    pub fn from_flat(config: &Config, tensors: Vec<Tensor<2>>) -> Self {
        let mut tensors = tensors.into_iter();
        let mut next = || tensors.next().expect("as many tensors as parameters");
        let embed = next();
        let layers = (0..config.num_hidden_layers).map(|_| Layer {
            input_norm: next(),
            q: next(),
            k: next(),
            v: next(),
            o: next(),
            post_norm: next(),
            gate: next(),
            up: next(),
            down: next(),
        });
        let layers = layers.collect();
        let norm = next();
        let head = (!config.tie_word_embeddings).then(&mut next);
        Self { embed, layers, norm, head }
    }

    /// A fresh model: normal with deviation 0.02, norms 1, the same for the same seed on any machine and number of threads.
    pub fn fresh(config: &Config, seed: u64, device: &Device) -> Self {
        let tensors = config.parameters().into_iter().enumerate().map(|(i, (name, shape))| {
            let values = if name.contains("norm") {
                vec![1.0; shape[1]]
            } else {
                normal(seed, i as u64, shape[0] * shape[1])
            };
            Tensor::from_data(TensorData::new(values, shape), device)
        });
        Self::from_flat(config, tensors.collect())
    }
}

/// Normal numbers with deviation 0.02 from a counter (SplitMix64, Box–Muller).
fn normal(seed: u64, stream: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ stream.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let mut uniform = move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let one = |_| {
        let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
        (0.02 * radius * (std::f64::consts::TAU * uniform()).cos()) as f32
    };
    (0..count).map(one).collect()
}

/// Cosines and sines of RoPE, each `[1, S, head_dim]`.
#[derive(Clone, Debug)]
pub struct Rope {
    cos: Tensor<3>,
    sin: Tensor<3>,
}

impl Rope {
    /// For positions 0 to `length`. Angles are computed in f64.
    pub fn new(config: &Config, length: usize, device: &Device) -> Result<Self> {
        let (theta, hd) = (config.theta()?, config.head_dim());
        let angles = (0..length * hd).map(|i| {
            let (position, pair) = (i / hd, i % hd % (hd / 2));
            position as f64 * theta.powf(-2.0 * pair as f64 / hd as f64)
        });
        let angles: Vec<f64> = angles.collect();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|a| f(*a) as f32).collect();
            Tensor::<3>::from_data(TensorData::new(values, [1, length, hd]), device)
        };
        Ok(Self { cos: table(f64::cos), sin: table(f64::sin) })
    }

    /// Rotates halves, as Hugging Face's Llama does. `x` is `[heads, S, head_dim]`.
    fn turn(&self, x: Tensor<3>) -> Tensor<3> {
        let half = x.dims()[2] / 2;
        let turned =
            Tensor::cat(vec![x.clone().narrow(2, half, half).neg(), x.clone().narrow(2, 0, half)], 2);
        x * self.cos.clone() + turned * self.sin.clone()
    }
}

/// RMSNorm of the rows of `x` `[S, d]`.
pub fn norm(x: Tensor<2>, weight: &Tensor<2>, eps: f64) -> Tensor<2> {
    let mean = (x.clone() * x.clone()).mean_dim(1);
    x * (mean + eps).sqrt().recip() * weight.clone()
}

fn linear(x: Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    x.matmul(weight.clone().transpose())
}

/// `x` `[S, d]` to q `[heads, S, head_dim]`, k and v `[kv_heads, S, head_dim]`.
pub fn pre(config: &Config, layer: &Layer, x: Tensor<2>, rope: &Rope) -> [Tensor<3>; 3] {
    let s = x.dims()[0];
    let y = norm(x, &layer.input_norm, config.rms_norm_eps);
    let heads =
        |weight, count| linear(y.clone(), weight).reshape([s, count, config.head_dim()]).swap_dims(0, 1);
    let q = rope.turn(heads(&layer.q, config.num_attention_heads));
    let k = rope.turn(heads(&layer.k, config.kv_heads()));
    [q, k, heads(&layer.v, config.kv_heads())]
}

/// The layer's input `x` `[S, d]` and its attention `[heads, S, head_dim]` to its output `[S, d]`.
pub fn post(config: &Config, layer: &Layer, x: Tensor<2>, attention: Tensor<3>) -> Tensor<2> {
    let [heads, s, hd] = attention.dims();
    let h = x + linear(attention.swap_dims(0, 1).reshape([s, heads * hd]), &layer.o);
    let y = norm(h.clone(), &layer.post_norm, config.rms_norm_eps);
    let inner = activation::silu(linear(y.clone(), &layer.gate)) * linear(y, &layer.up);
    h + linear(inner, &layer.down)
}

/// Rows `[n, d]` of the last layer's output to logits `[n, vocab]`.
pub fn logits(config: &Config, norm_weight: &Tensor<2>, head: &Tensor<2>, x: Tensor<2>) -> Tensor<2> {
    linear(norm(x, norm_weight, config.rms_norm_eps), head)
}

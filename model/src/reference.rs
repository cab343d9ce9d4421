//! The reference for tests: the same model as one autodiff graph in f64, with attention as a masked softmax.

use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation};

use crate::config::Config;
use crate::dataset::NO_TARGET;
use crate::rope::frequencies;
use crate::shards::Unit;

type T2 = Tensor<2>;
type T3 = Tensor<3>;

/// A model and a sequence.
#[derive(Clone, Debug)]
pub struct Case {
    pub config: Config,
    /// The numbers of each unit.
    pub units: Vec<Vec<f32>>,
    pub ids: Vec<i32>,
    pub targets: Vec<i32>,
    /// The starts of documents, if attention stays within them.
    pub starts: Option<Vec<usize>>,
}

/// The summed loss, and its gradients by parameter, in the order of [`Config::parameters`].
pub struct Reference {
    pub loss: f64,
    pub gradients: Vec<(String, Vec<f64>)>,
}

impl Case {
    /// Random weights, enlarged so that attention matters. `salt` determines ids, targets and documents.
    pub fn new(config: Config, length: usize, masked: bool, salt: u64) -> Self {
        let units = Unit::all(&config);
        let numbers = |i: usize| {
            let fresh = crate::checkpoint::initial_weights(&units, i, 0..units[i].length, salt);
            let norms = units[i].norms;
            let wiggled = |(j, w): (usize, f32)| {
                if j < norms { 1.0 + 0.3 * ((j * 7 + i) as f32).sin() } else { w * 6.0 }
            };
            fresh.into_iter().enumerate().map(wiggled).collect()
        };
        let vocab = config.vocab_size as u64;
        let draw = |i: u64| (i * i * 31 + i * 7 + salt * 13 + i / 3) % vocab;
        let targets = (0..length as u64)
            .map(|i| if (i + salt).is_multiple_of(5) { NO_TARGET } else { draw(i + 1) as i32 })
            .collect();
        let starts = masked.then(|| {
            let (mut starts, mut at) = (vec![], 0);
            for i in 0.. {
                if at >= length {
                    break;
                }
                starts.push(at);
                at += 1 + (draw(i + 3) as usize * (1 + i as usize % 4)) % (length / 2 + 1);
            }
            starts
        });
        Self {
            units: (0..units.len()).map(numbers).collect(),
            ids: (0..length as u64).map(|i| draw(i) as i32).collect(),
            targets,
            starts,
            config,
        }
    }

    fn document(&self, position: usize) -> usize {
        let starts = self.starts.as_deref().unwrap_or(&[0]);
        starts[starts.partition_point(|start| *start <= position) - 1]
    }

    pub fn whole_graph(&self) -> Reference {
        let device = Device::flex();
        let config = &self.config;
        let number = |data: Vec<f64>, shape: [usize; 2]| -> T2 {
            Tensor::from_data(TensorData::new(data, shape), (&device, DType::F64)).autodiff()
        };
        let mut named: Vec<(String, T2)> = vec![];
        for (unit, numbers) in Unit::all(config).iter().zip(&self.units) {
            let mut from = 0;
            for (name, shape) in &unit.parameters {
                let stop = from + shape[0] * shape[1];
                let values = numbers[from..stop].iter().map(|n| f64::from(*n)).collect();
                named.push((name.clone(), number(values, *shape).require_grad()));
                from = stop;
            }
        }
        let get = |name: &str| named.iter().find(|(n, _)| n == name).expect("a parameter").1.clone();

        let s = self.ids.len();
        let ids =
            |values: Vec<i64>| Tensor::<1, Int>::from_data(TensorData::new(values, [s]), &device).autodiff();
        let norm = |x: T2, w: T2| {
            let mean = (x.clone() * x.clone()).mean_dim(1);
            x * (mean + config.rms_norm_eps).sqrt().recip() * w
        };
        let positions: Vec<usize> = (0..s).map(|i| i - self.document(i)).collect();
        let longest = positions.iter().max().expect("a position") + 1;
        let (frequencies, factor) =
            frequencies(config, if self.starts.is_some() { longest } else { s }).unwrap();
        let table = |f: fn(f64) -> f64| -> T3 {
            let angles: Vec<f64> = positions
                .iter()
                .flat_map(|p| frequencies.iter().chain(&frequencies).map(|f| f64::from(*p as f32 * f)))
                .collect();
            // The model's tables are f32.
            let values: Vec<f64> = angles.iter().map(|a| f64::from((f(*a) * factor) as f32)).collect();
            let hd = 2 * frequencies.len();
            Tensor::from_data(TensorData::new(values, [1, s, hd]), (&device, DType::F64)).autodiff()
        };
        let (cos, sin) = (table(f64::cos), table(f64::sin));
        let rotate = |x: T3| {
            let half = x.dims()[2] / 2;
            let rotated_half =
                Tensor::cat(vec![x.clone().narrow(2, half, half).neg(), x.clone().narrow(2, 0, half)], 2);
            x * cos.clone() + rotated_half * sin.clone()
        };
        let mask_values: Vec<f64> = (0..s * s)
            .map(|i| {
                let (query, key) = (i / s, i % s);
                if key > query || self.document(key) != self.document(query) { -1e300 } else { 0.0 }
            })
            .collect();
        let mask: T3 =
            Tensor::from_data(TensorData::new(mask_values, [1, s, s]), (&device, DType::F64)).autodiff();

        let (heads, kv, hd) = (config.num_attention_heads, config.kv_heads(), config.head_dim());
        let mut x =
            get("model.embed_tokens.weight").select(0, ids(self.ids.iter().map(|i| i64::from(*i)).collect()));
        for i in 0..config.num_hidden_layers {
            let layer = |name: &str| get(&format!("model.layers.{i}.{name}.weight"));
            let linear = |x: T2, name: &str| x.matmul(layer(name).transpose());
            let y = norm(x.clone(), layer("input_layernorm"));
            let split = |x: T2, heads: usize| x.reshape([s, heads, hd]).swap_dims(0, 1);
            let q = rotate(split(linear(y.clone(), "self_attn.q_proj"), heads));
            let k = rotate(split(linear(y.clone(), "self_attn.k_proj"), kv));
            let v = split(linear(y, "self_attn.v_proj"), kv);
            let repeat =
                |t: T3| t.reshape([kv, 1, s, hd]).expand([kv, heads / kv, s, hd]).reshape([heads, s, hd]);
            let scores = q.matmul(repeat(k).transpose()) * (1.0 / (hd as f64).sqrt()) + mask.clone();
            let attention = activation::softmax(scores, 2).matmul(repeat(v));
            let h = x + linear(attention.swap_dims(0, 1).reshape([s, heads * hd]), "self_attn.o_proj");
            let y = norm(h.clone(), layer("post_attention_layernorm"));
            let inner = activation::silu(linear(y.clone(), "mlp.gate_proj")) * linear(y, "mlp.up_proj");
            x = h + linear(inner, "mlp.down_proj");
        }
        let head = if config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let logits = norm(x, get("model.norm.weight")).matmul(get(head).transpose());
        let targets = ids(self.targets.iter().map(|t| i64::from((*t).max(0))).collect()).reshape([s, 1]);
        let weights = self.targets.iter().map(|t| if *t == NO_TARGET { 0.0 } else { 1.0 }).collect();
        let chosen = activation::log_softmax(logits, 1).gather(1, targets);
        let loss = (chosen * number(weights, [s, 1])).sum().neg();
        let value = loss.clone().inner().into_scalar::<f64>();
        let mut gradients = loss.backward();
        let numbers = |t: T2| t.into_data().iter::<f64>().collect::<Vec<f64>>();
        let mut of = |t: &T2| t.grad_remove(&mut gradients).map(numbers).unwrap_or_default();
        Reference { loss: value, gradients: named.iter().map(|(name, t)| (name.clone(), of(t))).collect() }
    }
}

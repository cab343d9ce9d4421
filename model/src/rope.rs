//! Rotary position embedding (RoPE) as Hugging Face's Llama computes it: a head's halves are paired, not its neighbours.

use burn_tensor::{Device, FloatDType, Tensor, TensorData};

use crate::Result;
use crate::config::{Config, Scaling};

/// The cosines and sines of `S` positions, each `[1, S, head_dim / 2]`.
#[derive(Clone, Debug)]
pub struct Rope {
    cos: Tensor<3>,
    sin: Tensor<3>,
}

/// The rotation frequencies of a head's `head_dim / 2` pairs, and the factor that scales queries and keys, for sequences of
/// `length` positions.
///
/// They are computed in f32, as transformers does. In f64 the angles at position 100,000 would differ visibly.
pub fn frequencies(config: &Config, length: usize) -> Result<(Vec<f32>, f64)> {
    let dim = config.head_dim() as f64;
    let pairs = config.head_dim() / 2;
    let wave =
        |base: f64| (0..pairs).map(move |i| base.powf(f64::from(2.0f32 * i as f32 / dim as f32)) as f32);
    let plain: Vec<f32> = wave(config.theta()).map(|wave| 1.0 / wave).collect();
    Ok(match config.scaling()? {
        Scaling::None => (plain, 1.0),
        Scaling::Linear { factor } => (plain.iter().map(|f| f / factor as f32).collect(), 1.0),
        Scaling::Dynamic { factor } => {
            let positions = config.max_position_embeddings as f64;
            let stretch = factor * (length as f64).max(positions) / positions - (factor - 1.0);
            let base = config.theta() * stretch.powf(dim / (dim - 2.0));
            (wave(base).map(|wave| 1.0 / wave).collect(), 1.0)
        }
        Scaling::Yarn {
            factor,
            attention_factor,
            beta_fast,
            beta_slow,
            original_positions: original,
            truncate,
        } => {
            // The pair that makes this many turns within the original context.
            let pair = |turns: f64| {
                dim * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * config.theta().ln())
            };
            let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(dim - 1.0));
            if low == high {
                high += 0.001;
            }
            let ramped = plain.iter().enumerate().map(|(i, f)| {
                let kept = 1.0 - ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                f / factor as f32 * (1.0 - kept) + f * kept
            });
            (ramped.collect(), attention_factor)
        }
        Scaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_positions: original,
        } => {
            let scaled = plain.iter().map(|&f| {
                let wavelength = std::f64::consts::TAU / f64::from(f);
                let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0) as f32;
                (1.0 - smooth) * f / factor as f32 + smooth * f
            });
            (scaled.collect(), 1.0)
        }
    })
}

impl Rope {
    /// Tables for rows at `positions` of a sequence of `length` positions.
    pub fn new(
        config: &Config,
        positions: &[usize],
        length: usize,
        device: &Device,
        precision: FloatDType,
    ) -> Result<Self> {
        let (frequencies, factor) = frequencies(config, length)?;
        let table = |f: fn(f64) -> f64| {
            let angles = positions.iter().flat_map(|p| frequencies.iter().map(move |f| *p as f32 * f));
            let values: Vec<f32> = angles.map(|angle| (f(f64::from(angle)) * factor) as f32).collect();
            Tensor::<3>::from_data(TensorData::new(values, [1, positions.len(), frequencies.len()]), device)
                .cast(precision)
        };
        Ok(Self { cos: table(f64::cos), sin: table(f64::sin) })
    }

    /// Rotates `x` `[heads, S, head_dim]`.
    pub fn rotate(&self, x: Tensor<3>) -> Tensor<3> {
        let half = x.dims()[2] / 2;
        let (a, b) = (x.clone().narrow(2, 0, half), x.narrow(2, half, half));
        let first = a.clone() * self.cos.clone() - b.clone() * self.sin.clone();
        let second = b * self.cos.clone() + a * self.sin.clone();
        Tensor::cat(vec![first, second], 2)
    }

    /// The gradient of [`rotate`](Self::rotate)'s input, from the gradient of its output.
    pub fn rotate_backward(&self, dx: Tensor<3>) -> Tensor<3> {
        Self { cos: self.cos.clone(), sin: self.sin.clone().neg() }.rotate(dx)
    }
}

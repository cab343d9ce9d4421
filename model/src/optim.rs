//! AdamW, with the gradients' global norm clipped, and the learning rate's schedule.

use burn::tensor::Tensor;

use crate::llama::{Config, Weights};

/// As LLaMA was trained: betas 0.9 and 0.95, gradients clipped at 1.
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.95;
const EPSILON: f64 = 1e-8;
const MOST_NORM: f64 = 1.0;

/// AdamW's state: two moments a parameter.
pub struct AdamW {
    moments: Vec<(Tensor<2>, Tensor<2>)>,
    /// Whether a parameter decays: matrices do, norms don't.
    decays: Vec<bool>,
    weight_decay: f64,
    steps: i32,
}

impl AdamW {
    pub fn new(config: &Config, weights: &Weights, weight_decay: f64) -> Self {
        let moments = weights.flat().into_iter().map(|w| (w.zeros_like(), w.zeros_like())).collect();
        let decays = config.parameters().iter().map(|(name, _)| !name.contains("norm")).collect();
        Self { moments, decays, weight_decay, steps: 0 }
    }

    /// One step; returns the new weights and the gradients' norm before clipping.
    pub fn step(
        &mut self,
        config: &Config,
        weights: Weights,
        gradients: Weights,
        rate: f64,
    ) -> (Weights, f64) {
        self.steps += 1;
        let gradients = gradients.flat();
        let squares = gradients.iter().map(|g| (g.clone() * g.clone()).sum().into_scalar::<f32>() as f64);
        let norm = squares.sum::<f64>().sqrt();
        let clip = if norm > MOST_NORM { MOST_NORM / norm } else { 1.0 };
        let (correct1, correct2) = (1.0 - BETA1.powi(self.steps), 1.0 - BETA2.powi(self.steps));
        let mut updated = vec![];
        for (i, (w, g)) in weights.flat().into_iter().zip(gradients).enumerate() {
            let g = g * clip;
            let (m, v) = self.moments[i].clone();
            let m = m * BETA1 + g.clone() * (1.0 - BETA1);
            let v = v * BETA2 + g.clone() * g * (1.0 - BETA2);
            let decay = if self.decays[i] { rate * self.weight_decay } else { 0.0 };
            let update = (m.clone() / correct1) / ((v.clone() / correct2).sqrt() + EPSILON);
            updated.push(w * (1.0 - decay) - update * rate);
            self.moments[i] = (m, v);
        }
        (Weights::from_flat(config, updated), norm)
    }
}

/// Linear warm-up, then constant (paper §4).
pub fn rate(step: u64, learning_rate: f64, warmup_steps: u64) -> f64 {
    if step <= warmup_steps { learning_rate * step as f64 / (warmup_steps + 1) as f64 } else { learning_rate }
}

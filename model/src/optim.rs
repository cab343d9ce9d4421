//! AdamW on a rank's shards, with clipping of the global gradient norm, and the learning-rate schedule.

use burn_tensor::{DType, Tensor, TensorData};

use crate::Result;
use crate::comm::Comm;
use crate::conf::{Schedule, TrainConf};
use crate::shards::Shards;

/// LLaMA's training settings: betas 0.9 and 0.95, gradient norm clipped at 1.
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.95;
const EPSILON: f64 = 1e-8;
const MAX_GRAD_NORM: f64 = 1.0;

/// AdamW's state: the moments of each number in a rank's shards, unit by unit.
pub struct AdamW {
    pub first_moment: Vec<Tensor<1>>,
    pub second_moment: Vec<Tensor<1>>,
    /// Steps done.
    pub steps: u64,
    pub weight_decay: f64,
}

impl AdamW {
    pub fn new(shards: &Shards, weight_decay: f64) -> Self {
        let zeros: Vec<Tensor<1>> = shards.owned.iter().map(Tensor::zeros_like).collect();
        Self { first_moment: zeros.clone(), second_moment: zeros, steps: 0, weight_decay }
    }

    /// Makes a step with this rank's shards of the gradients, whose norm over all ranks is `norm`. Weight decay applies to
    /// matrices, not to norms.
    pub fn step(
        &mut self,
        comm: &dyn Comm,
        shards: &mut Shards,
        gradients: Vec<Tensor<1>>,
        norm: f64,
        rate: f64,
    ) {
        self.steps += 1;
        let clip = if norm > MAX_GRAD_NORM { MAX_GRAD_NORM / norm } else { 1.0 };
        let steps = i32::try_from(self.steps).unwrap_or(i32::MAX);
        let (correct1, correct2) = (1.0 - BETA1.powi(steps), 1.0 - BETA2.powi(steps));
        for (i, gradient) in gradients.into_iter().enumerate() {
            let gradient = if clip < 1.0 { gradient * clip } else { gradient };
            let square = gradient.clone() * gradient.clone();
            self.first_moment[i] = self.first_moment[i].clone() * BETA1 + gradient * (1.0 - BETA1);
            self.second_moment[i] = self.second_moment[i].clone() * BETA2 + square * (1.0 - BETA2);
            let deviation = (self.second_moment[i].clone() / correct2).sqrt() + EPSILON;
            let update = self.first_moment[i].clone() / deviation * (rate / correct1);
            let before = shards.owned[i].clone();
            let kept = 1.0 - rate * self.weight_decay;
            let unit = &shards.units[i];
            let owned = unit.shard_range(comm.rank(), comm.size());
            let norms = unit.norms.saturating_sub(owned.start).min(owned.len());
            let decayed = match norms {
                0 => before * kept,
                all if all == owned.len() => before,
                _ => {
                    let matrices = before.dims()[0] - norms;
                    let [norms, matrices] =
                        [(0, norms), (norms, matrices)].map(|(from, n)| before.clone().narrow(0, from, n));
                    Tensor::cat(vec![norms, matrices * kept], 0)
                }
            };
            shards.owned[i] = decayed - update;
        }
    }
}

/// The norm of all ranks' gradients, from this rank's shards of them.
pub fn global_norm(comm: &dyn Comm, gradients: &[Tensor<1>]) -> Result<f64> {
    let squares = gradients.iter().map(|g| (g.clone() * g.clone()).sum());
    let sum: f64 = Tensor::cat(squares.collect(), 0).into_data().iter::<f64>().sum();
    Ok(all_reduce_sum(comm, &[sum], &gradients[0].device())?[0].sqrt())
}

/// The sum over ranks of each number.
pub fn all_reduce_sum(comm: &dyn Comm, numbers: &[f64], device: &burn_tensor::Device) -> Result<Vec<f64>> {
    let data = TensorData::new(numbers.to_vec(), [numbers.len()]);
    let sum = comm.all_reduce(Tensor::from_data(data, (device, DType::F64)))?;
    Ok(sum.into_data().iter::<f64>().collect())
}

/// The learning rate of a step, counted from 1: linear warm-up, then constant (paper §4) or a cosine down to a tenth.
pub fn learning_rate(conf: &TrainConf, step: u64, steps: u64) -> f64 {
    let (peak, warmup) = (conf.learning_rate, conf.warmup_steps);
    if step <= warmup {
        return peak * step as f64 / (warmup + 1) as f64;
    }
    match conf.schedule {
        Schedule::Constant => peak,
        Schedule::Cosine => {
            let done = (step - warmup - 1) as f64 / steps.saturating_sub(warmup + 1).max(1) as f64;
            peak * (0.1 + 0.9 * 0.5 * (1.0 + (std::f64::consts::PI * done).cos()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::threads;
    use crate::shards::Unit;
    use burn_tensor::Device;
    use serde_json::json;

    #[test]
    fn the_rate_warms_up_and_then_stays_or_falls() {
        let conf = |schedule: &str| -> TrainConf {
            serde_json::from_value(json!({ "learning_rate": 1.0, "warmup_steps": 3, "schedule": schedule }))
                .unwrap()
        };
        let rates =
            |schedule| (1..=7).map(|step| learning_rate(&conf(schedule), step, 7)).collect::<Vec<f64>>();
        assert_eq!(rates("constant"), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]);
        let cosine = rates("cosine");
        assert_eq!(cosine[..4], [0.25, 0.5, 0.75, 1.0]);
        assert!(
            cosine[3] > cosine[4] && cosine[4] > cosine[5] && (cosine[6] - 0.1).abs() < 1e-12,
            "{cosine:?}"
        );
    }

    /// AdamW as the paper states it, number by number in f64.
    fn by_the_book(mut w: Vec<f64>, gradients: &[Vec<f64>], norms: usize, rate: f64, decay: f64) -> Vec<f64> {
        let (mut m, mut v) = (vec![0.0; w.len()], vec![0.0; w.len()]);
        for (step, g) in gradients.iter().enumerate() {
            let norm = g.iter().map(|g| g * g).sum::<f64>().sqrt();
            let t = step as i32 + 1;
            for i in 0..w.len() {
                let g = g[i] / norm.max(1.0);
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let update =
                    (m[i] / (1.0 - 0.9f64.powi(t))) / ((v[i] / (1.0 - 0.95f64.powi(t))).sqrt() + 1e-8);
                w[i] = w[i] * (1.0 - if i < norms { 0.0 } else { rate * decay }) - rate * update;
            }
        }
        w
    }

    #[test]
    fn shards_step_as_the_whole_would_and_norms_do_not_decay() {
        let unit = Unit {
            parameters: vec![("norm".into(), [1, 5]), ("matrix".into(), [2, 7])],
            length: 19,
            norms: 5,
        };
        let number =
            |step: usize, i: usize| ((i * 7 + step * 5) as f64).sin() * if step == 1 { 0.01 } else { 1.0 };
        let want = by_the_book(
            (0..19).map(|i| number(9, i)).collect(),
            &(0..3).map(|step| (0..19).map(|i| number(step, i)).collect()).collect::<Vec<_>>(),
            5,
            0.1,
            0.5,
        );
        for ranks in [1, 2, 4, 8] {
            let parts = threads::run(ranks, 1, std::time::Duration::from_secs(20), |comm, _| {
                let device = Device::flex();
                let part = |step: usize| {
                    move |unit, range: std::ops::Range<usize>| {
                        Ok(range.map(|i| if unit == 0 { number(step, i) as f32 } else { 0.0 }).collect())
                    }
                };
                let only_norms = Unit { parameters: vec![("norm".into(), [1, 6])], length: 6, norms: 6 };
                let units = || vec![unit.clone(), only_norms.clone()];
                let mut shards = Shards::new(units(), comm, &device, part(9))?;
                let mut adam = AdamW::new(&shards, 0.5);
                for step in 0..3 {
                    let gradients = Shards::new(units(), comm, &device, part(step))?.owned;
                    let norm = global_norm(comm, &gradients)?;
                    adam.step(comm, &mut shards, gradients, norm, 0.1);
                }
                Ok(shards.owned[0].clone().into_data().iter::<f64>().collect::<Vec<_>>())
            });
            let got: Vec<f64> = parts.unwrap().into_iter().flatten().take(19).collect();
            for (got, want) in got.iter().zip(&want) {
                assert!((got - want).abs() < 1e-6, "{ranks} ranks: {got} {want}");
            }
        }
    }
}

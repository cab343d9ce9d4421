//! Backpropagation of one sequence that is sharded over ranks, a layer at a time. The forward pass keeps each layer's
//! input, attention output and log-sum-exp; the backward pass recomputes the rest, from the last layer to the first. A rank
//! holds the whole parameters of one layer at a time, and the logits of a few rows at a time.

use burn_tensor::{Device, FloatDType, IndexingUpdateOp, Int, Tensor, TensorData};

use crate::Result;
use crate::attention::Kernel;
use crate::comm::Comm;
use crate::config::Config;
use crate::dataset::NO_TARGET;
use crate::llama::{self, Layer, Loss, PostAttention, PreAttention, to_f32};
use crate::ring::{self, Sharding};
use crate::rope::Rope;
use crate::shards::Shards;

/// Logits are computed for this many rows at a time: 65 MB for LLaMA's vocabulary.
pub const LOGIT_ROWS: usize = 512;

/// What a rank computes with: the model's config, its process groups and its device.
pub struct RankContext<'a> {
    pub config: Config,
    /// All ranks. They share the parameters.
    pub world: &'a dyn Comm,
    /// The ranks that share this rank's sequence.
    pub sequence: &'a dyn Comm,
    pub device: Device,
    pub kernel: Kernel,
    /// The type of matrix products.
    pub precision: FloatDType,
    /// Whether the backward pass recomputes a layer's intermediates; otherwise the forward pass keeps them.
    pub recompute: bool,
    /// Where saved activations wait, if not on `device`.
    pub offload: Option<Device>,
}

/// This rank's rows of a sequence.
pub struct SequenceShard {
    pub ids: Vec<i32>,
    /// The id to predict at each row; [`NO_TARGET`] where there is no loss.
    pub targets: Vec<i32>,
    pub sharding: Sharding,
}

/// What the forward pass keeps of a layer.
struct Activations {
    x: Tensor<2>,
    out: Tensor<3>,
    lse: Tensor<3>,
    intermediates: Option<([Tensor<3>; 3], PreAttention, PostAttention)>,
}

pub(crate) fn id_tensor(values: &[i32], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i64> = values.iter().map(|v| i64::from(*v)).collect();
    let length = values.len();
    Tensor::from_data(TensorData::new(values, [length]), device)
}

impl RankContext<'_> {
    fn offloaded<const D: usize>(&self, tensor: Tensor<D>) -> Tensor<D> {
        match &self.offload {
            Some(host) => tensor.to_device(host),
            None => tensor,
        }
    }

    fn gather_layer(&self, shards: &Shards, i: usize) -> Result<Layer> {
        Ok(Layer::from_parameters(shards.all_gather(self.world, i + 1, self.precision)?))
    }

    fn gather_embedding(&self, shards: &Shards) -> Result<Tensor<2>> {
        Ok(shards.all_gather(self.world, 0, self.precision)?.swap_remove(0))
    }

    /// The weights of the final norm and of the output head.
    fn gather_head(&self, shards: &Shards) -> Result<[Tensor<2>; 2]> {
        let last = shards.units.len() - 1;
        let mut unit = shards.all_gather(self.world, last, self.precision)?.into_iter();
        let norm = unit.next().expect("the last unit has a norm");
        let head = match unit.next() {
            Some(head) => head,
            None => self.gather_embedding(shards)?,
        };
        Ok([norm, head])
    }

    /// Returns the loss at each of this rank's rows. Adds this rank's shard of the gradients of `scale` × the sequence's
    /// summed loss to `accumulated`, unit by unit.
    pub fn backprop(
        &self,
        shards: &Shards,
        shard: &SequenceShard,
        scale: f64,
        accumulated: &mut [Option<Tensor<1>>],
    ) -> Result<Vec<f32>> {
        let mut accumulate = |unit: usize, gradients: Vec<Tensor<2>>| -> Result<()> {
            let gradient = shards.reduce_scatter(self.world, unit, gradients)?;
            accumulated[unit] = Some(match accumulated[unit].take() {
                Some(sum) => sum + gradient,
                None => gradient,
            });
            Ok(())
        };
        let sharding = &shard.sharding;
        let (positions, longest) = (sharding.position_ids(), sharding.longest_document());
        let rope = Rope::new(&self.config, &positions, longest, &self.device, self.precision)?;
        let input = id_tensor(&shard.ids, &self.device);
        let (saved, x) = self.forward(shards, sharding, &rope, input.clone())?;

        let [norm, head] = self.gather_head(shards)?;
        let (losses, mut dx, dnorm, dhead) = self.loss_backward(&norm, &head, x, &shard.targets, scale);
        drop(head);
        let last = shards.units.len() - 1;
        let tied = match self.config.tie_word_embeddings {
            true => {
                accumulate(last, vec![dnorm])?;
                Some(dhead)
            }
            false => {
                accumulate(last, vec![dnorm, dhead])?;
                None
            }
        };
        for (i, saved) in saved.into_iter().enumerate().rev() {
            let layer = self.gather_layer(shards, i)?;
            let (gradients, next) = self.layer_backward(&layer, saved, sharding, &rope, dx)?;
            dx = next;
            accumulate(i + 1, gradients.into_parameters())?;
        }
        let dx = to_f32(dx);
        let zeros =
            Tensor::zeros([self.config.vocab_size, self.config.hidden_size], (&self.device, dx.dtype()));
        let dembedding = zeros.select_assign(0, input, dx, IndexingUpdateOp::Add);
        accumulate(0, vec![if let Some(dhead) = tied { dembedding + dhead } else { dembedding }])?;
        Ok(losses)
    }

    /// What is saved of each layer, and the last layer's output.
    fn forward(
        &self,
        shards: &Shards,
        sharding: &Sharding,
        rope: &Rope,
        input: Tensor<1, Int>,
    ) -> Result<(Vec<Activations>, Tensor<2>)> {
        let config = &self.config;
        let mut x = self.gather_embedding(shards)?.select(0, input);
        let mut saved = vec![];
        for i in 0..config.num_hidden_layers {
            let layer = self.gather_layer(shards, i)?;
            let (qkv, pre) = llama::pre_attention(config, &layer, &x, rope);
            let (out, lse) = ring::forward(self.sequence, self.kernel, sharding, &qkv)?;
            let post = llama::post_attention(config, &layer, &x, &out);
            let y = llama::layer_output(&layer, &post);
            let intermediates = (!self.recompute).then_some((qkv, pre, post));
            let (x_saved, out, lse) = (self.offloaded(x), self.offloaded(out), self.offloaded(lse));
            saved.push(Activations { x: x_saved, out, lse, intermediates });
            x = y;
        }
        Ok((saved, x))
    }

    /// The losses, and the gradients of the last layer's output, the final norm and the head, [`LOGIT_ROWS`] at a time.
    fn loss_backward(
        &self,
        norm: &Tensor<2>,
        head: &Tensor<2>,
        x: Tensor<2>,
        targets: &[i32],
        scale: f64,
    ) -> (Vec<f32>, Tensor<2>, Tensor<2>, Tensor<2>) {
        let (mut losses, mut dx, mut sums) = (vec![], vec![], None);
        for (i, targets) in targets.chunks(LOGIT_ROWS).enumerate() {
            let n = targets.len();
            let mask: Vec<f32> = targets.iter().map(|t| if *t == NO_TARGET { 0.0 } else { 1.0 }).collect();
            let mask = to_f32(Tensor::<2>::from_data(TensorData::new(mask, [n, 1]), &self.device));
            let targets: Vec<i32> = targets.iter().map(|t| (*t).max(0)).collect();
            let targets = id_tensor(&targets, &self.device).reshape([n, 1]);
            let rows = x.clone().narrow(0, i * LOGIT_ROWS, n);
            let loss = llama::loss(&self.config, norm, head, &rows, targets, mask, scale);
            let Loss { losses: row_losses, dx: drows, dnorm, dhead } = loss;
            losses.push(row_losses);
            dx.push(drows);
            let (dnorm, dhead) = (to_f32(dnorm), to_f32(dhead));
            sums = Some(match sums {
                None => (dnorm, dhead),
                Some((norm_sum, head_sum)) => (norm_sum + dnorm, head_sum + dhead),
            });
        }
        let (dnorm, dhead) = sums.expect("a rank has rows");
        let losses = Tensor::cat(losses, 0).into_data().iter::<f32>().collect();
        (losses, Tensor::cat(dx, 0), dnorm, dhead)
    }

    /// The gradients of a layer's parameters and of its input, from the gradient of its output.
    fn layer_backward(
        &self,
        layer: &Layer,
        saved: Activations,
        sharding: &Sharding,
        rope: &Rope,
        dy: Tensor<2>,
    ) -> Result<(Layer, Tensor<2>)> {
        let Activations { x, out, lse, intermediates } = saved;
        let (x, out, lse) =
            (x.to_device(&self.device), out.to_device(&self.device), lse.to_device(&self.device));
        let (qkv, pre, post) = intermediates.unwrap_or_else(|| {
            let (qkv, pre) = llama::pre_attention(&self.config, layer, &x, rope);
            (qkv, pre, llama::post_attention(&self.config, layer, &x, &out))
        });
        let (after, dx_post, dout) = llama::post_attention_backward(&self.config, layer, &out, post, dy);
        let dqkv = ring::backward(self.sequence, self.kernel, sharding, &dout, &qkv, &out, &lse)?;
        let (before, dx_pre) = llama::pre_attention_backward(layer, &x, pre, dqkv, rope);
        let [post_norm, o, gate, up, down] = after;
        let [input_norm, q, k, v] = before;
        Ok((Layer { input_norm, post_norm, q, k, v, o, gate, up, down }, dx_post + dx_pre))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::comm::threads;
    use crate::device::DeviceName;
    use crate::reference::Case;
    use crate::shards::Unit;
    use proptest::prelude::*;
    use serde_json::json;

    /// Setup a case is computed.
    #[derive(Clone, Copy, Debug)]
    struct Setup {
        ranks: usize,
        device: DeviceName,
        precision: FloatDType,
        recompute: bool,
    }

    /// The loss and the gradients of each parameter of a case, computed on several ranks.
    fn sharded(case: &Case, setup: Setup) -> (f64, Vec<(String, Vec<f64>)>) {
        let timeout = Duration::from_secs(60);
        let ranks = threads::run(setup.ranks, setup.ranks, timeout, |world, sequence| {
            let device = setup.device.open()?;
            let units = Unit::all(&case.config);
            let read = |i: usize, range: std::ops::Range<usize>| Ok(case.units[i][range].to_vec());
            let shards = Shards::new(units, world, &device, read)?;
            let length = case.ids.len();
            let sharding = Sharding::new(sequence.rank(), setup.ranks, length, case.starts.as_deref());
            let shard = SequenceShard {
                ids: sharding.local_rows(&case.ids, 0),
                targets: sharding.local_rows(&case.targets, NO_TARGET),
                sharding,
            };
            let context = RankContext {
                config: case.config.clone(),
                world,
                sequence,
                kernel: setup.device.kernel(setup.precision, case.config.head_dim()),
                device,
                precision: setup.precision,
                recompute: setup.recompute,
                offload: None,
            };
            let mut sums: Vec<Option<Tensor<1>>> = shards.units.iter().map(|_| None).collect();
            let losses = context.backprop(&shards, &shard, 1.0, &mut sums)?;
            let sums: Vec<Vec<f64>> =
                sums.into_iter().map(|sum| sum.unwrap().into_data().iter::<f64>().collect()).collect();
            Ok((losses.into_iter().map(f64::from).sum::<f64>(), sums))
        })
        .unwrap();
        let loss = ranks.iter().map(|(loss, _)| loss).sum();
        let mut gradients = vec![];
        for (i, unit) in Unit::all(&case.config).iter().enumerate() {
            let whole: Vec<f64> = ranks.iter().flat_map(|(_, sums)| sums[i].clone()).collect();
            let mut from = 0;
            for (name, [rows, columns]) in &unit.parameters {
                gradients.push((name.clone(), whole[from..from + rows * columns].to_vec()));
                from += rows * columns;
            }
            assert!(whole[from..].iter().all(|padding| *padding == 0.0));
        }
        (loss, gradients)
    }

    /// The largest ‖Δ‖/‖g‖ of any parameter. Where a gradient is only rounding, it is relative to the whole gradient.
    fn largest_error(got: &[(String, Vec<f64>)], want: &[(String, Vec<f64>)]) -> (f64, String) {
        let length = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|n| n * n).sum::<f64>().sqrt();
        let mut largest = (0.0, String::new());
        let whole = length(&mut want.iter().flat_map(|(_, gradient)| gradient).copied());
        for ((name, got), (also, want)) in got.iter().zip(want) {
            assert_eq!((name, got.len()), (also, want.len()));
            let error = length(&mut got.iter().zip(want).map(|(a, b)| a - b));
            let size = length(&mut want.iter().copied());
            let error = error / if size > 1e-9 * whole { size } else { whole };
            if error.is_nan() || error > largest.0 {
                largest = (error, name.clone());
            }
        }
        largest
    }

    fn config(tied: bool, heads: usize, kv: usize) -> Config {
        serde_json::from_value(json!({
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": heads,
            "num_key_value_heads": kv, "head_dim": 8, "vocab_size": 37, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": tied,
        }))
        .unwrap()
    }

    #[test]
    fn gradients_on_any_number_of_ranks_are_those_of_the_whole_graph() {
        for (length, masked, tied) in
            [(1, false, false), (7, true, true), (67, true, false), (523, false, true)]
        {
            let case = Case::new(config(tied, 6, 2), length, masked, 3);
            let want = case.whole_graph();
            for device in DeviceName::available() {
                for ranks in [1, 2, 4, 8] {
                    let recompute = ranks != 2;
                    let setup = Setup { ranks, device, precision: FloatDType::F32, recompute };
                    let (loss, gradients) = sharded(&case, setup);
                    assert!(
                        (loss - want.loss).abs() <= 1e-5 * want.loss.abs(),
                        "{loss} {} {setup:?}",
                        want.loss
                    );
                    let (error, name) = largest_error(&gradients, &want.gradients);
                    assert!(error <= 1e-5, "{name} of {length} masked {masked}: {error:e} {setup:?}");
                }
            }
        }
    }

    /// Compares the trainer's forward pass with the logits that transformers wrote.
    #[tokio::test(flavor = "multi_thread")]
    async fn losses_are_those_of_transformers_with_each_scaling_on_any_ranks() {
        for scaling in ["default", "linear", "dynamic", "yarn", "llama3"] {
            let at = crate::decoder::tests::fixture(scaling);
            let (ids, logits) = crate::decoder::tests::expected(&at).await;
            let want = crate::decoder::tests::expected_losses(&ids, &logits);
            let checkpoint = crate::checkpoint::Checkpoint::open(&at).await.unwrap();
            let config = &checkpoint.config;
            let runtime = tokio::runtime::Handle::current();
            let mut targets = vec![NO_TARGET; 80];
            targets[64..79].copy_from_slice(&ids[65..]);
            let largest = logits.iter().fold(0f32, |max, w| max.max(w.abs()));
            for device in DeviceName::available() {
                for ranks in [1, 2, 3, 4] {
                    let losses = tokio::task::block_in_place(|| {
                        threads::run(ranks, ranks, Duration::from_secs(60), |world, sequence| {
                            let units = Unit::all(config);
                            let read = |i: usize, range| runtime.block_on(checkpoint.read(&units[i], range));
                            let shards = Shards::new(units.clone(), world, &device.open()?, read)?;
                            let context = RankContext {
                                config: config.clone(),
                                world,
                                sequence,
                                kernel: device.kernel(FloatDType::F32, config.head_dim()),
                                device: device.open()?,
                                precision: FloatDType::F32,
                                recompute: true,
                                offload: None,
                            };
                            let sharding = Sharding::new(sequence.rank(), ranks, 80, None);
                            let (ids, targets) =
                                (sharding.local_rows(&ids, 0), sharding.local_rows(&targets, NO_TARGET));
                            let shard = SequenceShard { ids, targets, sharding };
                            let mut sums: Vec<Option<Tensor<1>>> = units.iter().map(|_| None).collect();
                            let losses = context.backprop(&shards, &shard, 1.0, &mut sums)?;
                            Ok(shard.sharding.indices().zip(losses).collect::<Vec<_>>())
                        })
                    });
                    let mut seen = 0;
                    for (index, loss) in losses.unwrap().concat() {
                        if !(64..79).contains(&index) {
                            continue;
                        }
                        let want = want[index - 64];
                        assert!(
                            (loss - want).abs() <= 2e-5 * largest,
                            "{scaling} {device:?} {ranks}: {loss} {want}"
                        );
                        seen += 1;
                    }
                    assert_eq!(seen, 15);
                }
            }
        }
    }

    /// bf16 has 8 bits of precision. Its gradients are within 3 % of the exact ones at every ring size.
    #[test]
    fn bf16_stays_within_its_bound_at_every_size_of_the_ring() {
        let case = Case::new(config(false, 4, 2), 131, false, 5);
        let want = case.whole_graph();
        for device in DeviceName::available() {
            for ranks in [1, 2, 4, 8] {
                let setup = Setup { ranks, device, precision: FloatDType::BF16, recompute: true };
                let (loss, gradients) = sharded(&case, setup);
                assert!((loss - want.loss).abs() <= 5e-3 * want.loss, "{loss} {} {setup:?}", want.loss);
                let (error, name) = largest_error(&gradients, &want.gradients);
                assert!(error <= 3e-2, "{name}: {error:e} {setup:?}");
            }
        }
    }

    #[test]
    fn a_position_without_target_has_no_loss_and_the_rest_add_up() {
        let mut case = Case::new(config(false, 4, 4), 9, false, 1);
        let setup = Setup { ranks: 2, device: DeviceName::Flex, precision: FloatDType::F32, recompute: true };
        let mut each = 0.0;
        let targets = case.targets.clone();
        for (i, target) in targets.iter().enumerate() {
            case.targets = vec![NO_TARGET; 9];
            case.targets[i] = *target;
            each += sharded(&case, setup).0;
        }
        case.targets = targets;
        assert!((each - sharded(&case, setup).0).abs() < 1e-4);
        case.targets = vec![NO_TARGET; 9];
        let (loss, gradients) = sharded(&case, setup);
        assert_eq!(loss, 0.0);
        assert!(gradients.iter().all(|(_, gradient)| gradient.iter().all(|g| *g == 0.0)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn any_shape_on_any_ranks_has_the_whole_graphs_gradients(
            length in 1usize..90, ranks in 1usize..9, kv in 1usize..4, groups in 1usize..4,
            masked: bool, tied: bool, recompute: bool, salt in 0u64..1000,
        ) {
            let case = Case::new(config(tied, kv * groups, kv), length, masked, salt);
            let want = case.whole_graph();
            for device in DeviceName::available() {
                let setup = Setup { ranks, device, precision: FloatDType::F32, recompute };
                let (loss, gradients) = sharded(&case, setup);
                prop_assert!((loss - want.loss).abs() <= 1e-5 * want.loss.abs() + 1e-6);
                if want.loss > 0.0 {
                    let (error, name) = largest_error(&gradients, &want.gradients);
                    prop_assert!(error <= 1e-5, "{name}: {error:e}");
                }
            }
        }
    }
}

//! Segmented backprop of a sequence, sharded over ranks: forward keeps each layer's input, attention and its log-sum-exp;
//! backward goes from the last layer to the first and computes the rest again. No rank ever has more than one layer's
//! parameters whole, and the logits are never whole.

use burn_tensor::{Device, FloatDType, IndexingUpdateOp, Int, Tensor, TensorData};

use crate::Result;
use crate::attention::Kernel;
use crate::comm::Comm;
use crate::config::Config;
use crate::dataset::NO_TARGET;
use crate::llama::{self, Layer, Loss, Post, Pre, wide};
use crate::ring::{self, Sharding};
use crate::rope::Rope;
use crate::shards::Shards;

/// The logits of so many rows are computed at a time: 65 MB of them for LLaMA's vocabulary.
pub const LOGIT_ROWS: usize = 512;

/// What a rank computes with.
pub struct Machine<'a> {
    pub config: Config,
    /// All ranks: they share the parameters.
    pub world: &'a dyn Comm,
    /// Those that share a sequence.
    pub sequence: &'a dyn Comm,
    pub device: Device,
    pub kernel: Kernel,
    /// What matrices are multiplied in.
    pub precision: FloatDType,
    /// Whether backward computes a layer's insides again; otherwise forward keeps them.
    pub recompute: bool,
    /// Where to keep what forward saves, if not on the device.
    pub offload: Option<Device>,
}

/// This rank's rows of a sequence.
pub struct Rows {
    pub ids: Vec<i32>,
    /// The id to predict at each; [`NO_TARGET`] where there is no loss.
    pub targets: Vec<i32>,
    pub sharding: Sharding,
    pub rope: Rope,
}

/// What forward keeps of a layer.
struct Saved {
    x: Tensor<2>,
    out: Tensor<3>,
    lse: Tensor<3>,
    insides: Option<([Tensor<3>; 3], Pre, Post)>,
}

pub(crate) fn ids(values: &[i32], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i64> = values.iter().map(|v| i64::from(*v)).collect();
    let length = values.len();
    Tensor::from_data(TensorData::new(values, [length]), device)
}

impl Machine<'_> {
    fn keep<const D: usize>(&self, tensor: Tensor<D>) -> Tensor<D> {
        match &self.offload {
            Some(host) => tensor.to_device(host),
            None => tensor,
        }
    }

    fn layer(&self, shards: &Shards, i: usize) -> Result<Layer> {
        Ok(Layer::from_flat(shards.gather(self.world, i + 1, self.precision)?))
    }

    fn embed(&self, shards: &Shards, input: Tensor<1, Int>) -> Result<Tensor<2>> {
        let embedding = shards.gather(self.world, 0, self.precision)?.swap_remove(0);
        Ok(embedding.select(0, input))
    }

    /// The weights of the last norm and of the head.
    fn head(&self, shards: &Shards) -> Result<[Tensor<2>; 2]> {
        let last = shards.units.len() - 1;
        let mut unit = shards.gather(self.world, last, self.precision)?.into_iter();
        let norm = unit.next().expect("the last unit has a norm");
        let head = match unit.next() {
            Some(head) => head,
            None => shards.gather(self.world, 0, self.precision)?.swap_remove(0),
        };
        Ok([norm, head])
    }

    /// The loss at each of this rank's rows; adds this rank's part of the gradients of `scale` × the sequence's summed loss
    /// to `sums`, unit by unit.
    pub fn backprop(
        &self,
        shards: &Shards,
        rows: &Rows,
        scale: f64,
        sums: &mut [Option<Tensor<1>>],
    ) -> Result<Vec<f32>> {
        let config = &self.config;
        let input = ids(&rows.ids, &self.device);
        let mut x = self.embed(shards, input.clone())?;
        let mut saved = vec![];
        for i in 0..config.num_hidden_layers {
            let layer = self.layer(shards, i)?;
            let (qkv, pre) = llama::pre(config, &layer, &x, &rows.rope);
            let (out, lse) = ring::forward(self.sequence, self.kernel, &rows.sharding, &qkv)?;
            let post = llama::post_saved(config, &layer, &x, &out);
            let next = llama::post(&layer, &post);
            let insides = (!self.recompute).then_some((qkv, pre, post));
            saved.push(Saved { x: self.keep(x), out: self.keep(out), lse: self.keep(lse), insides });
            x = next;
        }

        let mut add = |unit: usize, gradients: Vec<Tensor<2>>| -> Result<()> {
            let more = shards.reduce(self.world, unit, gradients)?;
            let sum = sums[unit].take();
            sums[unit] = Some(match sum {
                Some(sum) => sum + more,
                None => more,
            });
            Ok(())
        };
        let [norm, head] = self.head(shards)?;
        let (losses, mut dx, dnorm, dhead) = self.loss(&norm, &head, x, &rows.targets, scale);
        drop(head);
        let tied = match config.tie_word_embeddings {
            true => {
                add(shards.units.len() - 1, vec![dnorm])?;
                Some(dhead)
            }
            false => {
                add(shards.units.len() - 1, vec![dnorm, dhead])?;
                None
            }
        };
        for (i, saved) in saved.into_iter().enumerate().rev() {
            let layer = self.layer(shards, i)?;
            let (gradients, next) = self.layer_backward(&layer, saved, rows, dx)?;
            dx = next;
            add(i + 1, gradients.into_flat())?;
        }
        let dx = wide(dx);
        let zeros = Tensor::zeros([config.vocab_size, config.hidden_size], (&self.device, dx.dtype()));
        let embed = zeros.select_assign(0, input, dx, IndexingUpdateOp::Add);
        add(0, vec![if let Some(dhead) = tied { embed + dhead } else { embed }])?;
        Ok(losses)
    }

    /// The losses, and gradients of the last layer's output, of the last norm and of the head, some rows at a time.
    fn loss(
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
            let counts: Vec<f32> = targets.iter().map(|t| if *t == NO_TARGET { 0.0 } else { 1.0 }).collect();
            let counts = wide(Tensor::<2>::from_data(TensorData::new(counts, [n, 1]), &self.device));
            let wanted: Vec<i32> = targets.iter().map(|t| (*t).max(0)).collect();
            let wanted = ids(&wanted, &self.device).reshape([n, 1]);
            let part = x.clone().narrow(0, i * LOGIT_ROWS, n);
            let loss = llama::loss(&self.config, norm, head, &part, wanted, counts, scale);
            let Loss { losses: some, dx: dpart, dnorm, dhead } = loss;
            losses.push(some);
            dx.push(dpart);
            let (dnorm, dhead) = (wide(dnorm), wide(dhead));
            sums = Some(match sums {
                None => (dnorm, dhead),
                Some((norms, heads)) => (norms + dnorm, heads + dhead),
            });
        }
        let (dnorm, dhead) = sums.expect("a rank has rows");
        let losses = Tensor::cat(losses, 0).into_data().iter::<f32>().collect();
        (losses, Tensor::cat(dx, 0), dnorm, dhead)
    }

    /// Gradients of a layer's parameters and of its input, from that of its output.
    fn layer_backward(
        &self,
        layer: &Layer,
        saved: Saved,
        rows: &Rows,
        dy: Tensor<2>,
    ) -> Result<(Layer, Tensor<2>)> {
        let Saved { x, out, lse, insides } = saved;
        let (x, out, lse) =
            (x.to_device(&self.device), out.to_device(&self.device), lse.to_device(&self.device));
        let (qkv, pre, post) = insides.unwrap_or_else(|| {
            let (qkv, pre) = llama::pre(&self.config, layer, &x, &rows.rope);
            (qkv, pre, llama::post_saved(&self.config, layer, &x, &out))
        });
        let (after, dx_post, dout) = llama::post_backward(&self.config, layer, &out, post, dy);
        let dqkv = ring::backward(self.sequence, self.kernel, &rows.sharding, &dout, &qkv, &out, &lse)?;
        let (before, dx_pre) = llama::pre_backward(layer, &x, pre, dqkv, &rows.rope);
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
    use crate::device::Name;
    use crate::reference::Case;
    use crate::shards::Unit;
    use proptest::prelude::*;
    use serde_json::json;

    /// How a case is computed.
    #[derive(Clone, Copy, Debug)]
    struct How {
        ranks: usize,
        device: Name,
        precision: FloatDType,
        recompute: bool,
    }

    /// Loss and gradients of a case, sharded over ranks; gradients by parameter.
    fn sharded(case: &Case, how: How) -> (f64, Vec<(String, Vec<f64>)>) {
        let patience = Duration::from_secs(60);
        let ranks = threads::run(how.ranks, how.ranks, patience, |world, sequence| {
            let device = how.device.open()?;
            let units = Unit::all(&case.config);
            let read = |i: usize, range: std::ops::Range<usize>| Ok(case.units[i][range].to_vec());
            let shards = Shards::new(units, world, &device, read)?;
            let length = case.ids.len();
            let sharding = Sharding::new(sequence.rank(), how.ranks, length, case.starts.as_deref());
            let rope =
                Rope::new(&case.config, &sharding.positions(), sharding.longest(), &device, how.precision)?;
            let rows = Rows {
                ids: sharding.take(&case.ids, 0),
                targets: sharding.take(&case.targets, NO_TARGET),
                rope,
                sharding,
            };
            let machine = Machine {
                config: case.config.clone(),
                world,
                sequence,
                kernel: how.device.kernel(how.precision, case.config.head_dim()),
                device,
                precision: how.precision,
                recompute: how.recompute,
                offload: None,
            };
            let mut sums: Vec<Option<Tensor<1>>> = shards.units.iter().map(|_| None).collect();
            let losses = machine.backprop(&shards, &rows, 1.0, &mut sums)?;
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

    /// The largest ‖Δ‖/‖g‖ of any parameter; where there is no gradient but for rounding, of the whole one.
    fn worst(got: &[(String, Vec<f64>)], want: &[(String, Vec<f64>)]) -> (f64, String) {
        let length = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|n| n * n).sum::<f64>().sqrt();
        let mut worst = (0.0, String::new());
        let whole = length(&mut want.iter().flat_map(|(_, gradient)| gradient).copied());
        for ((name, got), (also, want)) in got.iter().zip(want) {
            assert_eq!((name, got.len()), (also, want.len()));
            let error = length(&mut got.iter().zip(want).map(|(a, b)| a - b));
            let size = length(&mut want.iter().copied());
            let error = error / if size > 1e-9 * whole { size } else { whole };
            if error.is_nan() || error > worst.0 {
                worst = (error, name.clone());
            }
        }
        worst
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
            for device in Name::at_hand() {
                for ranks in [1, 2, 4, 8] {
                    let recompute = ranks != 2;
                    let how = How { ranks, device, precision: FloatDType::F32, recompute };
                    let (loss, gradients) = sharded(&case, how);
                    assert!(
                        (loss - want.loss).abs() <= 1e-5 * want.loss.abs(),
                        "{loss} {} {how:?}",
                        want.loss
                    );
                    let (error, name) = worst(&gradients, &want.gradients);
                    assert!(error <= 1e-5, "{name} of {length} masked {masked}: {error:e} {how:?}");
                }
            }
        }
    }

    /// Training's own forward, round the ring, against the logits that transformers wrote.
    #[tokio::test(flavor = "multi_thread")]
    async fn losses_are_those_of_transformers_with_each_scaling_on_any_ranks() {
        for scaling in ["default", "linear", "dynamic", "yarn", "llama3"] {
            let at = crate::decoder::tests::fixture(scaling);
            let (ids, logits) = crate::decoder::tests::expected(&at).await;
            let want = crate::decoder::tests::expected_losses(&ids, &logits);
            let checkpoint = crate::checkpoint::Checkpoint::open(&at).await.unwrap();
            let config = &checkpoint.config;
            let wait = tokio::runtime::Handle::current();
            let mut targets = vec![NO_TARGET; 80];
            targets[64..79].copy_from_slice(&ids[65..]);
            let largest = logits.iter().fold(0f32, |most, w| most.max(w.abs()));
            for device in Name::at_hand() {
                for ranks in [1, 2, 3, 4] {
                    let losses = tokio::task::block_in_place(|| {
                        threads::run(ranks, ranks, Duration::from_secs(60), |world, sequence| {
                            let units = Unit::all(config);
                            let read = |i: usize, range| wait.block_on(checkpoint.read(&units[i], range));
                            let shards = Shards::new(units.clone(), world, &device.open()?, read)?;
                            let machine = Machine {
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
                            let positions = sharding.positions();
                            let rope = Rope::new(config, &positions, 80, &machine.device, machine.precision)?;
                            let (ids, targets) = (sharding.take(&ids, 0), sharding.take(&targets, NO_TARGET));
                            let rows = Rows { ids, targets, sharding, rope };
                            let mut sums: Vec<Option<Tensor<1>>> = units.iter().map(|_| None).collect();
                            let losses = machine.backprop(&shards, &rows, 1.0, &mut sums)?;
                            Ok(rows.sharding.places().zip(losses).collect::<Vec<_>>())
                        })
                    });
                    let mut seen = 0;
                    for (place, loss) in losses.unwrap().concat() {
                        if !(64..79).contains(&place) {
                            continue;
                        }
                        let want = want[place - 64];
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

    /// bf16 has 8 bits: its gradients are within 3 % of the exact ones, at every size of the ring alike.
    #[test]
    fn bf16_stays_within_its_bound_at_every_size_of_the_ring() {
        let case = Case::new(config(false, 4, 2), 131, false, 5);
        let want = case.whole_graph();
        for device in Name::at_hand() {
            for ranks in [1, 2, 4, 8] {
                let how = How { ranks, device, precision: FloatDType::BF16, recompute: true };
                let (loss, gradients) = sharded(&case, how);
                assert!((loss - want.loss).abs() <= 5e-3 * want.loss, "{loss} {} {how:?}", want.loss);
                let (error, name) = worst(&gradients, &want.gradients);
                assert!(error <= 3e-2, "{name}: {error:e} {how:?}");
            }
        }
    }

    #[test]
    fn a_position_without_target_has_no_loss_and_the_rest_add_up() {
        let mut case = Case::new(config(false, 4, 4), 9, false, 1);
        let how = How { ranks: 2, device: Name::Flex, precision: FloatDType::F32, recompute: true };
        let mut each = 0.0;
        let targets = case.targets.clone();
        for (i, target) in targets.iter().enumerate() {
            case.targets = vec![NO_TARGET; 9];
            case.targets[i] = *target;
            each += sharded(&case, how).0;
        }
        case.targets = targets;
        assert!((each - sharded(&case, how).0).abs() < 1e-4);
        case.targets = vec![NO_TARGET; 9];
        let (loss, gradients) = sharded(&case, how);
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
            for device in Name::at_hand() {
                let how = How { ranks, device, precision: FloatDType::F32, recompute };
                let (loss, gradients) = sharded(&case, how);
                prop_assert!((loss - want.loss).abs() <= 1e-5 * want.loss.abs() + 1e-6);
                if want.loss > 0.0 {
                    let (error, name) = worst(&gradients, &want.gradients);
                    prop_assert!(error <= 1e-5, "{name}: {error:e}");
                }
            }
        }
    }
}

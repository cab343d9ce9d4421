//! Measures each part of a training step ([`RankContext::backprop`](lengthwise_model::backprop::RankContext)) on one rank,
//! with recomputation, for the Llama of `step_speed`:
//!
//!     cargo run --release -p lengthwise-model --features libtorch --example step_segments -- DEVICE SEQUENCE_TOKENS f32|bf16
//!
//! Prints a line for each part: the median seconds of all layers, and the share of the sum.

use std::time::{Duration, Instant};

use burn_tensor::{FloatDType, Int, Tensor, TensorData};
use lengthwise_model::backprop::LOGIT_ROWS;
use lengthwise_model::comm::threads;
use lengthwise_model::config::Config;
use lengthwise_model::device::DeviceName;
use lengthwise_model::llama::{self, Layer, PostAttention};
use lengthwise_model::optim::{AdamW, global_norm};
use lengthwise_model::ring::{self, Sharding};
use lengthwise_model::rope::Rope;
use lengthwise_model::shards::{Shards, Unit};
use lengthwise_model::{Result, checkpoint};
use serde_json::json;

const ROUNDS: usize = 3;

/// The median seconds of some work, and its result.
fn timed<T>(mut work: impl FnMut() -> Result<T>) -> Result<(f64, T)> {
    let mut seconds = vec![];
    loop {
        let started = Instant::now();
        let given = work()?;
        seconds.push(started.elapsed().as_secs_f64());
        // The first round warms up.
        if seconds.len() > ROUNDS {
            seconds.remove(0);
            seconds.sort_by(f64::total_cmp);
            return Ok((seconds[seconds.len() / 2], given));
        }
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, length, precision] = &arguments[..] else { return Err("see the top of the file".into()) };
    let name = DeviceName::parse(name)?;
    let length: usize = length.parse()?;
    let precision = if precision == "bf16" { FloatDType::BF16 } else { FloatDType::F32 };
    let config: Config = serde_json::from_value(json!({
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 2048, "rms_norm_eps": 1e-5,
    }))?;
    let layers = config.num_hidden_layers as f64;
    let segments = threads::run(1, 1, Duration::from_secs(3600), |world, sequence| {
        let (device, kernel) = (name.open()?, name.kernel(precision, config.head_dim()));
        let units = Unit::all(&config);
        let read = |i: usize, range| Ok(checkpoint::initial_weights(&units, i, range, 1));
        let mut shards = Shards::new(units.clone(), world, &device, read)?;
        let mut optimizer = AdamW::new(&shards, 0.1);
        let sharding = Sharding::new(0, 1, length, None);
        let rope = Rope::new(&config, &sharding.position_ids(), length, &device, precision)?;
        let ids: Vec<i64> = (0..length as i64).map(|i| (i * i * 31 + i * 7) % 2048).collect();
        let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [length]), &device);

        let (gather, layer) = timed(|| Ok(Layer::from_parameters(shards.all_gather(world, 1, precision)?)))?;
        let embedding = shards.all_gather(world, 0, precision)?.swap_remove(0);
        let x = embedding.select(0, ids.clone());
        let (pre, (qkv, pre_saved)) = timed(|| Ok(llama::pre_attention(&config, &layer, &x, &rope)))?;
        let (attention, (out, lse)) = timed(|| ring::forward(sequence, kernel, &sharding, &qkv))?;
        let (post, (post_saved, y)) = timed(|| {
            let saved: PostAttention = llama::post_attention(&config, &layer, &x, &out);
            let y = llama::layer_output(&layer, &saved);
            Ok((saved, y))
        })?;
        let (post_again, _) = timed(|| Ok(llama::post_attention(&config, &layer, &x, &out)))?;

        let mut head = shards.all_gather(world, units.len() - 1, precision)?.into_iter();
        let (norm_weight, head) = (head.next().expect("a norm"), head.next().expect("a head"));
        let rows = LOGIT_ROWS.min(length);
        let targets = ids.narrow(0, 0, rows).reshape([rows, 1]);
        let last = y.clone().narrow(0, 0, rows);
        let mask = Tensor::ones([rows, 1], (&device, FloatDType::F32.into()));
        let (loss, _) = timed(|| {
            let scale = 1.0 / length as f64;
            Ok(llama::loss(&config, &norm_weight, &head, &last, targets.clone(), mask.clone(), scale))
        })?;

        let (post_backward, (_, _, dout)) = timed(|| {
            Ok(llama::post_attention_backward(&config, &layer, &out, post_saved.clone(), y.clone()))
        })?;
        let (attention_backward, dqkv) =
            timed(|| ring::backward(sequence, kernel, &sharding, &dout, &qkv, &out, &lse))?;
        let (pre_backward, _) =
            timed(|| Ok(llama::pre_attention_backward(&layer, &x, pre_saved.clone(), dqkv.clone(), &rope)))?;
        let (reduce, _) = timed(|| shards.reduce_scatter(world, 1, layer.clone().into_parameters()))?;
        let gradients = shards.owned.clone();
        let (adamw, ()) = timed(|| {
            let size = global_norm(world, &gradients)?;
            optimizer.step(world, &mut shards, gradients.clone(), size, 1e-3);
            Ok(())
        })?;
        Ok(vec![
            ("parameters gathered, gradients reduced", layers * (2.0 * gather + reduce)),
            ("norm, q k v, rope", layers * pre),
            ("attention", layers * attention),
            ("projection, MLP", layers * post),
            ("loss, forward and backward", loss * (length as f64 / rows as f64)),
            ("computed again: norm, q k v, rope", layers * pre),
            ("computed again: projection, MLP", layers * post_again),
            ("projection, MLP: backward", layers * post_backward),
            ("attention: backward", layers * attention_backward),
            ("norm, q k v, rope: backward", layers * pre_backward),
            ("clipping, AdamW", adamw),
        ])
    })?
    .swap_remove(0);
    let sum: f64 = segments.iter().map(|(_, seconds)| seconds).sum();
    for (segment, seconds) in segments {
        println!("{segment:40} {seconds:8.4} s {:5.1} %", 100.0 * seconds / sum);
    }
    println!("{:40} {sum:8.4} s", "sum");
    Ok(())
}

//! Measures time and memory of training steps of a small Llama (256 wide, 4 layers, 8/4 heads, vocabulary 2,048), or of the
//! shape in a config.json:
//!
//!     cargo run --release --features libtorch --example step_speed -- DEVICE SEQUENCE_TOKENS f32|bf16
//!         [--keep] [--ranks N] [--steps N] [--config FILE]
//!
//! `--keep` sets recompute = false. Prints a line of JSON: the median step, and the peak memory beside the estimate of
//! `lengthwise plan`. On a GPU it is the memory of all ranks; on a CPU, that of the process less its memory without a model.

use std::time::{Duration, Instant};

use burn_tensor::{FloatDType, Tensor};
use lengthwise_model::backprop::{RankContext, SequenceShard};
use lengthwise_model::comm::threads;
use lengthwise_model::config::Config;
use lengthwise_model::device::DeviceName;
use lengthwise_model::optim::{AdamW, global_norm};
use lengthwise_model::plan::Plan;
use lengthwise_model::ring::Sharding;
use lengthwise_model::shards::{Shards, Unit};
use lengthwise_model::{checkpoint, device};
use serde_json::json;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1)
    };
    let number = |name: &str| option(name)?.parse::<usize>().ok();
    let [name, length, precision] = &arguments[..3] else { return Err("see the top of the file".into()) };
    let name = DeviceName::parse(name)?;
    let length: usize = length.parse()?;
    let precision = if precision == "bf16" { FloatDType::BF16 } else { FloatDType::F32 };
    let recompute = !arguments.iter().any(|argument| argument == "--keep");
    let (ranks, steps) = (number("--ranks").unwrap_or(1), number("--steps").unwrap_or(5));
    let config: Config = match option("--config") {
        Some(file) => serde_json::from_str(&std::fs::read_to_string(file)?)?,
        None => serde_json::from_value(json!({
            "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 2048, "rms_norm_eps": 1e-5,
        }))?,
    };
    let ids: Vec<i32> = (0..length as i64).map(|i| ((i * i * 31 + i * 7) % 2048) as i32).collect();
    let results = threads::run(ranks, ranks, Duration::from_secs(3600), |world, sequence| {
        let device = name.open()?;
        world.barrier()?;
        let mut before = 0;
        if world.rank() == 0 && name.host_device().is_none() {
            before = device::resident_memory().unwrap_or(0);
            // Resets the system's peak counter.
            let _ = std::fs::write("/proc/self/clear_refs", "5");
        }
        let units = Unit::all(&config);
        let read = |i: usize, range| Ok(checkpoint::initial_weights(&units, i, range, 1));
        let mut shards = Shards::new(units.clone(), world, &device, read)?;
        let mut optimizer = AdamW::new(&shards, 0.1);
        let context = RankContext {
            config: config.clone(),
            world,
            sequence,
            device: device.clone(),
            kernel: name.kernel(precision, config.head_dim()),
            precision,
            recompute,
            offload: None,
        };
        let sharding = Sharding::new(sequence.rank(), ranks, length, None);
        let own = sharding.local_rows(&ids, 0);
        let shard = SequenceShard { targets: own.clone(), ids: own, sharding };
        let mut seconds = vec![];
        for _ in 0..steps {
            world.barrier()?;
            let started = Instant::now();
            let mut sums: Vec<Option<Tensor<1>>> = units.iter().map(|_| None).collect();
            context.backprop(&shards, &shard, 1.0 / length as f64, &mut sums)?;
            let gradients: Vec<Tensor<1>> = sums.into_iter().flatten().collect();
            let size = global_norm(world, &gradients)?;
            optimizer.step(world, &mut shards, gradients, size, 1e-3);
            world.barrier()?;
            seconds.push(started.elapsed().as_secs_f64());
        }
        Ok((seconds, name.peak_memory().unwrap_or(0).saturating_sub(before)))
    })?;
    let (mut seconds, memory) = results.into_iter().next().ok_or("no rank")?;
    if seconds.len() > 1 {
        // The first step warms up.
        seconds.remove(0);
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let conf = serde_json::from_value(json!({
        "ranks": ranks, "recompute": recompute, "precision": if precision == FloatDType::BF16 { "bf16" } else { "f32" },
    }))?;
    let planned = Plan::new(&conf, &config, length).total * ranks as u64;
    println!(
        "{}",
        json!({ "tokens": length, "ranks": ranks, "recompute": recompute, "seconds": median,
            "tokens_per_second": length as f64 / median, "megabytes": memory / 1_000_000,
            "planned_megabytes": planned / 1_000_000 })
    );
    Ok(())
}

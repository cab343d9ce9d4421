//! An estimate of what a training needs before it starts: memory per rank, bytes sent, days.

use serde::Serialize;

use crate::backprop::LOGIT_ROWS;
use crate::conf::TrainConf;
use crate::config::Config;
use crate::shards::Unit;
use crate::train::operations_per_token;

/// The needs of a training. Fields are bytes per rank unless stated otherwise.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    pub parameter_count: u64,
    pub ranks: usize,
    pub sequence_ranks: usize,
    pub sequence_tokens: usize,
    /// Sequences per step, over all ranks.
    pub batch: u64,
    pub steps: u64,
    /// The rank's shards of the parameters, in f32.
    pub parameters: u64,
    pub gradients: u64,
    /// AdamW's two moments.
    pub optimizer: u64,
    /// What the forward pass of one sequence keeps for the backward pass.
    pub activations: u64,
    /// Temporary memory: one layer's whole parameters and gradients, its intermediates, and a chunk of the logits.
    pub working: u64,
    pub total: u64,
    /// Bytes that a rank sends per step.
    pub moved: u64,
    /// Floating-point operations of all ranks per step.
    pub operations: f64,
    /// Of all ranks, at `peak_fraction` of their peak.
    pub tokens_per_second: Option<f64>,
    pub days: Option<f64>,
    /// Whether the training fits the device's memory.
    pub fits: Option<bool>,
    /// The longest sequence that fits.
    pub longest: Option<usize>,
}

impl Plan {
    /// The estimate for a model of this config.
    pub fn new(conf: &TrainConf, config: &Config, sequence_tokens: usize) -> Self {
        let mut plan = Self::estimate(conf, config, sequence_tokens);
        if let Some(memory) = conf.device_memory {
            plan.fits = Some(plan.total <= memory);
            // Memory grows with the sequence, so a binary search finds the longest that fits.
            let step = 1024;
            let fits = |thousands: usize| Self::estimate(conf, config, thousands * step).total <= memory;
            let (mut low, mut high) = (0, 1 << 20);
            while low + 1 < high {
                let middle = usize::midpoint(low, high);
                if fits(middle) { low = middle } else { high = middle }
            }
            plan.longest = Some(low * step);
        }
        plan
    }

    fn estimate(conf: &TrainConf, config: &Config, sequence_tokens: usize) -> Self {
        let (ranks, sequence_ranks) = (conf.ranks(), conf.sequence_ranks());
        let width = conf.precision.bytes() as u64;
        let units = Unit::all(config);
        let owned: u64 = units.iter().map(|unit| unit.shard_length(ranks) as u64).sum();
        let count = config.parameter_count();

        let rows = (sequence_tokens.div_ceil(2 * sequence_ranks) * 2) as u64;
        let (d, ff) = (config.hidden_size as u64, config.intermediate_size as u64);
        let q = (config.num_attention_heads * config.head_dim()) as u64;
        let kv = (config.kv_heads() * config.head_dim()) as u64;
        let (heads, layers) = (config.num_attention_heads as u64, config.num_hidden_layers as u64);
        // Kept of a layer: its input, attention and lse. Its intermediates: q k v, two normed rows, the residual, gate, up.
        let kept = rows * ((d + q) * width + heads * 4);
        let intermediates = rows * ((q + 2 * kv + 3 * d + 2 * ff) * width + 8);
        let activations = layers * (kept + if conf.recompute { 0 } else { intermediates });
        let largest = units.iter().map(|unit| unit.length as u64).max().unwrap_or(0);
        // Parameters and gradients in the type of matrix products; gradients also flat in f32, and summed in f32.
        let gathered = largest * (2 * width + 4) + if ranks > 1 { largest * 4 } else { 0 };
        // Either a layer's intermediates and about as much in gradients, or some chunks of logits.
        let vocab = config.vocab_size as u64;
        let logits = (LOGIT_ROWS as u64).min(rows) * vocab * 4;
        let working = gathered + (2 * intermediates).max(4 * logits + 2 * vocab * d * 4);
        let (parameters, gradients, optimizer) = (owned * 4, owned * 4, owned * 8);

        let (n, s) = (ranks as u64, sequence_ranks as u64);
        let batch = conf.batch(sequence_tokens);
        let micro = batch.div_ceil((ranks / sequence_ranks) as u64);
        // Per sequence, parameters are gathered twice and gradients reduced once. Keys and values travel round the ring
        // twice, their gradients once, in f32.
        let shards = if n > 1 { owned * (n - 1) * (2 * width + 4) } else { 0 };
        let ring = if s > 1 { layers * 2 * rows * kv * ((s - 1) * 2 * width + s * 4) } else { 0 };
        let operations = operations_per_token(config, sequence_tokens);
        let steps = conf.steps(sequence_tokens);
        let tokens_per_second =
            conf.peak_tflops.map(|peak| peak * 1e12 * conf.peak_fraction * ranks as f64 / operations);
        let tokens = (steps * batch * sequence_tokens as u64) as f64;
        Self {
            parameter_count: count,
            ranks,
            sequence_ranks,
            sequence_tokens,
            batch,
            steps,
            parameters,
            gradients,
            optimizer,
            activations,
            working,
            total: parameters + gradients + optimizer + activations + working,
            moved: micro * (shards + ring),
            operations: operations * (batch * sequence_tokens as u64) as f64,
            tokens_per_second,
            days: tokens_per_second.map(|speed| tokens / speed / 86_400.0),
            fits: None,
            longest: None,
        }
    }

    /// The estimate as text for a person.
    pub fn text(&self) -> String {
        let bytes = |bytes: u64| match bytes {
            0..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
            1_000_000_000..1_000_000_000_000 => format!("{:.2} GB", bytes as f64 / 1e9),
            _ => format!("{:.2} TB", bytes as f64 / 1e12),
        };
        let mut lines = vec![
            format!(
                "training: {:.3} B parameters, {} rank{} ({} a sequence), {} sequences of {} tokens a step, {} steps",
                self.parameter_count as f64 / 1e9,
                self.ranks,
                if self.ranks == 1 { "" } else { "s" },
                self.sequence_ranks,
                self.batch,
                self.sequence_tokens,
                self.steps
            ),
            format!(
                "  a rank's memory: {} = parameters {} + gradients {} + optimizer {} + activations {} + working set {}",
                bytes(self.total),
                bytes(self.parameters),
                bytes(self.gradients),
                bytes(self.optimizer),
                bytes(self.activations),
                bytes(self.working)
            ),
            format!(
                "  a step: {} sent by a rank, {:.3} × 10¹⁵ operations in all",
                bytes(self.moved),
                self.operations / 1e15
            ),
        ];
        match (self.tokens_per_second, self.days) {
            (Some(speed), Some(days)) => {
                lines.push(format!("  at the fraction of the peak: {speed:.0} tokens/s, {days:.2} days"));
            }
            _ => lines.push("  set train.peak_tflops for tokens/s and days".into()),
        }
        match (self.fits, self.longest) {
            (Some(fits), Some(longest)) => lines.push(format!(
                "  it {} the device's memory; the longest sequence that does has {longest} tokens",
                if fits { "fits" } else { "does not fit" }
            )),
            _ => lines.push("  set train.device_memory to be told whether it fits".into()),
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Llama 2, 7B.
    fn llama() -> Config {
        serde_json::from_value(json!({
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "vocab_size": 32000, "rms_norm_eps": 1e-5,
        }))
        .unwrap()
    }

    fn conf(ranks: usize) -> TrainConf {
        serde_json::from_value(json!({
            "checkpoint": "x", "tokens": "10B", "batch_tokens": "4M", "precision": "bf16", "ranks": ranks,
            "peak_tflops": 312.0, "peak_fraction": 0.49, "device_memory": 80_000_000_000u64,
        }))
        .unwrap()
    }

    /// Table 2 of the paper: 10 days for 10 B tokens at 80K on 8 A100s, at 49 % of their peak.
    #[test]
    fn the_paper_s_7b_run_takes_the_paper_s_days() {
        let plan = Plan::new(&conf(8), &llama(), 81_920);
        assert_eq!(plan.parameter_count, 6_738_415_616);
        let days = plan.days.unwrap();
        assert!((9.5..10.5).contains(&days), "{days}");
        assert_eq!(plan.fits, Some(true), "{}", plan.text());
        assert!(plan.longest.unwrap() > 131_072, "{}", plan.text());
    }

    #[test]
    fn more_ranks_need_less_each_and_longer_sequences_more() {
        let total = |ranks, tokens| Plan::new(&conf(ranks), &llama(), tokens).total;
        assert!(total(1, 81_920) > 2 * total(4, 81_920) && total(4, 81_920) > total(8, 81_920));
        assert!(total(8, 81_920) > total(8, 8_192));
        let plan = Plan::new(&conf(8), &llama(), 81_920);
        let longest = plan.longest.unwrap();
        let device = conf(8).device_memory.unwrap();
        assert!(total(8, longest) <= device && total(8, longest + 1024) > device);
        let (recompute, mut keep) = (plan.activations, conf(8));
        keep.recompute = false;
        assert!(Plan::new(&keep, &llama(), 81_920).activations > 3 * recompute);
    }
}

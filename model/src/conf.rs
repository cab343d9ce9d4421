//! The conf's `[train]` table.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

use burn_tensor::FloatDType;

use crate::amount::{Count, Size};
use crate::config::Config;
use crate::device::DeviceName;
use crate::{Error, Result};

/// Training: a checkpoint is trained further, or a fresh model is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainConf {
    /// The folder of a Hugging Face Llama that is trained further. Set this, or `shape`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<Shape>,
    /// How many steps the training has. Set this, or `tokens`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// How many tokens the training reads. The last step may go beyond.
    #[serde(default, deserialize_with = "count", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Count>")]
    pub tokens: Option<u64>,
    /// The learning rate after the warm-up. The default is the paper's (§4).
    #[serde(default = "default_rate")]
    pub learning_rate: f64,
    #[serde(default)]
    pub schedule: Schedule,
    /// In how many steps the learning rate rises from zero.
    #[serde(default)]
    pub warmup_steps: u64,
    /// How many tokens a step has, rounded to whole sequences. By default, those of one sequence. The paper's steps have 4M.
    #[serde(default, deserialize_with = "count", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Count>")]
    pub batch_tokens: Option<u64>,
    /// AdamW's weight decay.
    #[serde(default = "default_decay")]
    pub weight_decay: f64,
    /// The base of RoPE. By default, the checkpoint's. The paper's runs raise it (§4).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// RoPE's scaling, as in `config.json`. By default, the checkpoint's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Map<String, Value>>")]
    pub rope_scaling: Option<Value>,
    /// Whether attention stays within documents. Positions then begin anew in each. The paper does without (§4).
    #[serde(default)]
    pub document_mask: bool,
    #[serde(default)]
    pub precision: Precision,
    /// Whether the backward pass computes the insides of a layer again. Otherwise the forward pass keeps them in memory.
    #[serde(default = "yes")]
    pub recompute: bool,
    /// Whether what the forward pass keeps is moved to the host's memory until it is needed.
    #[serde(default)]
    pub offload: bool,
    /// Whether GPUs use only kernels that add up in a fixed order, which is slower. A training that was stopped then has the
    /// same losses, to the last bit, as one that was not. CPUs always do so.
    #[serde(default)]
    pub deterministic: bool,
    /// The devices: `["flex"]`, `["libtorch-cpu"]`, or `["libtorch-cuda:0", …]` with one rank each.
    #[serde(default = "default_devices")]
    pub devices: Vec<String>,
    /// How many ranks there are. By default, one for each device. More are needed where several share a device, or where
    /// there are several machines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<usize>,
    /// How many ranks share a sequence. By default, all of them. With fewer, groups of ranks read different sequences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence_ranks: Option<usize>,
    /// How many steps are between checkpoints. By default, a checkpoint is written only at the end and at a stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_every: Option<u64>,
    /// The most that a device can do, in 10¹² operations a second. The log then says what fraction of it is reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_tflops: Option<f64>,
    /// The fraction of `peak_tflops` that `lengthwise plan` counts on.
    #[serde(default = "default_fraction")]
    pub peak_fraction: f64,
    /// The memory of a device. `lengthwise plan` then says whether the training fits.
    #[serde(default, deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Size>")]
    pub device_memory: Option<u64>,
    /// The seed of a fresh model's weights.
    #[serde(default)]
    pub seed: u64,
}

/// The shape of a fresh model, if there is no checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// The width of a token's state.
    pub hidden_size: usize,
    /// The width inside the feed-forward part of a layer.
    pub intermediate_size: usize,
    /// How many layers the model has.
    pub layers: usize,
    /// How many attention heads a layer has.
    pub heads: usize,
    /// How many heads keys and values have. By default, as many as `heads`.
    #[serde(default)]
    pub kv_heads: Option<usize>,
    /// Whether the embedding and the output share their weights.
    #[serde(default)]
    pub tied: bool,
}

/// What the learning rate does after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// It stays as it is: the paper's way (§4).
    #[default]
    Constant,
    /// It falls to a tenth at the last step, as a cosine does.
    Cosine,
}

/// The type of number that matrices are multiplied in. Parameters, sums of gradients and the optimizer are f32 either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    #[default]
    F32,
    Bf16,
}

impl Precision {
    /// Bytes per number.
    pub fn bytes(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        }
    }
}

impl std::str::FromStr for Precision {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "f32" => Ok(Precision::F32),
            "bf16" => Ok(Precision::Bf16),
            _ => Err("it has to be f32 or bf16".into()),
        }
    }
}

impl From<Precision> for FloatDType {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => FloatDType::F32,
            Precision::Bf16 => FloatDType::BF16,
        }
    }
}

fn default_rate() -> f64 {
    2e-5
}

fn default_decay() -> f64 {
    0.1
}

fn yes() -> bool {
    true
}

fn default_devices() -> Vec<String> {
    vec!["flex".into()]
}

fn default_fraction() -> f64 {
    0.4
}

fn bytes<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    Size::deserialize(from).map(|Size(bytes)| Some(bytes))
}

fn count<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    Count::deserialize(from).map(|Count(tokens)| Some(tokens))
}

impl TrainConf {
    /// Checks the table, before anything is computed.
    pub fn check(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::Conf(format!("train{message}")));
        match (&self.checkpoint, &self.shape) {
            (None, None) => return wrong(": set `checkpoint`, or `shape` for a new model".into()),
            (Some(_), Some(_)) => {
                let message = ": `checkpoint` has a shape of its own; set one of `checkpoint` and `shape`";
                return wrong(message.into());
            }
            _ => {}
        }
        match (self.steps, self.tokens) {
            (None, None) => return wrong(": set `steps` or `tokens`".into()),
            (Some(_), Some(_)) => return wrong(": set one of `steps` and `tokens`".into()),
            (Some(0), _) | (_, Some(0)) => return wrong(": `steps` or `tokens` has to be at least 1".into()),
            _ => {}
        }
        for (key, value) in [
            ("learning_rate", Some(self.learning_rate)),
            ("rope_theta", self.rope_theta),
            ("peak_tflops", self.peak_tflops),
            ("peak_fraction", Some(self.peak_fraction)),
        ] {
            if value.is_some_and(|value| !(value.is_finite() && value > 0.0)) {
                return wrong(format!(".{key} has to be a positive number"));
            }
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return wrong(".weight_decay has to be a number, 0 or more".into());
        }
        if self.checkpoint_every == Some(0) {
            return wrong(".checkpoint_every has to be at least 1; leave it out for none".into());
        }
        if let Some(scaling) = &self.rope_scaling {
            let probe = json!({
                "hidden_size": 2, "intermediate_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1,
                "vocab_size": 1, "rope_scaling": scaling,
            });
            let probe: Config =
                serde_json::from_value(probe).map_err(|e| Error::Conf(format!("train: {e}")))?;
            probe.scaling().map_err(|e| Error::Conf(format!("train.{e}")))?;
        }
        let names = self.device_names()?;
        let (ranks, devices) = (self.ranks(), names.len());
        if devices == 0 {
            return wrong(".devices is empty; name one, such as \"flex\"".into());
        }
        if ranks == 0 || !ranks.is_multiple_of(devices) {
            return wrong(format!(
                ".ranks is {ranks} with {devices} devices; it has to be a multiple of the number of devices"
            ));
        }
        if self.sequence_ranks() == 0 || !ranks.is_multiple_of(self.sequence_ranks()) {
            let shared = self.sequence_ranks();
            return wrong(format!(".sequence_ranks is {shared}, which does not divide {ranks} ranks"));
        }
        if self.offload && names.iter().any(|name| name.host_device().is_none()) {
            return wrong(
                ".offload is for devices with a memory of their own, such as \"libtorch-cuda:0\"".into(),
            );
        }
        if self.offload && !self.recompute {
            return wrong(
                ".offload moves only what `recompute = true` keeps, so that has to be set, too".into(),
            );
        }
        Ok(())
    }

    /// Checks that the named devices exist.
    pub fn available(&self) -> Result<()> {
        self.device_names()?.into_iter().try_for_each(|name| name.open().map(drop))
    }

    /// The named devices.
    pub fn device_names(&self) -> Result<Vec<DeviceName>> {
        self.devices.iter().map(|name| DeviceName::parse(name)).collect()
    }

    /// The device of a rank, by its local rank.
    pub fn device_of(&self, local: usize) -> Result<DeviceName> {
        let names = self.device_names()?;
        names
            .get(local % names.len().max(1))
            .copied()
            .ok_or_else(|| Error::Conf("train.devices is empty".into()))
    }

    pub fn ranks(&self) -> usize {
        self.ranks.unwrap_or(self.devices.len())
    }

    pub fn sequence_ranks(&self) -> usize {
        self.sequence_ranks.unwrap_or(self.ranks())
    }

    /// Sequences per step.
    pub fn batch(&self, sequence_tokens: usize) -> u64 {
        let whole = |tokens: u64| (tokens as f64 / sequence_tokens as f64).round().max(1.0) as u64;
        self.batch_tokens.map_or(1, whole)
    }

    /// The number of steps. The last one may exceed `tokens`.
    pub fn steps(&self, sequence_tokens: usize) -> u64 {
        let step = self.batch(sequence_tokens) * sequence_tokens as u64;
        self.steps.unwrap_or_else(|| self.tokens.unwrap_or(0).div_ceil(step))
    }

    /// The settings that determine the trained model, without those for devices, speed and memory.
    pub fn content(&self) -> Value {
        let mut settings = json!(self);
        if let Some(settings) = settings.as_object_mut() {
            for key in [
                "checkpoint",
                "devices",
                "ranks",
                "sequence_ranks",
                "recompute",
                "offload",
                "deterministic",
                "checkpoint_every",
                "peak_tflops",
                "peak_fraction",
                "device_memory",
            ] {
                settings.remove(key);
            }
        }
        settings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(extra: Value) -> TrainConf {
        let mut all = json!({
            "shape": { "hidden_size": 16, "intermediate_size": 32, "layers": 2, "heads": 4 }, "steps": 30,
        });
        for (key, value) in extra.as_object().unwrap() {
            all[key] = value.clone();
        }
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn a_train_table_that_makes_no_sense_says_why() {
        for (extra, message) in [
            (json!({ "devices": ["cuda:0"] }), "there is no device `cuda:0`; there are \"flex\""),
            (json!({ "devices": [] }), "train.devices is empty"),
            (json!({ "devices": ["flex", "flex"], "ranks": 3 }), "train.ranks is 3 with 2 devices"),
            (
                json!({ "devices": ["libtorch-cuda:0"], "offload": true, "recompute": false }),
                "train.offload moves",
            ),
            (json!({ "ranks": 6, "sequence_ranks": 4 }), "4, which does not divide 6 ranks"),
            (json!({ "checkpoint": "x" }), "set one of `checkpoint` and `shape`"),
            (json!({ "shape": null }), "set `checkpoint`, or `shape`"),
            (json!({ "steps": 0 }), "at least 1"),
            (json!({ "tokens": "1M" }), "set one of `steps` and `tokens`"),
            (json!({ "steps": null }), "set `steps` or `tokens`"),
            (json!({ "learning_rate": -1.0 }), "train.learning_rate"),
            (json!({ "weight_decay": -1.0 }), "train.weight_decay"),
            (json!({ "checkpoint_every": 0 }), "train.checkpoint_every"),
            (json!({ "offload": true }), "train.offload is for devices"),
            (json!({ "rope_scaling": { "type": "yarn" } }), "train.rope_scaling: type `yarn` needs `factor`"),
        ] {
            let error = conf(extra).check().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        conf(json!({})).check().unwrap();
    }

    #[test]
    fn tokens_are_rounded_to_sequences_and_steps() {
        assert_eq!(conf(json!({ "batch_tokens": "4M" })).batch(81_920), 49);
        assert_eq!(conf(json!({ "batch_tokens": "1.5K" })).batch(8_192), 1);
        let paper = conf(json!({ "batch_tokens": 4_194_304, "tokens": "5B", "steps": null }));
        assert_eq!((paper.batch(131_072), paper.steps(131_072)), (32, 1193));
    }

    #[test]
    fn amounts_are_written_as_everywhere_in_a_conf() {
        for (text, bytes) in
            [("80G", 80_000_000_000), ("80GB", 80_000_000_000), ("1.5 GiB", 3 << 29), ("7_000", 7000)]
        {
            assert_eq!(conf(json!({ "device_memory": text })).device_memory, Some(bytes), "{text}");
        }
        for (text, tokens) in [("1.5B", 1_500_000_000), ("4 M", 4_000_000), ("65_536", 65_536)] {
            let conf = conf(json!({ "tokens": text, "steps": null }));
            assert_eq!(conf.tokens, Some(tokens), "{text}");
        }
        let wrong: Result<TrainConf, _> =
            serde_json::from_value(json!({ "steps": 1, "device_memory": "80T" }));
        let wrong = wrong.unwrap_err().to_string();
        assert!(wrong.contains("\"80T\" has a unit that is not known here"), "{wrong}");
    }

    #[test]
    fn a_plan_may_name_devices_that_only_another_build_has() {
        let gpus = conf(json!({ "devices": ["libtorch-cuda:0", "libtorch-cuda:1"], "offload": true }));
        gpus.check().unwrap();
        let refused = gpus.available().err().map(|e| e.to_string());
        let lacking = "`libtorch-cuda:0` needs LibTorch, and this build is without";
        assert_eq!(refused.is_some_and(|text| text.contains(lacking)), cfg!(not(feature = "libtorch")));
    }

    #[test]
    fn devices_and_ranks_are_no_content() {
        let more = conf(json!({ "ranks": 4, "recompute": false, "checkpoint_every": 7 }));
        assert_eq!(more.content(), conf(json!({})).content());
        assert_ne!(conf(json!({ "precision": "bf16" })).content(), conf(json!({})).content());
    }
}

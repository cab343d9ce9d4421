//! `config.json` of a Hugging Face Llama: the keys on which the computation depends.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// The keys of `config.json` that are used. Others are dropped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    #[serde(default)]
    pub head_dim: Option<usize>,
    pub vocab_size: usize,
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    #[serde(default)]
    pub rope_theta: Option<f64>,
    /// RoPE's scaling as transformers 4 writes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<Value>,
    /// RoPE's theta and scaling as transformers 5 writes them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<Value>,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// The default is that of transformers.
    #[serde(default = "default_positions")]
    pub max_position_embeddings: usize,
    #[serde(default)]
    pub bos_token_id: Option<Value>,
    #[serde(default)]
    pub eos_token_id: Option<Value>,
    /// `eos_token_id` of the `generation_config.json` beside it, which replaces the key above; null if it has none. `None`
    /// if there is no such file.
    #[serde(skip)]
    pub generation_eos: Option<Value>,
}

fn default_eps() -> f64 {
    1e-6
}

fn default_positions() -> usize {
    2048
}

/// How RoPE's frequencies are scaled for positions beyond the pretraining length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    None,
    /// All frequencies are divided by one factor (position interpolation).
    Linear {
        factor: f64,
    },
    /// The base grows with the sequence length (dynamic NTK).
    Dynamic {
        factor: f64,
    },
    /// High frequencies stay and low ones are interpolated, with a ramp between (YaRN, Peng et al. 2023).
    Yarn {
        factor: f64,
        attention_factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original_positions: f64,
        truncate: bool,
    },
    /// Llama 3.1's scaling.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_positions: f64,
    },
}

impl Config {
    pub fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Parses a `config.json` as `transformers` does: a null counts as a missing key.
    ///
    /// # Errors
    /// The error names the key that is wrong or not supported.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let wrong = |message: String| Error::Conf(message);
        let mut file: Map<String, Value> = serde_json::from_slice(json).map_err(|e| wrong(e.to_string()))?;
        file.retain(|_, value| !value.is_null());
        let is = |key: &str, supported: &[&str]| match file.get(key) {
            Some(value) if value.as_str().is_none_or(|value| !supported.contains(&value)) => {
                Err(wrong(format!("{key} is {value}; {} is supported", supported[0])))
            }
            _ => Ok(()),
        };
        is("model_type", &["llama"])?;
        // Both name the same function.
        is("hidden_act", &["silu", "swish"])?;
        for key in ["attention_bias", "mlp_bias"] {
            if file.get(key).is_some_and(|value| *value != Value::Bool(false)) {
                return Err(wrong(format!("{key} is {}; false is supported", file[key])));
            }
        }
        let tables = ["rope_scaling", "rope_parameters"].map(|key| file.get(key).and_then(Value::as_object));
        for table in [Some(&file)].into_iter().chain(tables).flatten() {
            let key = "partial_rotary_factor";
            let part = table.get(key).filter(|part| !part.is_null());
            if part.is_some_and(|part| part.as_f64() != Some(1.0)) {
                return Err(wrong(format!("{key} is {}; 1.0 is supported", table[key])));
            }
        }
        let config: Self = serde_json::from_value(Value::Object(file)).map_err(|e| wrong(e.to_string()))?;
        config.check()?;
        Ok(config)
    }

    /// The end-of-text id, or a list of ids, as the file has it.
    pub fn eos(&self) -> Option<&Value> {
        self.generation_eos.as_ref().or(self.eos_token_id.as_ref()).filter(|end| !end.is_null())
    }

    /// The end-of-text ids.
    pub fn eos_ids(&self) -> Vec<i64> {
        match self.eos() {
            Some(Value::Array(several)) => several.iter().filter_map(Value::as_i64).collect(),
            Some(one) => one.as_i64().into_iter().collect(),
            None => vec![],
        }
    }

    /// The base of RoPE.
    pub fn theta(&self) -> f64 {
        let newer = self.scaling_table().and_then(|table| table.get("rope_theta")?.as_f64());
        newer.or(self.rope_theta).unwrap_or(10_000.0)
    }

    /// Sets the base of RoPE, under whichever keys the file has it.
    pub fn set_theta(&mut self, theta: f64) {
        self.rope_theta = Some(theta);
        for table in [&mut self.rope_scaling, &mut self.rope_parameters].into_iter().flatten() {
            // An empty table counts as none.
            if let Some(keys) = table.as_object_mut().filter(|keys| !keys.is_empty()) {
                keys.insert("rope_theta".to_owned(), theta.into());
            }
        }
    }

    /// Sets RoPE's scaling, under whichever keys the file has it.
    pub fn set_scaling(&mut self, scaling: Value) {
        let theta = self.theta();
        if self.rope_parameters.is_some() {
            self.rope_parameters = Some(scaling.clone());
        }
        self.rope_scaling = Some(scaling);
        self.set_theta(theta);
    }

    /// The table with RoPE's scaling, and its key. If a file has both, `transformers` reads the older one.
    fn rope_table(&self) -> Option<(&'static str, &Value)> {
        let tables = [("rope_scaling", &self.rope_scaling), ("rope_parameters", &self.rope_parameters)];
        let mut there = tables.into_iter().filter_map(|(key, table)| Some((key, table.as_ref()?)));
        there.find(|(_, table)| !table.is_null() && table.as_object().is_none_or(|keys| !keys.is_empty()))
    }

    /// The table with RoPE's scaling, under whichever key the file has it.
    pub fn scaling_table(&self) -> Option<&Value> {
        self.rope_table().map(|(_, table)| table)
    }

    /// RoPE's scaling.
    ///
    /// # Errors
    /// The error names the key that is missing or wrong, or the type that is not supported.
    pub fn scaling(&self) -> Result<Scaling> {
        let Some((key, table)) = self.rope_table() else { return Ok(Scaling::None) };
        let wrong = |message: String| Error::Conf(format!("{key}: {message}"));
        let kind = table.get("rope_type").or_else(|| table.get("type")).and_then(Value::as_str);
        let optional = |name: &str| match table.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
                _ => Err(wrong(format!("`{name}` has to be a positive number, not {value}"))),
            },
        };
        // transformers treats a 0 here as missing.
        let if_not_zero = |name: &str| match table.get(name).and_then(Value::as_f64) {
            Some(0.0) => Ok(None),
            _ => optional(name),
        };
        let needed = |name: &str| match optional(name)? {
            Some(number) => Ok(number),
            None => Err(wrong(format!("type `{}` needs `{name}`", kind.unwrap_or_default()))),
        };
        let positions = self.max_position_embeddings as f64;
        Ok(match kind {
            None if !table.is_object() => return Err(wrong(format!("{table} is no table"))),
            None | Some("default") => Scaling::None,
            Some("linear") => Scaling::Linear { factor: needed("factor")? },
            Some("dynamic") => Scaling::Dynamic { factor: needed("factor")? },
            Some("yarn") => {
                let factor = needed("factor")?;
                // The paper's 0.1 ln(s) + 1, and DeepSeek's ratio of two such terms.
                let mscale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
                let attention_factor = match (
                    optional("attention_factor")?,
                    if_not_zero("mscale")?,
                    if_not_zero("mscale_all_dim")?,
                ) {
                    (Some(given), ..) => given,
                    (None, Some(some), Some(all)) => mscale(some) / mscale(all),
                    _ => mscale(1.0),
                };
                Scaling::Yarn {
                    factor,
                    attention_factor,
                    beta_fast: if_not_zero("beta_fast")?.unwrap_or(32.0),
                    beta_slow: if_not_zero("beta_slow")?.unwrap_or(1.0),
                    original_positions: if_not_zero("original_max_position_embeddings")?.unwrap_or(positions),
                    // A null counts as false.
                    truncate: table.get("truncate").is_none_or(|truncate| truncate == true),
                }
            }
            Some("llama3") => Scaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: needed("high_freq_factor")?,
                original_positions: needed("original_max_position_embeddings")?,
            },
            Some(other) => {
                return Err(wrong(format!(
                    "type `{other}` is not supported; default, linear, dynamic, yarn and llama3 are"
                )));
            }
        })
    }

    /// Checks that a text's ids are in the vocabulary.
    pub fn check_ids(&self, ids: &[i32]) -> Result<()> {
        let vocab = self.vocab_size;
        match ids.iter().find(|id| usize::try_from(**id).map_or(true, |id| id >= vocab)) {
            None => Ok(()),
            Some(id) => Err(Error::Conf(format!(
                "id {id} of a text is not in the model's vocabulary of {vocab}; is it the model's own tokenizer?"
            ))),
        }
    }

    /// Checks that the sizes are consistent.
    pub fn check(&self) -> Result<()> {
        let (heads, kv) = (self.num_attention_heads, self.kv_heads());
        let sizes =
            [self.hidden_size, self.intermediate_size, self.num_hidden_layers, self.vocab_size, heads, kv];
        let wrong = if sizes.contains(&0) {
            "no size may be 0".to_owned()
        } else if heads % kv != 0 {
            format!("{heads} heads can't be shared by {kv} key/value heads")
        } else if self.head_dim.is_none() && !self.hidden_size.is_multiple_of(heads) {
            format!("hidden_size {} is not divisible by {heads} heads", self.hidden_size)
        } else if !self.head_dim().is_multiple_of(2) {
            format!("a head of {} can't be rotated; it has to be even", self.head_dim())
        } else {
            return self.scaling().map(drop);
        };
        Err(Error::Conf(wrong))
    }

    /// The sharding units: the embedding, each layer, and the final norm with the head. Each lists the names, as in Hugging
    /// Face's checkpoints, and the shapes of its parameters, norms first. Norms are stored as `[hidden_size]` and computed
    /// with as `[1, hidden_size]`.
    pub fn units(&self) -> Vec<Vec<(String, [usize; 2])>> {
        let (d, ff, hd) = (self.hidden_size, self.intermediate_size, self.head_dim());
        let (q, kv) = (self.num_attention_heads * hd, self.kv_heads() * hd);
        let embed = vec![("model.embed_tokens.weight".to_owned(), [self.vocab_size, d])];
        let layer = |i: usize| {
            let named = |(name, shape): (&str, _)| (format!("model.layers.{i}.{name}.weight"), shape);
            let parts = [
                ("input_layernorm", [1, d]),
                ("post_attention_layernorm", [1, d]),
                ("self_attn.q_proj", [q, d]),
                ("self_attn.k_proj", [kv, d]),
                ("self_attn.v_proj", [kv, d]),
                ("self_attn.o_proj", [d, q]),
                ("mlp.gate_proj", [ff, d]),
                ("mlp.up_proj", [ff, d]),
                ("mlp.down_proj", [d, ff]),
            ];
            parts.into_iter().map(named).collect()
        };
        let mut last = vec![("model.norm.weight".to_owned(), [1, d])];
        if !self.tie_word_embeddings {
            last.push(("lm_head.weight".to_owned(), [self.vocab_size, d]));
        }
        [embed].into_iter().chain((0..self.num_hidden_layers).map(layer)).chain([last]).collect()
    }

    /// The names and shapes of all parameters, unit by unit.
    pub fn parameters(&self) -> Vec<(String, [usize; 2])> {
        self.units().into_iter().flatten().collect()
    }

    /// The number of parameters.
    pub fn parameter_count(&self) -> u64 {
        self.parameters().iter().map(|(_, [rows, columns])| (rows * columns) as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(extra: Value) -> Config {
        let mut all = json!({
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9,
        });
        for (key, value) in extra.as_object().unwrap() {
            all[key] = value.clone();
        }
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn theta_and_scaling_are_read_from_the_keys_of_transformers_4_and_5() {
        let four = config(json!({ "rope_theta": 5e5, "rope_scaling": { "type": "linear", "factor": 4.0 } }));
        let five = config(json!({
            "rope_parameters": { "rope_theta": 5e5, "rope_type": "linear", "factor": 4.0 },
        }));
        for config in [four, five] {
            assert_eq!((config.theta(), config.scaling().unwrap()), (5e5, Scaling::Linear { factor: 4.0 }));
        }
        assert_eq!(config(json!({ "rope_scaling": null })).scaling().unwrap(), Scaling::None);
    }

    /// Parses a small config with extra keys.
    fn parsed(extra: Value) -> Result<Config> {
        let mut all = json!({
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 9,
        });
        for (key, value) in extra.as_object().unwrap() {
            all[key] = value.clone();
        }
        Config::parse(all.to_string().as_bytes())
    }

    #[test]
    fn a_file_is_read_as_transformers_reads_it() {
        let plain = parsed(json!({})).unwrap();
        for extra in [
            json!({ "partial_rotary_factor": 1 }),
            json!({ "partial_rotary_factor": 1.0, "attention_bias": false, "mlp_bias": false, "pretraining_tp": 1 }),
            json!({ "rope_parameters": null, "rope_scaling": null, "sliding_window": null, "head_dim": null }),
            json!({ "tie_word_embeddings": null, "attention_bias": null, "mlp_bias": null, "rms_norm_eps": null }),
            json!({ "num_key_value_heads": null, "max_position_embeddings": null, "rope_theta": null }),
            json!({ "hidden_act": "swish" }),
            json!({ "hidden_act": null, "partial_rotary_factor": null, "eos_token_id": null }),
        ] {
            assert_eq!(parsed(extra.clone()).unwrap(), plain, "{extra}");
        }
        assert_eq!(parsed(json!({ "rope_theta": 500_000, "rms_norm_eps": 1 })).unwrap().theta(), 5e5);
        for (extra, message) in [
            (json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor is 0.5; 1.0 is supported"),
            (
                json!({ "rope_parameters": { "rope_type": "default", "partial_rotary_factor": 0.5 } }),
                "partial_rotary_factor is 0.5; 1.0 is supported",
            ),
            (json!({ "attention_bias": true }), "attention_bias is true; false is supported"),
            (json!({ "hidden_act": "gelu" }), "hidden_act is \"gelu\"; silu is supported"),
            (json!({ "model_type": "gpt2" }), "model_type is \"gpt2\"; llama is supported"),
            (json!({ "rope_scaling": "linear" }), "rope_scaling: \"linear\" is no table"),
            (json!({ "hidden_size": "16" }), "invalid type: string \"16\""),
        ] {
            let error = parsed(extra).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn of_two_tables_of_rope_the_one_that_transformers_reads_counts() {
        // transformers 5.24 reads them so; 4.57, too, except for the last.
        for (extra, theta, factor) in [
            (
                json!({ "rope_theta": 5e5, "rope_parameters": { "rope_type": "linear", "factor": 2.0 } }),
                5e5,
                2.0,
            ),
            (
                json!({
                    "rope_theta": 5e5, "rope_scaling": { "rope_type": "linear", "factor": 2.0 },
                    "rope_parameters": { "rope_type": "linear", "factor": 3.0, "rope_theta": 1e6 },
                }),
                5e5,
                2.0,
            ),
            (
                json!({ "rope_scaling": {}, "rope_parameters": { "rope_type": "linear", "factor": 3.0, "rope_theta": 1e6 } }),
                1e6,
                3.0,
            ),
            (
                json!({ "rope_theta": 5e5, "rope_scaling": { "rope_type": "linear", "factor": 2.0, "rope_theta": 7e5 } }),
                7e5,
                2.0,
            ),
        ] {
            let mut config = parsed(extra).unwrap();
            assert_eq!((config.theta(), config.scaling().unwrap()), (theta, Scaling::Linear { factor }));
            config.set_theta(8e5);
            assert_eq!((config.theta(), config.scaling().unwrap()), (8e5, Scaling::Linear { factor }));
            config.set_scaling(json!({ "rope_type": "linear", "factor": 9 }));
            assert_eq!((config.theta(), config.scaling().unwrap()), (8e5, Scaling::Linear { factor: 9.0 }));
        }
    }

    #[test]
    fn what_yarn_may_leave_open_is_as_in_transformers() {
        let yarn = |extra: Value| {
            let mut table =
                json!({ "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 512 });
            for (key, value) in extra.as_object().unwrap() {
                table[key] = value.clone();
            }
            config(json!({ "rope_scaling": table })).scaling()
        };
        let plain = yarn(json!({})).unwrap();
        assert_eq!(
            plain,
            Scaling::Yarn {
                factor: 4.0,
                attention_factor: 0.1 * 4f64.ln() + 1.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                original_positions: 512.0,
                truncate: true,
            }
        );
        for extra in [
            json!({ "mscale": 0.0, "mscale_all_dim": 0.0 }),
            json!({ "mscale": 0, "mscale_all_dim": 1.0 }),
            json!({ "mscale": 1.0 }),
            json!({ "beta_fast": null, "beta_slow": 0, "attention_factor": null }),
        ] {
            assert_eq!(yarn(extra.clone()).unwrap(), plain, "{extra}");
        }
        let Scaling::Yarn { attention_factor, .. } =
            yarn(json!({ "mscale": 1, "mscale_all_dim": 1 })).unwrap()
        else {
            panic!()
        };
        assert_eq!(attention_factor, 1.0);
        assert!(matches!(yarn(json!({ "truncate": null })).unwrap(), Scaling::Yarn { truncate: false, .. }));
        assert!(yarn(json!({ "attention_factor": 0.0 })).is_err());
    }

    #[test]
    fn a_scaling_that_cannot_be_computed_is_named() {
        for (scaling, message) in [
            (
                json!({ "type": "longrope" }),
                "rope_scaling: type `longrope` is not supported; default, linear",
            ),
            (json!({ "rope_type": "yarn" }), "type `yarn` needs `factor`"),
            (json!({ "rope_type": "linear", "factor": -1 }), "`factor` has to be a positive number, not -1"),
            (json!({ "rope_type": "llama3", "factor": 8 }), "type `llama3` needs `low_freq_factor`"),
        ] {
            let error = config(json!({ "rope_scaling": scaling })).check().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn sizes_that_do_not_go_together_are_named() {
        for (sizes, message) in [
            (json!({ "num_key_value_heads": 0 }), "no size may be 0"),
            (json!({ "num_attention_heads": 4, "num_key_value_heads": 3 }), "4 heads can't be shared by 3"),
            (json!({ "num_attention_heads": 3 }), "hidden_size 16 is not divisible by 3 heads"),
            (json!({ "head_dim": 5 }), "a head of 5 can't be rotated"),
        ] {
            let error = config(sizes).check().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}

//! Checkpoints in Hugging Face's layout: `config.json` and safetensors, in one file or in several with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::conf::Precision;
use crate::config::{Config, Scaling};
use crate::shards::Unit;
use crate::tensors::{Reader, Writer};
use crate::{Error, Location, Result, Written};

const INDEX: &str = "model.safetensors.index.json";

/// The file with the settings for generation, such as the end-of-text ids.
const GENERATION: &str = "generation_config.json";

/// A file that is written has at most this many numbers, unless a single unit has more.
const MAX_NUMBERS_PER_FILE: usize = 1 << 30;

/// The names of a checkpoint's files.
pub async fn checkpoint_parts(folder: &Location) -> Result<Vec<String>> {
    let mut parts = vec!["config.json".to_owned()];
    if folder.join(GENERATION).get().await?.is_some() {
        parts.push(GENERATION.to_owned());
    }
    match folder.join(INDEX).get().await? {
        Some(index) => {
            parts.push(INDEX.to_owned());
            parts.extend(indexed_files(folder, &index)?);
        }
        None => parts.push("model.safetensors".to_owned()),
    }
    Ok(parts)
}

fn wrong(folder: &Location, message: String) -> Error {
    Error::Checkpoint { at: folder.url(), message }
}

/// The files that an index names.
fn indexed_files(folder: &Location, index: &[u8]) -> Result<BTreeSet<String>> {
    let index: Value = serde_json::from_slice(index).map_err(|e| wrong(folder, format!("{INDEX}: {e}")))?;
    let map =
        index["weight_map"].as_object().ok_or_else(|| wrong(folder, format!("{INDEX} has no weight_map")))?;
    Ok(map.values().filter_map(|file| file.as_str().map(str::to_owned)).collect())
}

/// Reads the config of a checkpoint in Hugging Face's layout.
///
/// # Errors
/// There is none, or its model is not supported.
pub async fn read_config(folder: &Location) -> Result<Config> {
    let config = folder.join("config.json").get().await?;
    let config = config.ok_or_else(|| wrong(folder, "there is no config.json".into()))?;
    let mut config = Config::parse(&config).map_err(|e| wrong(folder, format!("config.json: {e}")))?;
    if let Some(generation) = folder.join(GENERATION).get().await? {
        let generation: Value =
            serde_json::from_slice(&generation).map_err(|e| wrong(folder, format!("{GENERATION}: {e}")))?;
        // transformers ignores config.json then, even if this file has no such key.
        config.generation_eos = Some(generation["eos_token_id"].clone());
    }
    Ok(config)
}

/// A checkpoint whose tensors match its config.
pub struct Checkpoint {
    pub config: Config,
    /// The index of each tensor's file.
    files: BTreeMap<String, usize>,
    readers: Vec<Reader>,
}

impl Checkpoint {
    /// # Errors
    /// The error names the tensors that are missing, unexpected or of the wrong shape.
    pub async fn open(folder: &Location) -> Result<Self> {
        let config = read_config(folder).await?;
        let names = match folder.join(INDEX).get().await? {
            Some(index) => indexed_files(folder, &index)?,
            None => ["model.safetensors".to_owned()].into(),
        };
        let mut expected: BTreeMap<String, [usize; 2]> = config.parameters().into_iter().collect();
        let (mut files, mut readers, mut problems) = (BTreeMap::new(), vec![], vec![]);
        for (i, name) in names.into_iter().enumerate() {
            let reader = Reader::open(folder.join(&name)).await.map_err(|error| match error {
                Error::Storage { source: object_store::Error::NotFound { .. }, .. } => {
                    wrong(folder, format!("there is no {name}"))
                }
                error => error,
            })?;
            for (name, info) in reader.metadata.tensors().into_iter().collect::<BTreeMap<_, _>>() {
                let Some(shape) = expected.remove(&name) else {
                    // Checkpoints with tied embeddings may contain the head, and old ones contain rotary tables.
                    if !(name == "lm_head.weight" || name.ends_with("rotary_emb.inv_freq")) {
                        problems.push(format!("unexpected {name}"));
                    }
                    continue;
                };
                // Norms are stored as vectors.
                if info.shape != shape && !(shape[0] == 1 && info.shape == [shape[1]]) {
                    problems.push(format!("{name} has shape {:?} instead of {shape:?}", info.shape));
                }
                files.insert(name.clone(), i);
            }
            readers.push(reader);
        }
        problems.extend(expected.into_keys().map(|name| format!("missing {name}")));
        if !problems.is_empty() {
            let more = problems.len().saturating_sub(8);
            problems.truncate(8);
            let rest = if more > 0 { format!(", and {more} more") } else { String::new() };
            return Err(wrong(folder, format!("{}{rest}", problems.join(", "))));
        }
        Ok(Self { config, files, readers })
    }

    /// Reads a range of a unit's numbers.
    pub async fn read(&self, unit: &Unit, range: Range<usize>) -> Result<Vec<f32>> {
        let (mut numbers, mut from) = (Vec::with_capacity(range.len()), 0);
        for (name, [rows, columns]) in &unit.parameters {
            let length = rows * columns;
            let own = range.start.max(from)..range.end.min(from + length);
            if own.start < own.end {
                let reader = &self.readers[self.files[name]];
                numbers.extend(reader.read(name, own.start - from..own.end - from).await?);
            }
            from += length;
        }
        Ok(numbers)
    }
}

/// The initial weights of a new model, in a range of a unit: norms are 1, others are normal with standard deviation 0.02.
/// They depend on the seed, not on how units are split over ranks.
pub fn initial_weights(units: &[Unit], unit: usize, range: Range<usize>, seed: u64) -> Vec<f32> {
    let before: usize = units[..unit].iter().map(|unit| unit.length).sum();
    let one = |i: usize| if i < units[unit].norms { 1.0 } else { normal(seed, (before + i) as u64) };
    range.map(one).collect()
}

/// The `i`-th of the seed's uniform random numbers in [0, 1) (SplitMix64).
pub fn uniform(seed: u64, i: u64) -> f64 {
    let mut z = seed
        .wrapping_mul(0xBF58_476D_1CE4_E5B9)
        .wrapping_add(i.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// The `i`-th of the seed's normal random numbers with standard deviation 0.02 (Box–Muller).
fn normal(seed: u64, i: u64) -> f32 {
    let radius = (-2.0 * (1.0 - uniform(seed, 2 * i)).ln()).sqrt();
    (0.02 * radius * (std::f64::consts::TAU * uniform(seed, 2 * i + 1)).cos()) as f32
}

/// The other files that `transformers` reads beside a model: the settings for generation, and the tokenizer with its class.
pub fn companion_files(config: &Config, tokenizer: Option<&[u8]>) -> Vec<(String, Bytes)> {
    let file = |name: &str, value: Value| {
        (name.to_owned(), Bytes::from(serde_json::to_vec_pretty(&value).unwrap_or_default()))
    };
    let mut generation = json!({ "do_sample": false });
    for (key, id) in [("bos_token_id", config.bos_token_id.as_ref()), ("eos_token_id", config.eos())] {
        if let Some(id) = id {
            generation[key] = id.clone();
        }
    }
    let mut files = vec![file(GENERATION, generation)];
    let Some(json) = tokenizer else { return files };
    let mut settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": false,
    });
    if let Ok(tokenizer) = tokenizers::Tokenizer::from_bytes(json) {
        for (key, id) in [("bos_token", &config.bos_token_id), ("eos_token", &config.eos_token_id)] {
            let id = id.as_ref().and_then(|id| id.as_u64().or(id.get(0)?.as_u64()));
            if let Some(token) = id.and_then(|id| tokenizer.id_to_token(u32::try_from(id).ok()?)) {
                settings[key] = json!(token);
            }
        }
    }
    files.push(file("tokenizer_config.json", settings));
    files.push(("tokenizer.json".to_owned(), Bytes::copy_from_slice(json)));
    files
}

/// Writes a folder that `transformers` loads, with its companion files. `read_unit` returns each unit's numbers; it is called
/// in order.
pub async fn write(
    folder: &Location,
    config: &Config,
    units: &[Unit],
    precision: Precision,
    companions: &[(String, Bytes)],
    mut read_unit: impl AsyncFnMut(usize) -> Result<Vec<f32>>,
) -> Result<Vec<Written>> {
    let mut groups: Vec<Vec<usize>> = vec![];
    let mut numbers = usize::MAX;
    for (i, unit) in units.iter().enumerate() {
        if numbers.saturating_add(unit.length) > MAX_NUMBERS_PER_FILE {
            groups.push(vec![]);
            numbers = 0;
        }
        numbers += unit.length;
        groups.last_mut().expect("a group was begun").push(i);
    }
    let mut files = vec![];
    let mut map = serde_json::Map::new();
    for (i, group) in groups.iter().enumerate() {
        let name = match groups.len() {
            1 => "model.safetensors".to_owned(),
            files => format!("model-{:05}-of-{files:05}.safetensors", i + 1),
        };
        let parameters = group.iter().flat_map(|unit| &units[*unit].parameters);
        let tensors: Vec<(String, Vec<usize>)> = parameters
            .map(|(name, shape)| {
                (name.clone(), if name.contains("norm") { vec![shape[1]] } else { shape.to_vec() })
            })
            .collect();
        map.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
        let mut writer = Writer::create(folder.join(&name), precision, &tensors).await?;
        for unit in group {
            writer.write(&read_unit(*unit).await?).await?;
        }
        files.push(writer.finish().await?);
    }
    if groups.len() > 1 {
        let size = config.parameter_count() * precision.bytes() as u64;
        let index = json!({ "metadata": { "total_size": size }, "weight_map": map });
        files.push(folder.join(INDEX).put(serde_json::to_vec_pretty(&index).unwrap_or_default()).await?);
    }
    let config = serde_json::to_vec_pretty(&config_json(config, precision)).unwrap_or_default();
    files.push(folder.join("config.json").put(config).await?);
    for (name, bytes) in companions {
        files.push(folder.join(name).put(bytes.to_vec()).await?);
    }
    Ok(files)
}

/// The `config.json` of a checkpoint, with all keys that transformers 4 and 5 need.
fn config_json(config: &Config, precision: Precision) -> Value {
    let mut written = serde_json::to_value(config).unwrap_or_default();
    written["architectures"] = json!(["LlamaForCausalLM"]);
    written["model_type"] = json!("llama");
    written["hidden_act"] = json!("silu");
    written["attention_bias"] = json!(false);
    written["mlp_bias"] = json!(false);
    written["torch_dtype"] = json!(match precision {
        Precision::F32 => "float32",
        Precision::Bf16 => "bfloat16",
    });
    written["num_key_value_heads"] = json!(config.kv_heads());
    written["head_dim"] = json!(config.head_dim());
    written["rope_theta"] = json!(config.theta());
    // transformers 5 reads `rope_parameters`, transformers 4 `rope_scaling`.
    let scaling = config.scaling_table().cloned().unwrap_or_else(|| json!({ "rope_type": "default" }));
    written["rope_parameters"] = scaling.clone();
    written["rope_parameters"]["rope_theta"] = json!(config.theta());
    let mut older = scaling;
    if let Some(keys) = older.as_object_mut() {
        keys.remove("rope_theta");
    }
    let plain = matches!(config.scaling(), Ok(Scaling::None));
    written["rope_scaling"] = if plain { Value::Null } else { older };
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::tests::folder;

    fn config(tied: bool) -> Config {
        serde_json::from_value(json!({
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 20, "tie_word_embeddings": tied,
        }))
        .unwrap()
    }

    async fn written(config: &Config, precision: Precision) -> Location {
        let folder = folder(&[]).await;
        let units = Unit::all(config);
        let whole = async |i: usize| Ok(initial_weights(&units, i, 0..units[i].length, 1));
        write(
            &folder,
            config,
            &units,
            precision,
            &[("tokenizer.json".into(), Bytes::from_static(b"{}"))],
            whole,
        )
        .await
        .unwrap();
        folder
    }

    #[tokio::test]
    async fn a_checkpoint_is_read_back_as_it_was_written_in_any_ranges() {
        for tied in [true, false] {
            let config = config(tied);
            let read = Checkpoint::open(&written(&config, Precision::F32).await).await.unwrap();
            assert_eq!(read.config.parameters(), config.parameters());
            let units = Unit::all(&config);
            for (i, unit) in units.iter().enumerate() {
                let want = initial_weights(&units, i, 0..unit.length, 1);
                assert_eq!(read.read(unit, 0..unit.length).await.unwrap(), want);
                for ranks in [2, 3, 7] {
                    let mut parts = vec![];
                    for rank in 0..ranks {
                        parts.extend(read.read(unit, unit.shard_range(rank, ranks)).await.unwrap());
                    }
                    assert_eq!(parts, want);
                }
            }
        }
    }

    #[tokio::test]
    async fn bf16_is_read_back_to_its_precision() {
        let config = config(false);
        let read = Checkpoint::open(&written(&config, Precision::Bf16).await).await.unwrap();
        let units = Unit::all(&config);
        let want = initial_weights(&units, 1, 0..units[1].length, 1);
        for (got, want) in read.read(&units[1], 0..want.len()).await.unwrap().into_iter().zip(want) {
            assert!((got - want).abs() <= want.abs() / 256.0, "{got} {want}");
        }
    }

    #[tokio::test]
    async fn tensors_that_are_missing_unexpected_or_misshapen_are_named() {
        let folder = written(&config(false), Precision::F32).await;
        let bytes = folder.join("config.json").get().await.unwrap().unwrap();
        let mut other: Value = serde_json::from_slice(&bytes).unwrap();
        other["num_hidden_layers"] = json!(3);
        other["vocab_size"] = json!(21);
        folder.join("config.json").put(other.to_string().into_bytes()).await.unwrap();
        let error = Checkpoint::open(&folder).await.err().unwrap().to_string();
        assert!(
            error.contains("model.embed_tokens.weight has shape [20, 16] instead of [21, 16]"),
            "{error}"
        );
        assert!(error.contains("missing model.layers.2."), "{error}");
    }

    #[tokio::test]
    async fn what_a_llama_here_does_not_compute_is_refused() {
        let folder = written(&config(false), Precision::F32).await;
        let bytes = folder.join("config.json").get().await.unwrap().unwrap();
        for (key, value) in
            [("hidden_act", json!("gelu")), ("attention_bias", json!(true)), ("model_type", json!("gpt2"))]
        {
            let mut other: Value = serde_json::from_slice(&bytes).unwrap();
            other[key] = value.clone();
            folder.join("config.json").put(other.to_string().into_bytes()).await.unwrap();
            let error = Checkpoint::open(&folder).await.err().unwrap().to_string();
            assert!(error.contains(&value.to_string()), "{error}");
        }
    }

    #[tokio::test]
    async fn what_ends_a_text_is_what_generation_config_says_and_goes_into_what_is_written() {
        let folder = written(&config(false), Precision::F32).await;
        let parts = checkpoint_parts(&folder).await.unwrap();
        let bytes = folder.join("config.json").get().await.unwrap().unwrap();
        let mut file: Value = serde_json::from_slice(&bytes).unwrap();
        file["eos_token_id"] = json!(2);
        folder.join("config.json").put(file.to_string().into_bytes()).await.unwrap();
        assert_eq!(Checkpoint::open(&folder).await.unwrap().config.eos_ids(), [2]);
        for (generation, want) in [
            (json!({ "eos_token_id": 5 }), vec![5]),
            (json!({ "eos_token_id": [5, 6] }), vec![5, 6]),
            (json!({ "eos_token_id": null }), vec![]),
            (json!({ "do_sample": true }), vec![]),
        ] {
            folder.join(GENERATION).put(generation.to_string().into_bytes()).await.unwrap();
            let config = Checkpoint::open(&folder).await.unwrap().config;
            assert_eq!((config.eos_ids(), &config.eos_token_id), (want, &Some(json!(2))), "{generation}");
            let (name, beside) = &companion_files(&config, None)[0];
            let beside: Value = serde_json::from_slice(beside).unwrap();
            assert_eq!(name, GENERATION);
            assert_eq!(beside["eos_token_id"], generation["eos_token_id"]);
        }
        // The file is part of the checkpoint, so that a change of it is noticed.
        assert_eq!(checkpoint_parts(&folder).await.unwrap().len(), parts.len() + 1);
        folder.join(GENERATION).put(b"{".to_vec()).await.unwrap();
        let error = Checkpoint::open(&folder).await.err().unwrap().to_string();
        assert!(error.contains("generation_config.json: EOF"), "{error}");
    }
}

//! Checkpoints as Hugging Face writes them: `config.json` and safetensors, single or sharded with an index.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use burn::tensor::{Device, Tensor, TensorData};
use bytes::Bytes;
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::llama::{Config, Weights};
use crate::{Error, Location, Result};

/// The names of the files that a checkpoint consists of.
pub async fn checkpoint_parts(folder: &Location) -> Result<Vec<String>> {
    let mut parts = vec!["config.json".to_owned()];
    match folder.join("model.safetensors.index.json").get().await? {
        Some(index) => {
            parts.push("model.safetensors.index.json".to_owned());
            parts.extend(shards(folder, &index)?);
        }
        None => parts.push("model.safetensors".to_owned()),
    }
    Ok(parts)
}

/// The files that an index names.
fn shards(folder: &Location, index: &[u8]) -> Result<BTreeSet<String>> {
    let wrong = |message: String| Error::Checkpoint { at: folder.path.to_string(), message };
    let index: Value =
        serde_json::from_slice(index).map_err(|e| wrong(format!("model.safetensors.index.json: {e}")))?;
    let map = index["weight_map"].as_object().ok_or_else(|| wrong("its index has no weight_map".into()))?;
    Ok(map.values().filter_map(|file| file.as_str().map(str::to_owned)).collect())
}

/// Reads a folder's config and weights, as f32.
///
/// # Errors
/// Names every tensor that is missing, unexpected or misshapen.
pub async fn read(folder: &Location, device: &Device) -> Result<(Config, Weights)> {
    let wrong = |message: String| Error::Checkpoint { at: folder.path.to_string(), message };
    let file =
        async |name: &str| folder.join(name).get().await?.ok_or_else(|| wrong(format!("there is no {name}")));
    let config: Value = serde_json::from_slice(&file("config.json").await?)
        .map_err(|e| wrong(format!("config.json: {e}")))?;
    if config["model_type"].as_str().is_some_and(|kind| kind != "llama") {
        return Err(wrong(format!("config.json is of a {} model; llama is supported", config["model_type"])));
    }
    let config: Config = serde_json::from_value(config).map_err(|e| wrong(format!("config.json: {e}")))?;
    config.check()?;

    let shards = match folder.join("model.safetensors.index.json").get().await? {
        Some(index) => shards(folder, &index)?,
        None => ["model.safetensors".to_owned()].into(),
    };
    let mut wanted: BTreeMap<String, [usize; 2]> = config.parameters().into_iter().collect();
    let mut read: HashMap<String, Tensor<2>> = HashMap::new();
    let mut problems = vec![];
    for shard in shards {
        let bytes = file(&shard).await?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| wrong(format!("{shard}: {e}")))?;
        for (name, view) in tensors.tensors() {
            let Some(shape) = wanted.remove(&name) else {
                // tied checkpoints may carry the head too; rotary tables were once saved
                if !(name == "lm_head.weight" || name.ends_with("rotary_emb.inv_freq")) {
                    problems.push(format!("unexpected {name}"));
                }
                continue;
            };
            if view.shape() != shape && view.shape() != [shape[1]].as_slice() {
                problems.push(format!("{name} has shape {:?} instead of {shape:?}", view.shape()));
                continue;
            }
            match numbers(&view) {
                Some(values) => {
                    drop(read.insert(name, Tensor::from_data(TensorData::new(values, shape), device)))
                }
                None => {
                    problems.push(format!("{name} is of type {:?}; f32, f16 and bf16 are read", view.dtype()))
                }
            }
        }
    }
    problems.extend(wanted.into_keys().map(|name| format!("missing {name}")));
    if !problems.is_empty() {
        let more = problems.len().saturating_sub(8);
        problems.truncate(8);
        let rest = if more > 0 { format!(", and {more} more") } else { String::new() };
        return Err(wrong(format!("{}{rest}", problems.join(", "))));
    }
    let tensors = config.parameters().iter().filter_map(|(name, _)| read.remove(name)).collect();
    Ok((config.clone(), Weights::from_flat(&config, tensors)))
}

fn numbers(view: &TensorView<'_>) -> Option<Vec<f32>> {
    let bytes = view.data();
    Some(match view.dtype() {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => return None,
    })
}

/// Writes `model.safetensors` (f32) and `config.json`, which `transformers` loads, and the tokenizer beside them.
/// Returns the files' names and bytes.
pub fn files(config: &Config, weights: &Weights, tokenizer: Option<Bytes>) -> Result<Vec<(String, Vec<u8>)>> {
    let shapes = config.parameters();
    let data: Vec<Vec<u8>> =
        weights.flat().into_iter().map(|tensor| tensor.into_data_as::<f32>().as_bytes().to_vec()).collect();
    let views = shapes.iter().zip(&data).map(|((name, shape), data)| {
        let shape = if name.contains("norm") { vec![shape[1]] } else { shape.to_vec() };
        TensorView::new(Dtype::F32, shape, data).map(|view| (name.as_str(), view))
    });
    let wrong = |e: safetensors::SafeTensorError| Error::Checkpoint {
        at: "model.safetensors".into(),
        message: e.to_string(),
    };
    let views: Vec<_> = views.collect::<Result<_, _>>().map_err(wrong)?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let model = safetensors::serialize(views, Some(metadata)).map_err(wrong)?;

    let mut written = serde_json::to_value(config).unwrap_or_default();
    written["architectures"] = json!(["LlamaForCausalLM"]);
    written["model_type"] = json!("llama");
    written["hidden_act"] = json!("silu");
    written["attention_bias"] = json!(false);
    written["mlp_bias"] = json!(false);
    written["torch_dtype"] = json!("float32");
    written["num_key_value_heads"] = json!(config.kv_heads());
    written["head_dim"] = json!(config.head_dim());
    let mut files = vec![
        ("model.safetensors".to_owned(), model),
        ("config.json".to_owned(), serde_json::to_vec_pretty(&written).unwrap_or_default()),
    ];
    files.extend(tokenizer.map(|json| ("tokenizer.json".to_owned(), json.to_vec())));
    Ok(files)
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

    #[tokio::test]
    async fn a_checkpoint_is_read_back_as_it_was_written() {
        for tied in [true, false] {
            let config = config(tied);
            let weights = Weights::fresh(&config, 1, &Device::flex());
            let files = files(&config, &weights, Some(Bytes::from_static(b"{}"))).unwrap();
            let names: Vec<(&str, Vec<u8>)> =
                files.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
            let (read_config, read_weights) = read(&folder(&names).await, &Device::flex()).await.unwrap();
            assert_eq!(read_config.parameters(), config.parameters());
            for (a, b) in weights.flat().into_iter().zip(read_weights.flat()) {
                assert_eq!(a.into_data(), b.into_data());
            }
        }
    }

    #[tokio::test]
    async fn tensors_that_are_missing_unexpected_or_misshapen_are_named() {
        let written = config(false);
        let files = files(&written, &Weights::fresh(&written, 1, &Device::flex()), None).unwrap();
        let mut other: Value = serde_json::from_slice(&files[1].1).unwrap();
        other["num_hidden_layers"] = json!(3);
        other["vocab_size"] = json!(21);
        let folder = folder(&[
            ("model.safetensors", files[0].1.clone()),
            ("config.json", other.to_string().into_bytes()),
        ])
        .await;
        let error = read(&folder, &Device::flex()).await.err().unwrap().to_string();
        assert!(
            error.contains("model.embed_tokens.weight has shape [20, 16] instead of [21, 16]"),
            "{error}"
        );
        assert!(error.contains("missing model.layers.2."), "{error}");
    }
}

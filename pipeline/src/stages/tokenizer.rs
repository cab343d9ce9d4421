//! tokenizer: loads the conf's tokenizer, or trains one on the run's own documents.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::json;

use crate::engine::put_file;
use crate::hash::Digest;
use crate::run::{Run, Stage, ingredients};
use crate::stage::{Output, Table};
use crate::{Error, Result, sources};

const VERSION: u32 = 1;

/// The run's tokenizer.
pub struct Tokenizer {
    pub loaded: Arc<crate::tokenizer::Tokenizer>,
    /// The file, which goes into checkpoints.
    pub json: Bytes,
    pub fingerprint: Digest,
}

/// Names that BOS and EOS go by, where a post-processor doesn't say.
const BOS: &[&str] = &["<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>"];
const EOS: &[&str] = &["</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>", "<|im_end|>"];

impl Tokenizer {
    fn load(json: Bytes, name: &str) -> Result<Self> {
        let loaded = crate::tokenizer::Tokenizer::from_json(&json, name)?;
        Ok(Self { loaded: Arc::new(loaded), fingerprint: Digest::of(&json), json })
    }

    /// Ids before and after each document: as the conf says, or else as the file's own post-processor does.
    pub fn specials(&self, run: &Run) -> Result<(Option<u32>, Option<u32>)> {
        let conf = &run.conf.tokenizer;
        let choose = |key: &str, asked: Option<bool>, own: Option<u32>, names: &[&str]| match asked {
            Some(false) => Ok(None),
            Some(true) => match own.or_else(|| self.loaded.special(names)) {
                Some(id) => Ok(Some(id)),
                None => Err(run.conf.wrong(
                    &["tokenizer", key],
                    format!("the tokenizer has no {} token", key.to_uppercase()),
                    "asked for here",
                    Some(format!("it has none of {}; leave the key out", names.join(", "))),
                )),
            },
            None => Ok(own),
        };
        Ok((
            choose("bos", conf.bos, self.loaded.bos(), BOS)?,
            choose("eos", conf.eos, self.loaded.eos(), EOS)?,
        ))
    }
}

/// The tokenizer of `[tokenizer] url`, or the one that the stage trains.
pub async fn obtain(run: &Run) -> Result<Tokenizer> {
    if let Some(url) = &run.conf.tokenizer.url {
        let at = run.stores.open(url).map_err(|e| run.conf.names_wrong(&["tokenizer", "url"], e))?;
        let Some(json) = at.get().await? else {
            let within = at.join("tokenizer.json");
            let (message, help) = match within.get().await? {
                Some(_) => (format!("{} is a folder", at.url()), format!("write {}", within.url())),
                None => (
                    format!("there is no {}", at.url()),
                    "a Hugging Face tokenizer.json is wanted; a path is relative to the folder where the command runs"
                        .to_owned(),
                ),
            };
            return Err(run.conf.wrong(&["tokenizer", "url"], message, "this file", Some(help)));
        };
        return Tokenizer::load(json, &at.url());
    }
    let Some(train) = &run.conf.tokenizer.train else {
        return Err(run.conf.wrong(&["tokenizer"], "neither url nor train is set", "here", None));
    };
    let sources = sources::list(run).await?;
    // what is trained depends on the texts in the sample, and on the library that trains
    let list = ingredients([
        ("version", json!(VERSION)),
        ("encoder", json!(crate::tokenizer::ENCODER)),
        ("sources", json!(sources.iter().map(|s| s.identity()).collect::<Vec<_>>())),
        ("vocab", json!(train.vocab)),
        ("sample", json!(train.sample)),
        ("seed", json!(run.conf.run.seed)),
    ]);
    let published = run
        .obtain(Stage::Tokenizer, list, async |draft| {
            let texts = sources::sample(run, &sources, train.sample.0).await?;
            let bar = run.progress.stage("tokenizer", 0);
            bar.say(0, format!("training on {} documents", texts.len()));
            let mut output = Output::default();
            output.count("documents", texts.len() as u64);
            output.count("bytes", texts.iter().map(|text| text.len() as u64).sum());
            let vocab = train.vocab as usize;
            let training = move || crate::tokenizer::train(texts.iter().map(String::as_str), vocab);
            let json = tokio::task::spawn_blocking(training).await.expect("training does not panic")?;
            let digest = crate::hash::RowDigest(u128::from_le_bytes(
                Digest::of(&json).0[..16].try_into().expect("16"),
            ));
            let file = put_file(&draft.folder, "tokenizer.json", json, 1).await?;
            output.table("tokenizer", Table { rows: 1, digest, files: vec![file] });
            Ok(output)
        })
        .await?;
    let table = published.table("tokenizer");
    let file = table
        .files
        .first()
        .ok_or_else(|| Error::Corrupt { url: published.folder.url(), message: "no tokenizer".into() })?;
    Tokenizer::load(file.checked(&published.folder).await?, &published.folder.join(&file.name).url())
}

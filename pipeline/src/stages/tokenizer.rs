//! tokenizer: loads the conf's tokenizer, or trains one on the run's own documents.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::algorithms::tokenizer::ENCODER;
use crate::conf::Special;
use crate::hash::Digest;
use crate::output::{Output, Table};
use crate::run::{Run, ingredients};
use crate::sql::engine::put_file;
use crate::stage::Stage;
use crate::stages::sources;
use crate::{Error, Result};

/// The run's tokenizer.
pub struct Tokenizer {
    pub loaded: Arc<crate::algorithms::tokenizer::Tokenizer>,
    /// The tokenizer.json, which is copied into checkpoints.
    pub json: Bytes,
    pub fingerprint: Digest,
    /// BOS and EOS as the tokenizer_config.json beside the file names them. The outer `None` means that it
    /// was not read, or has no such key; the inner one that it says there is no such token.
    named: [Option<Option<String>>; 2],
}

impl Tokenizer {
    fn load(json: Bytes, name: &str) -> Result<Self> {
        let loaded = crate::algorithms::tokenizer::Tokenizer::from_json(&json, name)?;
        Ok(Self { loaded: Arc::new(loaded), fingerprint: Digest::of(&json), json, named: [None, None] })
    }

    /// The ids before and after each document (BOS, EOS): those that the conf names, or else those of the
    /// file's own post-processor.
    ///
    /// # Errors
    /// The conf asks for a token that the tokenizer does not have, or leaves open which token it is.
    pub fn specials(&self, run: &Run) -> Result<(Option<u32>, Option<u32>)> {
        Ok((self.special(run, 0)?, self.special(run, 1)?))
    }

    /// The id on one side of a document: 0 is before it, 1 after.
    fn special(&self, run: &Run, side: usize) -> Result<Option<u32>> {
        let (key, put) = (KEYS[side], self.loaded.around()[side].as_slice());
        let name = key.to_uppercase();
        let wrong = |message: String, help: String| {
            Err(run.conf.wrong(&["tokenizer", key], message, "asked for here", Some(help)))
        };
        let known = |token: &str, message: String| match self.loaded.id(token) {
            Some(id) => Ok(Some(id)),
            None => wrong(message, self.to_choose_from(key)),
        };
        match (asked(run)[side], put) {
            (Some(Special::Own(false)), _) | (None, []) => Ok(None),
            (Some(Special::Id(id)), _) if self.loaded.token(*id).is_some() => Ok(Some(*id)),
            (Some(Special::Id(id)), _) => {
                wrong(format!("the tokenizer has no id {id}"), self.to_choose_from(key))
            }
            (Some(Special::Text(token)), _) => known(token, format!("the tokenizer has no token {token:?}")),
            (_, [id]) => Ok(Some(*id)),
            (Some(Special::Own(true)), []) => match (&self.named[side], self.left_over(side).as_slice()) {
                (Some(Some(token)), _) => {
                    known(token, format!("{BESIDE} names {token:?} as {name}, which the tokenizer has not"))
                }
                (Some(None), _) => {
                    wrong(format!("{BESIDE} says that there is no {name}"), self.to_choose_from(key))
                }
                (None, [id]) => Ok(Some(*id)),
                (None, _) => {
                    let message = format!("the tokenizer does not say which token is {name}");
                    wrong(message, self.to_choose_from(key))
                }
            },
            (_, several) => {
                let tokens: Vec<String> = several.iter().filter_map(|id| self.loaded.token(*id)).collect();
                let message = format!(
                    "the tokenizer's post-processor puts {} tokens on that side of a text; a document has one {name}",
                    tokens.len()
                );
                wrong(message, format!("name one of {tokens:?}, or write {key} = false"))
            }
        }
    }

    /// The special tokens that are not for unknown text, padding or masks, nor on the other side of a text.
    /// If exactly one is left over, it is this side's token.
    fn left_over(&self, side: usize) -> Vec<u32> {
        let (unknown, other) = (self.loaded.unknown(), &self.loaded.around()[1 - side]);
        let special = self.loaded.added().into_iter().filter(|(_, token)| token.special);
        let left = special.filter(|(id, token)| {
            let name = token.content.to_lowercase();
            let elsewhere = Some(&token.content) == unknown.as_ref() || other.contains(id);
            !elsewhere && !["pad", "mask"].iter().any(|other| name.contains(other))
        });
        left.map(|(id, _)| id).collect()
    }

    /// The help for a user who has to name a token.
    fn to_choose_from(&self, key: &str) -> String {
        let special: Vec<_> = self.loaded.added().into_iter().filter(|(_, token)| token.special).collect();
        let some: Vec<String> =
            special.iter().take(8).map(|(_, token)| format!("{:?}", token.content)).collect();
        let more = if special.len() > some.len() { ", …" } else { "" };
        match some.as_slice() {
            [] => format!("name a token by its text or its id, or leave {key} out"),
            some => format!("name it by its text or its id; special tokens are {}{more}", some.join(", ")),
        }
    }
}

/// The conf's keys for the two sides of a document.
const KEYS: [&str; 2] = ["bos", "eos"];

/// The conf's settings for the two sides of a document.
fn asked(run: &Run) -> [Option<&Special>; 2] {
    [run.conf.tokenizer.bos.as_ref(), run.conf.tokenizer.eos.as_ref()]
}

/// The file beside a tokenizer.json in which `transformers` finds its BOS and EOS.
const BESIDE: &str = "tokenizer_config.json";

/// BOS and EOS as a [`BESIDE`] file names them: a string, an object with `content`, or null.
fn named(json: &[u8]) -> serde_json::Result<[Option<Option<String>>; 2]> {
    let file: Value = serde_json::from_slice(json)?;
    let token = |value: &Value| value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned);
    Ok(["bos_token", "eos_token"].map(|key| file.get(key).map(token)))
}

/// The run's tokenizer, after a check that it has the tokens that the conf wants around documents.
///
/// # Errors
/// Those of [`find`] and of [`Tokenizer::specials`].
pub async fn obtain(run: &Run) -> Result<Tokenizer> {
    let tokenizer = find(run).await?;
    let (bos, eos) = tokenizer.specials(run)?;
    if bos.or(eos).is_none() && asked(run) != [Some(&Special::Own(false)); 2] {
        tracing::warn!(
            "there is no token between documents: the tokenizer's post-processor puts none; set tokenizer.eos to true or to \
             a token, or both tokenizer.bos and tokenizer.eos to false if that is meant"
        );
    }
    Ok(tokenizer)
}

/// The tokenizer of `[tokenizer] url`, or the one that the stage trains.
///
/// # Errors
/// The file does not exist or cannot be used, or the sources have no document to train on.
pub async fn find(run: &Run) -> Result<Tokenizer> {
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
        let mut tokenizer = Tokenizer::load(json, &at.url())?;
        // read the file only if it is needed: some stores answer with an error where there is none
        let mut sides = asked(run).into_iter().zip(tokenizer.loaded.around());
        if sides.any(|(asked, put)| asked == Some(&Special::Own(true)) && put.is_empty()) {
            let url = at.url();
            let folder = url.rsplit_once('/').map_or("", |(folder, _)| folder);
            let beside = run.stores.open(&format!("{folder}/{BESIDE}"))?;
            if let Some(json) = beside.get().await? {
                tokenizer.named = named(&json).map_err(|e| {
                    let message = format!("{} is not JSON: {e}", beside.url());
                    run.conf.wrong(&["tokenizer", "url"], message, "lies beside this file", None)
                })?;
            }
        }
        return Ok(tokenizer);
    }
    let Some(train) = &run.conf.tokenizer.train else {
        return Err(run.conf.wrong(&["tokenizer"], "neither url nor train is set", "here", None));
    };
    let sources = sources::list(run).await?;
    // the result depends on the texts in the sample, and on the library that trains
    let list = ingredients(
        Stage::Tokenizer,
        [
            ("encoder", json!(ENCODER)),
            ("sources", json!(sources.iter().map(|s| s.identity()).collect::<Vec<_>>())),
            ("vocab", json!(train.vocab)),
            ("sample", json!(train.sample)),
            ("seed", json!(run.conf.run.seed)),
        ],
    );
    let published = run
        .obtain(Stage::Tokenizer, list, async |draft| {
            let texts = sources::sample(run, &sources, train.sample.0).await?;
            let bar = run.progress.stage("tokenizer", 0);
            bar.say(0, format!("training on {} documents", texts.len()));
            let mut output = Output::default();
            output.count("documents", texts.len() as u64);
            output.count("bytes", texts.iter().map(|text| text.len() as u64).sum());
            let vocab = train.vocab as usize;
            let training =
                move || crate::algorithms::tokenizer::train(texts.iter().map(String::as_str), vocab);
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

#[cfg(test)]
mod tests {
    use miette::Diagnostic;

    use super::*;
    use crate::algorithms::tokenizer::tests::{added, sentencepiece};
    use crate::conf::Conf;
    use crate::run::Goal;
    use crate::sql::Files;

    /// The BOS and EOS of a run whose conf has the lines `keys` in `[tokenizer]`. Its tokenizer has the
    /// tokens `special` after `<unk>`, and if `bos` is set, its post-processor puts the first of them before
    /// texts. `beside` is its tokenizer_config.json.
    async fn around(
        special: &[&str],
        bos: bool,
        beside: Option<Value>,
        keys: &str,
    ) -> Result<(Option<String>, Option<String>), String> {
        let dir = tempfile::tempdir().unwrap();
        let json = sentencepiece(|file| {
            let list = ["<unk>"].iter().chain(special).zip(0..).map(|(token, id)| added(id, token));
            file["added_tokens"] = list.collect();
            for (id, token) in (1..).zip(special) {
                file["model"]["vocab"][*token] = json!(id);
            }
            let first = special.first().copied().unwrap_or("<s>");
            file["post_processor"]["single"][0]["SpecialToken"]["id"] = json!(first);
            file["post_processor"]["special_tokens"] =
                json!({ first: { "id": first, "ids": [1], "tokens": [first] } });
            if !bos {
                file["post_processor"] = Value::Null;
            }
        });
        std::fs::write(dir.path().join("tokenizer.json"), json).unwrap();
        if let Some(beside) = beside {
            std::fs::write(dir.path().join(BESIDE), beside.to_string()).unwrap();
        }
        let conf = format!(
            "[run]\nname = \"t\"\noutput = \"out\"\n\
             [[source]]\nurl = \"in/*\"\nformat = \"jsonl\"\ndomain = \"d\"\n\
             [tokenizer]\nurl = \"tokenizer.json\"\n{keys}\n\
             [mixture]\nrecipe = \"r.sql\"\nbudget = 1\n[pack]\nsequence_tokens = 16\n"
        );
        let conf = Conf::parse(&conf, "conf.toml", &[], &|_| None).unwrap();
        let files = Files { root: dir.path().to_owned(), ..Files::default() };
        let run = Run::new(conf, "conf.toml", files, Goal::Look).unwrap();
        let obtained = async {
            let tokenizer = obtain(&run).await?;
            let (bos, eos) = tokenizer.specials(&run)?;
            let text = |id: Option<u32>| id.and_then(|id| tokenizer.loaded.token(id));
            Ok((text(bos), text(eos)))
        };
        obtained.await.map_err(|error: Error| {
            let help = error.help().map(|help| help.to_string());
            format!("{}: {}", error.in_a_line(), help.unwrap_or_default())
        })
    }

    #[tokio::test]
    async fn what_goes_around_documents_is_what_the_tokenizer_has_or_the_conf_names() {
        const DEEPSEEK: &[&str] = &["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"];
        const PHI: &[&str] = &["<s>", "</s>", "<|endoftext|>", "<|assistant|>"];
        const GPT: &[&str] = &["<|endoftext|>"];
        let phi = || Some(json!({ "bos_token": "<s>", "eos_token": { "content": "<|endoftext|>" } }));
        for (special, bos, beside, keys, want) in [
            (DEEPSEEK, true, None, "", [Some(DEEPSEEK[0]), None]),
            (DEEPSEEK, true, None, "eos = true", [Some(DEEPSEEK[0]), Some(DEEPSEEK[1])]),
            (PHI, true, phi(), "eos = true", [Some("<s>"), Some("<|endoftext|>")]),
            (PHI, false, phi(), "bos = true\neos = true", [Some("<s>"), Some("<|endoftext|>")]),
            (PHI, true, None, "bos = false\neos = \"</s>\"", [None, Some("</s>")]),
            (PHI, true, None, "bos = 4\neos = 3", [Some("<|assistant|>"), Some("<|endoftext|>")]),
            (GPT, false, None, "", [None, None]),
            (GPT, false, None, "eos = true", [None, Some("<|endoftext|>")]),
            (
                GPT,
                false,
                Some(json!({ "model_max_length": 1024 })),
                "bos = true",
                [Some("<|endoftext|>"), None],
            ),
            (&["<s>", "</s>"][..], true, None, "eos = true", [Some("<s>"), Some("</s>")]),
        ] {
            let got = around(special, bos, beside, keys).await.unwrap();
            assert_eq!((got.0.as_deref(), got.1.as_deref()), (want[0], want[1]), "{special:?} {keys}");
        }
    }

    #[tokio::test]
    async fn a_token_that_the_tokenizer_has_not_or_does_not_name_is_an_error_at_its_key() {
        const PHI: &[&str] = &["<s>", "</s>", "<|endoftext|>"];
        for (special, beside, keys, want) in [
            (PHI, None, "eos = true", "the tokenizer does not say which token is EOS"),
            (PHI, None, "eos = true", "special tokens are \"<unk>\", \"<s>\", \"</s>\", \"<|endoftext|>\""),
            (PHI, None, "eos = 70000", "the tokenizer has no id 70000"),
            (PHI, None, "bos = \"[CLS]\"", "the tokenizer has no token \"[CLS]\""),
            (
                PHI,
                Some(json!({ "eos_token": null })),
                "eos = true",
                "tokenizer_config.json says that there is no EOS",
            ),
            (
                PHI,
                Some(json!({ "eos_token": "<eos>" })),
                "eos = true",
                "names \"<eos>\" as EOS, which the tokenizer has not",
            ),
            (&["</s>", "<pad>"][..], None, "eos = true", "the tokenizer does not say which token is EOS"),
        ] {
            let error = around(special, true, beside, keys).await.unwrap_err();
            assert!(error.contains(want), "{error}");
        }
    }
}

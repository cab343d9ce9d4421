//! Whether it worked: what a model makes of long texts.
//!
//! ```text
//! needle      a sentence in a haystack of essays, asked for              length × depth (paper §5, Figure 1)
//! loss        held-out documents, token by token                        domain × position (paper §5.3, Table 5 and Figure 3)
//! retrieval   needles of several kinds, variables, words, made by seed   length × task (as RULER scores them)
//! bookqa      questions about a whole book, from a file                 F1 (paper §5, InfiniteBench)
//! choices     questions with choices, from a file                       whether long context cost short (paper §5, MMLU)
//! ```
//!
//! Each is a list of [cases](suite::Suite::cases) that don't depend on each other: what was answered once is not asked again.

pub mod bookqa;
pub mod choices;
pub mod conf;
pub mod loss;
pub mod needle;
pub mod retrieval;
pub mod suite;

use std::sync::Mutex;

use tokenizers::{Encoding, ModelWrapper, Token, Tokenizer};
use tokio::runtime::Handle;

use crate::checkpoint::Checkpoint;
use crate::comm::{Comm, PATIENCE, threads};
use crate::conf::Precision;
use crate::config::Config;
use crate::decoder::{Cache, Model};
use crate::device::Name;
use crate::generate::{Choice, continued};
use crate::{Error, Result};

/// A model that texts are put to, on some ranks that share them. It remembers the beginning of a text that others share.
pub struct Subject {
    /// One a device.
    models: Vec<Model>,
    /// What each rank remembers.
    beginnings: Vec<Mutex<Cache>>,
}

/// A file that an evaluation asks of.
#[derive(Clone, Debug, PartialEq)]
pub struct File {
    /// What a person can paste.
    pub name: String,
    pub text: String,
}

impl File {
    pub fn new(name: &str, text: &str) -> Self {
        Self { name: name.to_owned(), text: text.to_owned() }
    }
}

/// What a model adds to a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    pub ids: Vec<i32>,
    /// How many of the text's first tokens had been read before.
    pub reused: usize,
}

impl Subject {
    /// Several devices have a rank each; one is shared by all ranks. To be called on a thread that may block.
    pub fn open(
        checkpoint: &Checkpoint,
        devices: &[Name],
        ranks: usize,
        precision: Precision,
        wait: &Handle,
    ) -> Result<Self> {
        if devices.is_empty() || ranks == 0 || devices.len() > 1 && devices.len() != ranks {
            let devices = devices.len();
            return Err(Error::Conf(format!(
                "{ranks} ranks on {devices} devices; several devices have a rank each"
            )));
        }
        let open = |device: &Name| Model::open(checkpoint, *device, precision.into(), wait);
        let models = devices.iter().map(open).collect::<Result<_>>()?;
        let beginnings = (0..ranks).map(|_| Mutex::default()).collect();
        Ok(Self { models, beginnings })
    }

    pub fn config(&self) -> &Config {
        &self.models[0].config
    }

    /// Has every rank do the same, each with its model and what it remembers; what the first one returns.
    fn on_ranks<T: Send>(
        &self,
        work: impl Fn(&Model, &dyn Comm, &mut Cache) -> Result<T> + Sync,
    ) -> Result<T> {
        let ranks = self.beginnings.len();
        let all = threads::run(ranks, ranks, PATIENCE, |comm, _| {
            let mut beginning = self.beginnings[comm.rank()].lock().unwrap_or_else(|e| e.into_inner());
            work(&self.models[comm.rank() % self.models.len()], comm, &mut beginning)
        });
        Ok(all?.swap_remove(0))
    }

    /// The likeliest continuation of `ids`, of at most `tokens` tokens. The first `shared` ids are remembered for the texts
    /// that begin with them, too.
    pub fn reply(&self, ids: &[i32], shared: usize, tokens: usize) -> Result<Reply> {
        self.check(ids)?;
        self.on_ranks(|model, comm, beginning| {
            let mut cache = model.common(beginning, ids);
            let reused = cache.ids().len();
            if reused < shared.min(ids.len() - 1) {
                model.read(comm, &mut cache, &ids[reused..shared.min(ids.len() - 1)])?;
                *beginning = cache.clone();
            }
            let rest = &ids[cache.ids().len()..];
            let ids = continued(model, comm, &mut cache, rest, tokens, Choice::Greedy, &mut |_| {})?;
            Ok(Reply { ids, reused })
        })
    }

    /// The log-likelihood of each of several continuations of `ids`.
    pub fn likelihoods(&self, ids: &[i32], continuations: &[Vec<i32>]) -> Result<Vec<f64>> {
        self.check(ids)?;
        continuations.iter().try_for_each(|ids| self.check(ids))?;
        self.on_ranks(|model, comm, _| {
            let (last, before) = ids.split_last().expect("there is a text");
            let mut read = Cache::default();
            model.read(comm, &mut read, before)?;
            let one = |ids: &Vec<i32>| {
                let (_, but_last) = ids.split_last().expect("there is a continuation");
                let losses = model.losses(comm, &mut read.clone(), &[&[*last], but_last].concat(), ids)?;
                Ok(-losses.into_iter().map(f64::from).sum::<f64>())
            };
            continuations.iter().map(one).collect()
        })
    }

    /// The loss of each id but the first, given those before it.
    pub fn losses(&self, ids: &[i32]) -> Result<Vec<f32>> {
        self.check(ids)?;
        self.on_ranks(|model, comm, _| {
            model.losses(comm, &mut Cache::default(), &ids[..ids.len() - 1], &ids[1..])
        })
    }

    fn check(&self, ids: &[i32]) -> Result<()> {
        let vocab = self.config().vocab_size;
        match ids.iter().find(|id| **id < 0 || **id as usize >= vocab) {
            _ if ids.is_empty() => Err(Error::Conf("there is no text to read".into())),
            None => Ok(()),
            Some(id) => Err(Error::Conf(format!(
                "id {id} of a text is not in the model's vocabulary of {vocab}; is it the model's own tokenizer?"
            ))),
        }
    }
}

/// A tokenizer's texts and ids.
pub struct Text {
    tokenizer: Tokenizer,
    /// What it puts before a text.
    before: Vec<i32>,
}

impl Text {
    /// # Errors
    /// `json` is no `tokenizer.json`, or one with which a text has other ids each time.
    pub fn new(json: &[u8]) -> Result<Self> {
        let failed = |e| Error::Conf(format!("tokenizer.json: {e}"));
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(failed)?;
        if let ModelWrapper::BPE(model) = tokenizer.get_model()
            && let Some(dropout) = model.dropout.filter(|dropout| *dropout > 0.0)
        {
            return Err(Error::Conf(format!(
                "tokenizer.json: its model.dropout is {dropout}, with which a text has other ids each time; set it to null"
            )));
        }
        // a text is as long as it is
        tokenizer.with_truncation(None).map_err(failed)?.with_padding(None);
        // a text of one token that no tokenizer has: there may be no text that this one can spell
        const TEXT: u32 = u32::MAX;
        let text = Encoding::from_tokens(vec![Token::new(TEXT, "a".to_owned(), (0, 1))], 0);
        let whole = tokenizer.post_process(text, None, true).map_err(failed)?;
        let before = whole.get_ids().iter().take_while(|id| **id != TEXT).map(|id| *id as i32).collect();
        Ok(Self { tokenizer, before })
    }

    /// With what the tokenizer puts before a text, if it `begins` here. What it puts after one would end it.
    pub fn ids(&self, text: &str, begins: bool) -> Result<Vec<i32>> {
        let encoded =
            self.tokenizer.encode(text, false).map_err(|e| Error::Conf(format!("tokenizer: {e}")))?;
        let before = if begins { self.before.as_slice() } else { &[] };
        Ok(before.iter().copied().chain(encoded.get_ids().iter().map(|id| *id as i32)).collect())
    }

    /// Whether both have the same ids for the same tokens.
    pub fn is_alike(&self, other: &Text) -> bool {
        self.tokenizer.get_vocab(true) == other.tokenizer.get_vocab(true)
    }

    /// Without what stands for no text.
    pub fn text(&self, ids: &[i32]) -> Result<String> {
        let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
        self.tokenizer.decode(&ids, true).map_err(|e| Error::Conf(format!("tokenizer: {e}")))
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::decoder::tests::fixture;
    use serde_json::{Value, json};

    /// A tokenizer with an id for every word and mark of a text, and one for all others.
    pub fn words(text: &str) -> Text {
        let mut vocab = serde_json::Map::from_iter([("[UNK]".to_owned(), Value::from(0))]);
        for word in
            text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).chain([".", ",", ":", "?"])
        {
            let next = vocab.len();
            vocab.entry(word).or_insert(next.into());
        }
        let json = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "truncation": null,
            "padding": null, "pre_tokenizer": { "type": "Whitespace" }, "decoder": null,
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]" },
        });
        Text::new(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_text_begins_as_the_tokenizer_says_and_neither_ends_nor_is_cut() {
        let vocab = json!({ "<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4 });
        let special = |id: u32, name: &str| json!({ "id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
        let piece = |name: &str| json!({ "SpecialToken": { "id": name, "type_id": 0 } });
        let of =
            |name: &str, id: u32| (name.to_owned(), json!({ "id": name, "ids": [id], "tokens": [name] }));
        let json = json!({
            "version": "1.0", "added_tokens": [special(0, "<s>"), special(1, "</s>")], "normalizer": null, "decoder": null,
            "truncation": { "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 },
            "padding": { "strategy": { "Fixed": 9 }, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 4, "pad_type_id": 0, "pad_token": "c" },
            "pre_tokenizer": { "type": "Whitespace" },
            "post_processor": {
                "type": "TemplateProcessing", "pair": [],
                "single": [piece("<s>"), { "Sequence": { "id": "A", "type_id": 0 } }, piece("</s>")],
                "special_tokens": serde_json::Map::from_iter([of("<s>", 0), of("</s>", 1)]),
            },
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "c" },
        });
        let text = Text::new(json.to_string().as_bytes()).unwrap();
        assert_eq!(text.ids("a b a b", true).unwrap(), [0, 2, 3, 2, 3]);
        assert_eq!(text.ids("a b a b", false).unwrap(), [2, 3, 2, 3]);
        assert_eq!(text.ids("", true).unwrap(), [0]);
        assert_eq!(text.ids("<s> a", true).unwrap(), [0, 0, 2]);
    }

    async fn subject(ranks: usize) -> Subject {
        let checkpoint = Checkpoint::open(&fixture("llama3")).await.unwrap();
        let wait = Handle::current();
        tokio::task::block_in_place(|| {
            Subject::open(&checkpoint, &[Name::Flex], ranks, Precision::F32, &wait).unwrap()
        })
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_beginning_that_was_read_before_changes_no_reply() {
        let texts: Vec<Vec<i32>> = vec![
            (0..60).map(|i| i * 7 % 64).collect(),
            (0..60).map(|i| if i < 33 { i * 7 % 64 } else { i }).collect(),
            (0..20).map(|i| i * 7 % 64).collect(),
            (0..50).map(|i| if i < 45 { i * 7 % 64 } else { 1 }).collect(),
        ];
        for ranks in [1, 2] {
            let (fresh, mut reused) = (subject(ranks).await, vec![]);
            let remembering = subject(ranks).await;
            for (text, shared) in texts.iter().zip([40, 33, 20, 45]) {
                tokio::task::block_in_place(|| {
                    let want = fresh.reply(text, 0, 8).unwrap();
                    let got = remembering.reply(text, shared, 8).unwrap();
                    assert_eq!((want.reused, &want.ids), (0, &got.ids));
                    reused.push(got.reused);
                });
            }
            // the last id of a text is always read: what comes after it is asked for
            assert_eq!(reused, [0, 33, 19, 40]);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn likelihoods_are_those_of_the_losses_of_the_whole_texts() {
        let subject = subject(2).await;
        let ids: Vec<i32> = (0..40).map(|i| i * 5 % 64).collect();
        let continuations = vec![vec![3], vec![9, 4, 1], vec![60, 61]];
        tokio::task::block_in_place(|| {
            let got = subject.likelihoods(&ids, &continuations).unwrap();
            for (continuation, got) in continuations.iter().zip(got) {
                let losses = subject.losses(&[&ids[..], continuation].concat()).unwrap();
                let want: f64 =
                    losses[losses.len() - continuation.len()..].iter().map(|l| -f64::from(*l)).sum();
                assert!((got - want).abs() < 1e-4 * want.abs(), "{got} {want}");
            }
            let error = subject.losses(&[1, 99]).unwrap_err().to_string();
            assert!(error.contains("id 99"), "{error}");
        });
    }
}

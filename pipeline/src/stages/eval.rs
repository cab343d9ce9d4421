//! eval: measures what the trained model makes of long texts. An evaluation is an output like any other; its
//! key covers the checkpoint, the questions and the content of the files that they are about. A case is its
//! unit of work.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use lengthwise_model::checkpoint::Checkpoint;
use lengthwise_model::conf::{Precision, TrainConf};
use lengthwise_model::dataset::Dataset;
use lengthwise_model::device::DeviceName;
use lengthwise_model::eval::conf::{EvalConf, Evaluation};
use lengthwise_model::eval::loss::{Document, Documents};
use lengthwise_model::eval::suite::{self, Suite};
use lengthwise_model::eval::{EvalModel, InputFile as Asked, TextTokenizer};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use crate::hash::{Digest, RowDigest};
use crate::output::{self, Draft, File, Output, Published, Table};
use crate::progress::Progress;
use crate::run::{self, Goal, Run, ingredients};
use crate::source::{self, Format, Unread};
use crate::stage::Stage;
use crate::stages::tokenizer::Tokenizer;
use crate::stages::train::identity;
use crate::stop::check_stop;
use crate::storage::{Location, Stores};
use crate::{Error, Result};

/// About how many tokens of documents a job of the loss evaluation reads.
const JOB_TOKENS: usize = 1 << 18;

/// A model to evaluate, and the settings to evaluate it with.
pub struct Model {
    /// The folder of a Hugging Face Llama, with its tokenizer.json.
    checkpoint: Location,
    /// The digests of its files.
    identity: Value,
    tokenizer: Bytes,
    /// Packed documents that the model was not trained on, for the loss.
    heldout: Option<Location>,
    /// Where outputs are found and published.
    output: Location,
    devices: Vec<DeviceName>,
    ranks: usize,
    precision: Precision,
    /// Settings of RoPE that replace the checkpoint's.
    pub rope_theta: Option<f64>,
    pub rope_scaling: Option<Value>,
    /// The loaded model. It is loaded when the first question is asked, and serves all questions.
    subject: OnceCell<EvalModel>,
}

impl Model {
    /// A model on the devices that the conf's `[eval]` names, or else its `[train]`, or else on `flex`.
    ///
    /// # Errors
    /// The folder has no tokenizer.json or lacks another file, or a device's name is unknown.
    pub async fn of_conf(
        checkpoint: Location,
        heldout: Option<Location>,
        output: Location,
        conf: &EvalConf,
        train: Option<&TrainConf>,
    ) -> Result<Self> {
        let (names, ranks) = match (&conf.devices, train) {
            (Some(devices), _) => (devices.clone(), conf.ranks),
            (None, Some(train)) => (train.devices.clone(), conf.ranks.or(train.ranks)),
            (None, None) => (vec!["flex".to_owned()], conf.ranks),
        };
        let devices = names.iter().map(|name| DeviceName::parse(name)).collect::<Result<Vec<_>, _>>()?;
        let json_at = checkpoint.join("tokenizer.json");
        let tokenizer = json_at.get().await?.ok_or_else(|| {
            let help = "a checkpoint's folder is wanted, `RUN/checkpoint` of a run; a model of others' needs its tokenizer.json in it";
            Error::usage(format!("there is no {}", json_at.url()), help)
        })?;
        Ok(Self {
            identity: identity(&checkpoint).await.map_err(|error| match error {
                Error::Storage { url, source: object_store::Error::NotFound { .. }, .. } => {
                    Error::usage(format!("there is no {url}"), "a checkpoint's folder is wanted, whole")
                }
                other => other,
            })?,
            tokenizer,
            ranks: ranks.unwrap_or(devices.len()),
            checkpoint,
            heldout,
            output,
            devices,
            precision: conf.precision,
            rope_theta: None,
            rope_scaling: None,
            subject: OnceCell::new(),
        })
    }

    /// Whether the tokenizers of both models have the same vocabulary, so that their losses can be compared.
    pub fn reads_as(&self, other: &Model) -> Result<bool> {
        Ok(TextTokenizer::new(&self.tokenizer)?.same_vocabulary(&TextTokenizer::new(&other.tokenizer)?))
    }

    /// The digest of a file of the checkpoint.
    fn identity_of(&self, name: &str) -> Option<Digest> {
        let files = self.identity.as_array()?.iter();
        let digest = files.filter(|file| file[0] == name).map(|file| file[1].clone()).next()?;
        serde_json::from_value(digest).ok()
    }

    async fn subject(&self) -> Result<&EvalModel> {
        let open = async || {
            let mut checkpoint = Checkpoint::open(&(&self.checkpoint).into()).await?;
            if let Some(theta) = self.rope_theta {
                checkpoint.config.set_theta(theta);
            }
            if let Some(scaling) = &self.rope_scaling {
                checkpoint.config.set_scaling(scaling.clone());
            }
            checkpoint.config.check()?;
            let wait = tokio::runtime::Handle::current();
            tokio::task::block_in_place(|| {
                EvalModel::open(&checkpoint, &self.devices, self.ranks, self.precision, &wait)
            })
        };
        Ok(self.subject.get_or_try_init(open).await?)
    }
}

/// What an evaluation needs besides the model: stores, progress, and the flag that says to stop.
pub struct EvalContext<'a> {
    pub stores: &'a Stores,
    pub progress: &'a Progress,
    pub stop: &'a AtomicBool,
}

/// The conf's `[eval]` table, if it has one. Errors point into the conf.
pub fn conf(run: &Run) -> Result<Option<EvalConf>> {
    let Some(conf) = run.conf.eval::<EvalConf>()? else { return Ok(None) };
    if run.conf.train.is_none() {
        let help = "add a [train] table, or leave this one out and name a model: `lengthwise eval needle CHECKPOINT`";
        let message = "there is no [train] table, so there is no model to evaluate";
        return Err(run.conf.wrong(&["eval"], message, "asked for here", Some(help.into())));
    }
    conf.check().map_err(|e| run.conf.wrong(&["eval"], e.to_string(), "in this table", None))?;
    Ok(Some(conf))
}

/// Checks that the devices and files that the conf's `[eval]` names are there and that its questions can be
/// asked, before hours are spent on the model.
pub async fn check(run: &Run, tokenizer: &Tokenizer) -> Result<()> {
    let Some(conf) = conf(run)? else { return Ok(()) };
    let wrong = |key, e: lengthwise_model::Error| {
        run.conf.wrong(&["eval", key], e.to_string(), "asked for here", None)
    };
    for name in conf.devices.iter().flatten() {
        DeviceName::parse(name).and_then(DeviceName::open).map_err(|e| wrong("devices", e))?;
    }
    let text = TextTokenizer::new(&tokenizer.json)?;
    for evaluation in conf.evaluations() {
        let (name, mut files) = (evaluation.name(), vec![]);
        for (key, url) in evaluation.clone().urls() {
            let named = texts(&run.stores, url).await;
            files.push(named.map_err(|e| run.conf.names_wrong(&["eval", name, key], e))?);
        }
        if evaluation != Evaluation::Loss {
            Suite::new(&evaluation, &text, &files).map_err(|e| wrong(name, e))?;
        } else if run.conf.mixture.holdout == 0.0 {
            let message = "no documents are held out, so there are none to measure the loss of";
            let help =
                "set `mixture.holdout`, to 0.001 say: the share of documents that no recipe sees".to_owned();
            return Err(run.conf.wrong(&["eval", "loss"], message, "asked for here", Some(help)));
        }
    }
    Ok(())
}

/// Runs every evaluation that the conf asks for on the trained checkpoint.
pub async fn all(
    run: &Run,
    trained: &Published,
    heldout: Option<&Published>,
) -> Result<Vec<(String, Published)>> {
    let Some(conf) = conf(run)? else { return Ok(vec![]) };
    let train = run.conf.train::<TrainConf>()?;
    let packed_heldout = heldout;
    let heldout = heldout.map(|heldout| heldout.folder.clone());
    let (checkpoint, output) = (trained.folder.clone(), run.output.clone());
    let model = Model::of_conf(checkpoint, heldout, output, &conf, train.as_ref()).await?;
    // make sure that the checkpoint is the one that was trained, and the held-out documents those that were
    // packed
    for file in trained.table("checkpoint").files {
        if model.identity_of(&file.name).is_some_and(|digest| digest != file.blake3) {
            file.check(&trained.folder).await?;
        }
    }
    if let Some(heldout) = packed_heldout.filter(|_| conf.evaluations().contains(&Evaluation::Loss)) {
        for file in heldout.table("heldout").files {
            file.check(&heldout.folder).await?;
        }
    }
    let context = EvalContext { stores: &run.stores, progress: &run.progress, stop: &run.stop };
    let mut all = vec![];
    for evaluation in conf.evaluations() {
        let done = obtain(&context, &model, &evaluation, run.goal).await?;
        run.did(&format!("eval {}", evaluation.name()), &done);
        all.push((evaluation.name().to_owned(), done));
    }
    Ok(all)
}

/// Reads the texts that a URL names.
async fn texts(stores: &Stores, url: &str) -> Result<Vec<Asked>> {
    let at = stores.open(url)?;
    let mut all = vec![];
    let listed = source::list(&*at.store, &at.path, &at.url(), Format::Text, &[]).await?;
    if !listed.unread.is_empty() {
        tracing::warn!("{url}: {}", Unread::summary(&Unread::all(&listed.unread)));
    }
    for file in listed.files {
        let mut at = at.clone();
        at.path = file.path;
        let bytes = at.read().await?;
        let text = std::str::from_utf8(&bytes).map_err(|e| {
            Error::usage(format!("{} is not UTF-8: {e}", file.url), "name the texts alone, with a glob")
        })?;
        all.push(Asked::new(&file.url, text));
    }
    Ok(all)
}

/// Table `cases`, one line of JSON per case. The notes are their summary.
pub async fn obtain(
    context: &EvalContext<'_>,
    model: &Model,
    evaluation: &Evaluation,
    goal: Goal,
) -> Result<Published> {
    let (mut files, mut digests) = (vec![], BTreeMap::new());
    let mut settings = evaluation.clone();
    for (key, url) in settings.urls() {
        let texts = texts(context.stores, url).await?;
        let contents: Vec<Digest> = texts.iter().map(|file| Digest::of(file.text.as_bytes())).collect();
        digests.insert(key, json!(contents));
        files.push(texts);
        // the key has the digests of the files' content instead of their URLs
        url.clear();
    }
    if *evaluation == Evaluation::Loss {
        let heldout = model.heldout.as_ref().ok_or_else(|| {
            let help = "set `mixture.holdout` in the run's conf, or name a folder of packed documents with --heldout";
            Error::usage("there are no held-out documents to measure the loss of", help)
        })?;
        let mut all = BTreeMap::new();
        for meta in heldout.list().await? {
            let below = meta.location.prefix_match(&heldout.path).into_iter().flatten();
            let name = below.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/");
            if name.ends_with(".parquet") {
                all.insert(name.clone(), heldout.join(&name).digest().await?);
            }
        }
        if all.is_empty() {
            let message = format!("there are no packed documents below {}", heldout.url());
            return Err(Error::usage(message, "name a folder such as RUN/heldout"));
        }
        digests.insert("heldout", json!(all.iter().collect::<Vec<_>>()));
    }
    let list = ingredients(
        Stage::Eval,
        [
            ("checkpoint", model.identity.clone()),
            ("tokenizer", json!(Digest::of(&model.tokenizer))),
            ("settings", json!(settings)),
            ("files", json!(digests)),
            ("precision", json!(model.precision)),
            ("rope", json!([model.rope_theta, model.rope_scaling])),
        ],
    );
    let key = output::key(Stage::Eval.name(), &list);
    let at = model.output.join("stages").join(Stage::Eval.name()).join(&key);
    run::obtain(Stage::Eval, goal, context.stop, (key, at), list, async |draft| {
        let cases = ask(context, model, evaluation, &files, draft).await?;
        let lines: String = cases.iter().map(|case| format!("{}\n", content(case))).collect();
        let (name, rows, blake3) =
            ("cases.jsonl".to_owned(), cases.len() as u64, Digest::of(lines.as_bytes()));
        let file = File { name, bytes: lines.len() as u64, rows, blake3 };
        draft.folder.join(&file.name).put(lines.into_bytes()).await?;
        let mut output = Output { notes: suite::summary(evaluation, &cases)?, ..Output::default() };
        output.count("cases", rows);
        // answers may differ between devices, which is no reason to refuse an output: the digest of rows is 0
        output.table("cases", Table { rows, digest: RowDigest(0), files: vec![file] });
        Ok(output)
    })
    .await
}

/// A case without the keys that only say how it was answered: how fast, and how many tokens had been read
/// before.
fn content(case: &Value) -> Value {
    let mut content = case.clone();
    if let Some(keys) = content.as_object_mut() {
        keys.shift_remove("seconds");
        keys.shift_remove("reused");
    }
    content
}

/// Asks every case that an earlier attempt did not ask, and returns all cases.
async fn ask(
    context: &EvalContext<'_>,
    model: &Model,
    evaluation: &Evaluation,
    files: &[Vec<Asked>],
    draft: &Draft,
) -> Result<Vec<Value>> {
    let subject = model.subject().await?;
    let text = TextTokenizer::new(&model.tokenizer)?;
    let job = async |name: &str, work: &dyn Fn() -> lengthwise_model::Result<Vec<Value>>| {
        check_stop(context.stop)?;
        let output = draft.job(name, async {
            let cases = tokio::task::block_in_place(work)?;
            Ok(Output { notes: json!(cases), ..Output::default() })
        });
        let notes = output.await?.notes;
        Ok::<_, Error>(notes.as_array().cloned().unwrap_or_default())
    };

    let mut all = vec![];
    if *evaluation == Evaluation::Loss {
        let heldout = model.heldout.as_ref().expect("the key is made of them");
        let mut documents =
            Documents::new(Dataset::open(&heldout.into(), subject.config().vocab_size).await?);
        let bar = context.progress.stage("loss", 0);
        for number in 0.. {
            let mut some: Vec<Document> = vec![];
            while some.iter().map(|document| document.ids.len()).sum::<usize>() < JOB_TOKENS {
                let Some(document) = documents.next().await? else { break };
                some.push(document);
            }
            if some.is_empty() {
                break;
            }
            let cases = job(&format!("documents-{number:06}"), &|| suite::loss_cases(subject, &some)).await?;
            let tokens = some.iter().map(|document| document.ids.len() as u64).sum();
            bar.add(0, some.len() as u64, tokens, 0);
            all.extend(cases);
        }
        return Ok(all);
    }
    let suite = Suite::new(evaluation, &text, files)?;
    let names = suite.cases();
    let bar = context.progress.stage(evaluation.name(), names.len() as u64);
    for (i, name) in names.iter().enumerate() {
        let cases = job(name, &|| Ok(vec![suite.ask(subject, i)?])).await?;
        bar.say(i as u64 + 1, said(name, i + 1, names.len(), cases.first()));
        all.extend(cases);
    }
    Ok(all)
}

/// The progress line of a case.
fn said(name: &str, done: usize, cases: usize, case: Option<&Value>) -> String {
    let number = |key: &str| case.and_then(|case| case[key].as_f64());
    let mut line = format!("{done} of {cases}, {name}");
    if let Some(score) = number("score").or(number("f1")) {
        line += &format!(": {score:.2}");
    }
    if let (Some(tokens), Some(seconds)) = (number("prompt_tokens"), number("seconds")) {
        line += &format!(", {:.0} tokens/s", (tokens - number("reused").unwrap_or(0.0)) / seconds.max(1e-6));
    }
    line
}

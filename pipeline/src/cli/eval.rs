//! `lengthwise eval`

use std::sync::atomic::AtomicBool;

use clap::{Args, ValueEnum};
use lengthwise_model::conf::{Precision, TrainConf, parse_count};
use lengthwise_model::eval::conf::{
    BookqaConf, ChoicesConf, EvalConf, Evaluation, NeedleConf, RetrievalConf,
};
use serde_json::{Value, json};

use super::{ConfArguments, print, run_folder, until_told};
use crate::conf::Conf;
use crate::flow::Flow;
use crate::progress::Progress;
use crate::publish;
use crate::report;
use crate::run::{Goal, Run};
use crate::stages::eval::{self, Around, Model};
use crate::store::{Location, Stores};
use crate::{Error, Result};

#[derive(Args)]
#[command(after_help = "Examples:
  lengthwise eval loss conf/quickstart.toml
  lengthwise eval needle RUN --haystack 'essays/*.txt' --lengths 1K,2K,4K --depths 0,50,100 --html needle.html
  lengthwise eval needle CHECKPOINT --haystack 'essays/*.txt' --rope-scaling '{\"rope_type\": \"yarn\", \"factor\": 4.0}'
  lengthwise eval choices CHECKPOINT --file anatomy_test.csv --examples anatomy_dev.csv --subject anatomy")]
pub struct EvalArguments {
    evaluation: Which,
    /// A conf that was run, the directory of a run, or the folder of a Hugging Face Llama with its tokenizer.json
    target: String,
    /// Texts to hide needles in: a file, a folder or a glob (needle, retrieval)
    #[arg(long, value_name = "URL")]
    haystack: Option<String>,
    /// Tokens, such as 1K,8K,128K (needle, retrieval); one number for bookqa
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    lengths: Vec<String>,
    /// Percent (needle)
    #[arg(long, value_name = "P,…", value_delimiter = ',')]
    depths: Vec<f64>,
    /// Questions a task and length (retrieval)
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// The questions (bookqa: JSONL as InfiniteBench's, choices: CSV as MMLU's)
    #[arg(long, value_name = "URL")]
    file: Option<String>,
    /// Questions that are answered before each (choices)
    #[arg(long, value_name = "URL")]
    examples: Option<String>,
    /// How many of them (choices)
    #[arg(long, value_name = "N")]
    shots: Option<usize>,
    /// What the questions are about (choices)
    #[arg(long)]
    subject: Option<String>,
    /// Packed documents that the model has not seen, where the target has none or others are wanted (loss)
    #[arg(long, value_name = "URL")]
    heldout: Option<String>,
    /// "flex", "libtorch-cpu", or "libtorch-cuda:0", … with a rank each
    #[arg(long = "device", value_name = "DEVICE")]
    devices: Vec<String>,
    /// How many ranks share a text
    #[arg(long)]
    ranks: Option<usize>,
    /// "f32" or "bf16"
    #[arg(long)]
    precision: Option<Precision>,
    /// RoPE's base, where it is not to be the checkpoint's
    #[arg(long, value_name = "BASE")]
    rope_theta: Option<f64>,
    /// RoPE's scaling, as in config.json, where it is not to be the checkpoint's
    #[arg(long, value_name = "JSON")]
    rope_scaling: Option<String>,
    /// Where a checkpoint's evaluations are stored; those of a conf or a run are beside its stages
    #[arg(long, value_name = "URL", default_value = "out")]
    output: String,
    /// Write a page with the result into this file, too
    #[arg(long, value_name = "FILE")]
    html: Option<std::path::PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Which {
    /// A sentence in a haystack, by length and depth
    Needle,
    /// Loss of held-out documents, by domain and position
    Loss,
    /// Needles of several kinds, variables and words, as RULER asks and scores them
    Retrieval,
    /// Questions about whole books
    Bookqa,
    /// Questions with choices
    Choices,
}

/// What a target gives: a model, and what its conf says.
struct Target {
    checkpoint: Location,
    heldout: Option<Location>,
    output: Location,
    conf: EvalConf,
    train: Option<TrainConf>,
}

pub async fn main(arguments: EvalArguments) -> Result<()> {
    let here = std::env::current_dir()
        .map_err(|source| Error::Io { doing: "cannot tell the current folder".into(), source })?;
    let stores = Stores::new(here);
    let mut target = target(&arguments, &stores).await?;
    if let Some(heldout) = &arguments.heldout {
        target.heldout = Some(stores.open(heldout)?);
    }
    let evaluation = evaluation(&arguments, &target.conf)?;
    let model = model(&arguments, target)?;
    let progress = Progress::stderr();
    // a case that is under way is asked again: it takes minutes at most
    let (stop, finishes) = (AtomicBool::new(false), AtomicBool::new(false));
    let compute = Goal::Compute { from: None };
    let around = Around { stores: &stores, progress: &progress, stop: &stop };
    let done = until_told(&stop, &finishes, eval::obtain(&around, &model, &evaluation, compute)).await?;
    tracing::info!("{}: {}", evaluation.name(), if done.cached { "was there" } else { "computed" });
    let notes = &done.manifest.notes;
    if let Some(path) = &arguments.html {
        let html = report::evaluation_page(evaluation.name(), &arguments.target, notes);
        std::fs::write(path, html)
            .map_err(|source| Error::Io { doing: format!("cannot write {}", path.display()), source })?;
    }
    let cases = done.folder.join("cases.jsonl").url();
    let value = json!({ "evaluation": evaluation.name(), "result": notes, "cases": cases });
    print(arguments.json, &value, || format!("{}\n{cases}", text(&evaluation, notes)));
    Ok(())
}

async fn target(arguments: &EvalArguments, stores: &Stores) -> Result<Target> {
    if arguments.target.ends_with(".toml") {
        let conf = ConfArguments { conf: arguments.target.clone(), sets: vec![], at: None };
        return of_conf(&conf.open(Goal::Look)?).await;
    }
    let folder = run_folder(&arguments.target)?;
    if folder.join("config.json").get().await?.is_some() {
        let output = stores.open(&arguments.output)?;
        let conf = EvalConf::default();
        return Ok(Target { checkpoint: folder, heldout: None, output, conf, train: None });
    }
    let manifest = publish::read(&folder).await?;
    let output = publish::output_of(&folder);
    let heldout = manifest.files.iter().any(|file| file.name.starts_with("heldout/"));
    let (conf, train) = tables(&manifest.conf)?;
    let heldout = heldout.then(|| folder.join("heldout"));
    Ok(Target { checkpoint: folder.join("checkpoint"), heldout, output, conf, train })
}

fn tables(conf: &Conf) -> Result<(EvalConf, Option<TrainConf>)> {
    Ok((conf.eval::<EvalConf>()?.unwrap_or_default(), conf.train::<TrainConf>()?))
}

async fn of_conf(run: &Run) -> Result<Target> {
    let mut flow = Flow::default();
    flow.go(run, Some(crate::run::Stage::Train)).await?;
    let trained = flow.trained.ok_or_else(|| {
        Error::usage("the conf has no [train] table: there is no model to evaluate", "name a checkpoint")
    })?;
    let (conf, train) = tables(&run.conf)?;
    let heldout = flow.heldout.map(|heldout| heldout.folder);
    Ok(Target { checkpoint: trained.folder, heldout, output: run.output.clone(), conf, train })
}

/// What is asked: as the conf says, with what the command line says instead.
fn evaluation(arguments: &EvalArguments, conf: &EvalConf) -> Result<Evaluation> {
    let lengths: Vec<usize> = arguments
        .lengths
        .iter()
        .map(|text| parse_count(text).map(|count| count as usize))
        .collect::<Result<_, String>>()
        .map_err(|e| Error::usage(format!("--lengths: {e}"), "write --lengths 1K,8K,128K"))?;
    let needed = |flag: &str, value: Option<&String>| {
        value.cloned().ok_or_else(|| {
            Error::usage(
                format!("{flag} is needed, or the conf's [eval] table"),
                "see `lengthwise eval --help`",
            )
        })
    };
    let default = |key: &str, url: &str| json!({ key: url });
    fn read<T: serde::de::DeserializeOwned>(value: Value) -> Result<T> {
        serde_json::from_value(value).map_err(|e| Error::usage(e.to_string(), "see `lengthwise eval --help`"))
    }
    Ok(match arguments.evaluation {
        Which::Loss => Evaluation::Loss,
        Which::Needle => {
            let given = conf.needle.clone();
            let haystack = arguments.haystack.as_ref().or(given.as_ref().map(|conf| &conf.haystack));
            let haystack = needed("--haystack", haystack)?;
            let mut conf: NeedleConf = given.map_or_else(|| read(default("haystack", &haystack)), Ok)?;
            conf.haystack = haystack;
            if !lengths.is_empty() {
                conf.lengths = lengths;
            }
            if !arguments.depths.is_empty() {
                conf.depths = arguments.depths.clone();
            }
            Evaluation::Needle(conf)
        }
        Which::Retrieval => {
            let given = conf.retrieval.clone();
            let haystack = arguments.haystack.as_ref().or(given.as_ref().map(|conf| &conf.haystack));
            let haystack = needed("--haystack", haystack)?;
            let mut conf: RetrievalConf = given.map_or_else(|| read(default("haystack", &haystack)), Ok)?;
            conf.haystack = haystack;
            if !lengths.is_empty() {
                conf.lengths = lengths;
            }
            conf.samples = arguments.samples.unwrap_or(conf.samples);
            Evaluation::Retrieval(conf)
        }
        Which::Bookqa => {
            let given = conf.bookqa.clone();
            let file = needed("--file", arguments.file.as_ref().or(given.as_ref().map(|conf| &conf.file)))?;
            let mut conf: BookqaConf = given.map_or_else(|| read(default("file", &file)), Ok)?;
            conf.file = file;
            conf.length = lengths.first().copied().unwrap_or(conf.length);
            Evaluation::Bookqa(conf)
        }
        Which::Choices => {
            let given = conf.choices.clone();
            let file = needed("--file", arguments.file.as_ref().or(given.as_ref().map(|conf| &conf.file)))?;
            let mut conf: ChoicesConf = given.map_or_else(|| read(default("file", &file)), Ok)?;
            conf.file = file;
            conf.examples = arguments.examples.clone().or(conf.examples);
            conf.shots = arguments.shots.unwrap_or(conf.shots);
            conf.subject = arguments.subject.clone().unwrap_or(conf.subject);
            Evaluation::Choices(conf)
        }
    })
}

fn model(arguments: &EvalArguments, target: Target) -> Result<Model> {
    let Target { checkpoint, heldout, output, conf, train } = target;
    let rope_scaling = arguments.rope_scaling.as_ref().map(|text| {
        serde_json::from_str(text).map_err(|e| {
            let help = "write it as in config.json: '{\"rope_type\": \"yarn\", \"factor\": 4.0}'";
            Error::usage(format!("--rope-scaling is not JSON: {e}"), help)
        })
    });
    let mut conf = conf;
    if !arguments.devices.is_empty() {
        (conf.devices, conf.ranks) = (Some(arguments.devices.clone()), None);
    }
    conf.ranks = arguments.ranks.or(conf.ranks);
    conf.precision = arguments.precision.unwrap_or(conf.precision);
    let mut model = Model::of_conf(checkpoint, heldout, output, &conf, train.as_ref())?;
    model.rope_theta = arguments.rope_theta;
    model.rope_scaling = rope_scaling.transpose()?;
    Ok(model)
}

/// For a person.
fn text(evaluation: &Evaluation, notes: &Value) -> String {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let cells = || notes["cells"].as_array().into_iter().flatten();
    match evaluation {
        Evaluation::Needle(conf) => {
            let mut lines = vec![format!("score {:.1} %", 100.0 * number(&notes["score"]))];
            let head: String = conf.depths.iter().map(|depth| format!("{depth:>6}%")).collect();
            lines.push(format!("{:>10}{head}", "tokens"));
            for length in &conf.lengths {
                let own = cells().filter(|cell| cell["length"] == json!(length));
                let scores: String =
                    own.map(|cell| format!("{:>7.1}", 100.0 * number(&cell["score"]))).collect();
                lines.push(format!("{length:>10}{scores}"));
            }
            lines.join("\n")
        }
        Evaluation::Loss => {
            let mut lines = vec![format!(
                "{:<24} {:>10} {:>10} {:>8} {:>8}",
                "domain", "positions", "losses", "loss", "±"
            )];
            for cell in cells() {
                let positions = &cell["positions"];
                let kilo = |key: &str| positions[key].as_u64().unwrap_or(0) >> 10;
                lines.push(format!(
                    "{:<24} {:>10} {:>10} {:>8.4} {:>8}",
                    cell["domain"].as_str().unwrap_or("all"),
                    format!("{}K-{}K", kilo("from"), kilo("until")),
                    cell["count"].as_u64().unwrap_or(0),
                    number(&cell["loss"]),
                    cell["error"].as_f64().map_or("".to_owned(), |error| format!("{error:.4}")),
                ));
            }
            lines.push("nats a token; ±: standard error over documents, where there are several".into());
            lines.join("\n")
        }
        Evaluation::Retrieval(conf) => {
            let mut lines = vec![format!("score {:.1} %", 100.0 * number(&notes["score"]))];
            let head: String = conf.tasks.iter().map(|task| format!("{:>14}", task.name())).collect();
            lines.push(format!("{:>10}{head}", "tokens"));
            for length in &conf.lengths {
                let own = cells().filter(|cell| cell["length"] == json!(length));
                let scores: String =
                    own.map(|cell| format!("{:>14.1}", 100.0 * number(&cell["score"]))).collect();
                lines.push(format!("{length:>10}{scores}"));
            }
            lines.join("\n")
        }
        Evaluation::Bookqa(_) => format!(
            "F1 {:.1} % of {} questions, {} books cut",
            100.0 * number(&notes["f1"]),
            notes["questions"],
            notes["cut"]
        ),
        Evaluation::Choices(_) => format!(
            "{} of {} right: {:.1} ± {:.1} %",
            notes["right"],
            notes["questions"],
            100.0 * number(&notes["accuracy"]),
            100.0 * number(&notes["error"])
        ),
    }
}

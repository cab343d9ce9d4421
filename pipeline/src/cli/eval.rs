//! `lengthwise eval`

use std::sync::atomic::AtomicBool;

use clap::{Args, ValueEnum};
use lengthwise_model::conf::{Precision, TrainConf};
use lengthwise_model::eval::conf::{EvalConf, Evaluation};
use lengthwise_model::eval::loss::Cell;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{ConfArguments, print, run_folder, stores, until_told, write};
use crate::compare::{LossRow, loss_rows, losses_of};
use crate::conf::{Conf, Count};
use crate::dataflow::Flow;
use crate::directory;
use crate::output::Published;
use crate::progress::Progress;
use crate::report;
use crate::run::{Goal, Run};
use crate::stages::eval::{self, EvalContext, Model};
use crate::storage::{Location, Stores};
use crate::{Error, Result};

#[derive(Args)]
#[command(after_help = "Examples:
  lengthwise eval loss conf/quickstart.toml
  lengthwise eval loss RUN --against CHECKPOINT
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
    lengths: Vec<Count>,
    /// Percent (needle)
    #[arg(long, value_name = "P,…", value_delimiter = ',')]
    depths: Vec<f64>,
    /// What is asked, with {context} and {question} in it, where it is not to be the paper's (needle)
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
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
    /// Another checkpoint, whose losses of the same documents stand beside: is short context kept? (loss)
    #[arg(long, value_name = "CHECKPOINT")]
    against: Option<String>,
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
    /// Draw it as SVG for a slide into this file, too (needle, retrieval, loss)
    #[arg(long, value_name = "FILE")]
    svg: Option<std::path::PathBuf>,
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
#[derive(Clone)]
struct Target {
    checkpoint: Location,
    heldout: Option<Location>,
    output: Location,
    conf: EvalConf,
    train: Option<TrainConf>,
}

pub async fn main(arguments: EvalArguments) -> Result<()> {
    let stores = stores()?;
    let mut target = target(&arguments, &stores).await?;
    if let Some(heldout) = &arguments.heldout {
        target.heldout = Some(stores.open(heldout)?);
    }
    let evaluation = evaluation(&arguments, &target.conf)?;
    let other = match &arguments.against {
        Some(_) if evaluation != Evaluation::Loss => {
            return Err(Error::usage("--against is for losses", "ask another checkpoint by itself"));
        }
        Some(url) => {
            let other = Target { checkpoint: stores.open(url)?, ..target.clone() };
            let mut other = model(&arguments, other).await?;
            // RoPE's flags are for what is evaluated
            (other.rope_theta, other.rope_scaling) = (None, None);
            Some((url, other))
        }
        None => None,
    };
    let model = model(&arguments, target).await?;
    if let Some((url, other)) = &other
        && !model.reads_as(other)?
    {
        let message = format!("{url} has another tokenizer: its losses are of other tokens");
        return Err(Error::usage(message, "compare models that have the same vocabulary"));
    }
    let progress = Progress::stderr();
    // a case that is under way is asked again: it takes minutes at most
    let (stop, finishes) = (AtomicBool::new(false), AtomicBool::new(false));
    let compute = Goal::Compute { from: None };
    let context = EvalContext { stores: &stores, progress: &progress, stop: &stop };
    let all = async {
        let beside = match &other {
            Some((_, model)) => Some(eval::obtain(&context, model, &evaluation, compute).await?),
            None => None,
        };
        Ok((eval::obtain(&context, &model, &evaluation, compute).await?, beside))
    };
    let (done, beside) = until_told(&stop, &finishes, all).await?;
    tracing::info!("{}: {}", evaluation.name(), if done.cached { "was there" } else { "computed" });
    let notes = &done.manifest.notes;
    if let Some(path) = &arguments.html {
        let html = report::evaluation_page(evaluation.name(), &arguments.target, notes);
        write(path, html)?;
    }
    let cases = done.folder.join("cases.jsonl").url();
    if let Some(path) = &arguments.svg {
        let panels = report::slide::evaluation(evaluation.name(), notes);
        let picture = report::slide::svg(&arguments.target, &panels)?;
        write(path, picture)?;
    }
    let rows = match &beside {
        Some(beside) => Some(side_by_side(beside, &done).await?),
        None => None,
    };
    let value = json!({ "evaluation": evaluation.name(), "result": notes, "cases": cases, "against": rows });
    print(arguments.json, &value, || match (&rows, &other) {
        (Some(rows), Some((url, _))) => {
            let names = [(*url).clone(), arguments.target.clone()];
            format!("{}\n{cases}", report::comparison::losses(&names, rows))
        }
        _ => format!("{}\n{cases}", text(&evaluation, notes)),
    })
}

/// The first one's losses, and the other's difference over the same documents.
async fn side_by_side(first: &Published, other: &Published) -> Result<Vec<LossRow>> {
    let losses = async |of: &Published| losses_of(&of.folder.join("cases.jsonl")).await;
    let (first_losses, other_losses) = (losses(first).await?, losses(other).await?);
    let ranges = first.manifest.notes["ranges"].as_array().cloned().unwrap_or_default();
    Ok(loss_rows(&ranges, &[vec![&first_losses], vec![&other_losses]]))
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
    let manifest = directory::read(&folder).await?;
    let output = directory::output_of(&folder);
    let has = |part: &str| manifest.files.iter().any(|file| file.name.starts_with(part));
    if !has("checkpoint/") {
        let message = format!("{} trained nothing: there is no model to evaluate", folder.url());
        return Err(Error::usage(message, "name a run with a checkpoint/, or a checkpoint"));
    }
    let heldout = has("heldout/");
    let (conf, train) = tables(&manifest.conf)?;
    let heldout = heldout.then(|| folder.join("heldout"));
    Ok(Target { checkpoint: folder.join("checkpoint"), heldout, output, conf, train })
}

fn tables(conf: &Conf) -> Result<(EvalConf, Option<TrainConf>)> {
    Ok((conf.eval::<EvalConf>()?.unwrap_or_default(), conf.train::<TrainConf>()?))
}

async fn of_conf(run: &Run) -> Result<Target> {
    let mut flow = Flow::default();
    flow.go(run, Some(crate::stage::Stage::Train)).await?;
    let trained = flow.trained.ok_or_else(|| {
        Error::usage("the conf has no [train] table: there is no model to evaluate", "name a checkpoint")
    })?;
    let (conf, train) = tables(&run.conf)?;
    let heldout = flow.heldout.map(|heldout| heldout.folder);
    Ok(Target { checkpoint: trained.folder, heldout, output: run.output.clone(), conf, train })
}

/// What is asked: as the conf says, with what the command line says instead.
fn evaluation(arguments: &EvalArguments, conf: &EvalConf) -> Result<Evaluation> {
    let lengths: Vec<usize> = arguments.lengths.iter().map(|Count(tokens)| *tokens as usize).collect();
    let length = lengths.first().copied();
    let whole = "see `lengthwise eval --help`";
    if lengths.len() > 1 && matches!(arguments.evaluation, Which::Bookqa) {
        return Err(Error::usage("bookqa has one length, and --lengths names several", whole));
    }
    if arguments.shots.is_some_and(|shots| shots > 0)
        && arguments.examples.is_none()
        && conf.choices.as_ref().is_none_or(|choices| choices.examples.is_none())
    {
        return Err(Error::usage("--shots needs --examples to take them from", whole));
    }
    let lengths = (!lengths.is_empty()).then_some(lengths);
    let depths = (!arguments.depths.is_empty()).then_some(&arguments.depths);
    let EvalArguments { haystack, prompt, samples, file, examples, shots, subject, .. } = arguments;
    Ok(match arguments.evaluation {
        Which::Loss => Evaluation::Loss,
        Which::Needle => {
            let flags =
                json!({ "haystack": haystack, "lengths": lengths, "depths": depths, "prompt": prompt });
            Evaluation::Needle(laid_over(&conf.needle, "haystack", flags)?)
        }
        Which::Retrieval => {
            let flags = json!({ "haystack": haystack, "lengths": lengths, "samples": samples });
            Evaluation::Retrieval(laid_over(&conf.retrieval, "haystack", flags)?)
        }
        Which::Bookqa => {
            Evaluation::Bookqa(laid_over(&conf.bookqa, "file", json!({ "file": file, "length": length }))?)
        }
        Which::Choices => {
            let flags = json!({ "file": file, "examples": examples, "shots": shots, "subject": subject });
            Evaluation::Choices(laid_over(&conf.choices, "file", flags)?)
        }
    })
}

/// A table of the conf, if it has one, with the flags that are given in place of its keys; `needed` has to be there then.
fn laid_over<T: Serialize + DeserializeOwned>(table: &Option<T>, needed: &str, flags: Value) -> Result<T> {
    let help = "see `lengthwise eval --help`";
    let mut table = if table.is_some() { json!(table) } else { json!({}) };
    for (key, value) in flags.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        table[key] = value.clone();
    }
    if table[needed].is_null() {
        return Err(Error::usage(format!("--{needed} is needed, or the conf's [eval] table"), help));
    }
    serde_json::from_value(table).map_err(|e| Error::usage(e.to_string(), help))
}

async fn model(arguments: &EvalArguments, target: Target) -> Result<Model> {
    let Target { checkpoint, heldout, output, mut conf, train } = target;
    let rope_scaling = arguments.rope_scaling.as_ref().map(|text| {
        let help = "write it as in config.json: '{\"rope_type\": \"yarn\", \"factor\": 4.0}'";
        let scaling: Value = serde_json::from_str(text)
            .map_err(|e| Error::usage(format!("--rope-scaling is not JSON: {e}"), help))?;
        match scaling.get("rope_type").or(scaling.get("type")) {
            Some(Value::String(_)) => Ok(scaling),
            _ => Err(Error::usage("--rope-scaling has no `rope_type`", help)),
        }
    });
    if !arguments.devices.is_empty() {
        (conf.devices, conf.ranks) = (Some(arguments.devices.clone()), None);
    }
    conf.ranks = arguments.ranks.or(conf.ranks);
    conf.precision = arguments.precision.unwrap_or(conf.precision);
    let mut model = Model::of_conf(checkpoint, heldout, output, &conf, train.as_ref()).await?;
    model.rope_theta = arguments.rope_theta;
    model.rope_scaling = rope_scaling.transpose()?;
    Ok(model)
}

/// For a person.
fn text(evaluation: &Evaluation, notes: &Value) -> String {
    let percent = |key: &str| 100.0 * notes[key].as_f64().unwrap_or(f64::NAN);
    match evaluation {
        Evaluation::Needle(conf) => {
            let depths = conf.depths.iter().map(|depth| format!("{depth}%")).collect();
            grid(notes, &conf.lengths, depths, 7)
        }
        Evaluation::Retrieval(conf) => {
            let tasks = conf.tasks.iter().map(|task| task.name().to_owned()).collect();
            grid(notes, &conf.lengths, tasks, 14)
        }
        Evaluation::Loss => losses(notes),
        Evaluation::Bookqa(_) => format!(
            "F1 {:.1} % of {} questions, {} books cut",
            percent("f1"),
            notes["questions"],
            notes["cut"]
        ),
        Evaluation::Choices(_) => format!(
            "{} of {} right: {:.1} ± {:.1} %",
            notes["right"],
            notes["questions"],
            percent("accuracy"),
            percent("error")
        ),
    }
}

/// Scores in percent: a line a length, a column of so many characters for each of what was asked.
fn grid(notes: &Value, lengths: &[usize], columns: Vec<String>, width: usize) -> String {
    let percent = |value: &Value| 100.0 * value.as_f64().unwrap_or(f64::NAN);
    let line = |name: &str, cells: &mut dyn Iterator<Item = String>| {
        format!("{name:>10}{}", cells.map(|cell| format!("{cell:>width$}")).collect::<String>())
    };
    let mut lines = vec![format!("score {:.1} %", percent(&notes["score"]))];
    lines.push(line("tokens", &mut columns.into_iter()));
    for length in lengths {
        let cells = notes["cells"].as_array().into_iter().flatten();
        let own = cells.filter(|cell| cell["length"] == json!(length));
        let mut scores = own.map(|cell| format!("{:.1}", percent(&cell["score"])));
        lines.push(line(&length.to_string(), &mut scores));
    }
    lines.join("\n")
}

fn losses(notes: &Value) -> String {
    let cells: Vec<Cell> = serde_json::from_value(notes["cells"].clone()).unwrap_or_default();
    let mut lines =
        vec![format!("{:<24} {:>10} {:>10} {:>8} {:>8}", "domain", "positions", "losses", "loss", "±")];
    for Cell { domain, positions, count, loss, error, .. } in cells {
        let (domain, positions) = (domain.as_deref().unwrap_or("all"), positions.to_string());
        let error = error.map_or(String::new(), |error| format!("{error:.4}"));
        lines.push(format!("{domain:<24} {positions:>10} {count:>10} {loss:>8.4} {error:>8}"));
    }
    lines.push("nats a token; ±: standard error over documents, where there are several".into());
    lines.join("\n")
}

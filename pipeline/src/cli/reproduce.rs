//! `lengthwise reproduce`

use clap::Args;
use serde_json::json;

use super::{print, run, run_folder};
use crate::publish::{self, RunManifest, output_of};
use crate::run::{Goal, Run};
use crate::sql::Files;
use crate::stage::File;
use crate::{Error, Result};

#[derive(Args)]
pub struct ReproduceArguments {
    /// The directory of a run, as `lengthwise run` prints it
    run: String,
    /// The output to run into; `reproduced` beside the run's stages by default
    #[arg(long, value_name = "URL")]
    into: Option<String>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub async fn main(arguments: ReproduceArguments) -> Result<()> {
    let folder = run_folder(&arguments.run)?;
    let manifest = publish::read(&folder).await?;
    let version = env!("CARGO_PKG_VERSION");
    if manifest.lengthwise != version {
        tracing::warn!("the run is of lengthwise {}, this is {version}", manifest.lengthwise);
    }
    let mut conf = manifest.conf.clone();
    conf.run.output = arguments.into.unwrap_or_else(|| output_of(&folder).join("reproduced").url());
    let root = std::env::current_dir()
        .map_err(|source| Error::Io { doing: "cannot tell the current folder".into(), source })?;
    let files = Files { root, commit: None, texts: manifest.sql.clone() };
    let mut again = Run::new(conf, &manifest.conf_file, files, Goal::Compute { from: None })?;
    if again.output.url() == output_of(&folder).url() {
        return Err(Error::usage(
            "--into names the output that the run itself is in",
            "name another place: nothing would be computed",
        ));
    }
    again.outputs.push(output_of(&folder));
    let second = go(&again).await?;

    let mut lines = vec![];
    if manifest.inputs != second.inputs {
        lines.push(inputs_differ(&manifest, &second));
    }
    if manifest.tokenizer != second.tokenizer {
        lines.push("the tokenizer is another one".to_owned());
    }
    let mut same_bytes = true;
    for (name, table) in &manifest.tables {
        match second.tables.get(name) {
            Some(other) if other.digest == table.digest && other.rows == table.rows => {}
            _ => lines.push(format!("table {name} has other rows")),
        }
    }
    let of = |part: &'static str| manifest.files.iter().filter(move |file| file.name.starts_with(part));
    let files: Vec<&File> = of("data/").chain(of("heldout/")).collect();
    let twin = |file: &&File| second.files.iter().find(|other| other.name == file.name);
    // GPUs add up in another order each time, unless train.deterministic is set
    let same = of("checkpoint/").all(|file| twin(&file).is_some_and(|other| other.blake3 == file.blake3));
    let checkpoint = match of("checkpoint/").count() {
        0 => "",
        _ if same => ", and so has the checkpoint",
        _ => "; the checkpoint has others",
    };
    for file in &files {
        match twin(file) {
            Some(other) => same_bytes &= other.blake3 == file.blake3,
            None => lines.push(format!("{} is missing", file.name)),
        }
    }
    let text = if lines.is_empty() && same_bytes {
        format!("reproduced: {} files, the same bytes{checkpoint}", files.len())
    } else if lines.is_empty() {
        "reproduced: the same rows, in other bytes (another Parquet or zstd library wrote them)".to_owned()
    } else {
        lines.join("\n")
    };
    let printed = print(
        arguments.json,
        &json!({ "same_rows": lines.is_empty(), "same_bytes": same_bytes && lines.is_empty(), "same_checkpoint": same, "differences": lines }),
        || text,
    );
    if lines.is_empty() {
        printed
    } else {
        Err(Error::Differs(format!("{} was not reproduced", manifest.run)))
    }
}

async fn go(again: &Run) -> Result<RunManifest> {
    let Some(url) = run::go(again, None).await? else {
        unreachable!("the run goes to its end");
    };
    publish::read(&run_folder(&url)?).await
}

fn inputs_differ(before: &RunManifest, now: &RunManifest) -> String {
    let changed: Vec<&str> = before
        .inputs
        .iter()
        .filter(|input| !now.inputs.contains(input))
        .map(|input| input.url.as_str())
        .collect();
    let new = now.inputs.iter().filter(|input| !before.inputs.iter().any(|b| b.url == input.url)).count();
    format!(
        "inputs differ: {} changed or gone ({}), {new} new",
        changed.len(),
        changed.iter().take(5).cloned().collect::<Vec<_>>().join(", ")
    )
}

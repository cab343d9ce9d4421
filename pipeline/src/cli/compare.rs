//! `lengthwise compare`

use clap::Args;

use super::{ConfArguments, print, run_folder, write};
use crate::compare::{Comparison, Side, compare};
use crate::dataflow::Flow;
use crate::report::{comparison, slide};
use crate::run::Goal;
use crate::stage::Stage;
use crate::storage::Location;
use crate::{Error, Result};

#[derive(Args)]
#[command(after_help = "Examples:
  lengthwise compare RUN RUN --html difference.html
  lengthwise compare conf/original.toml conf/mine.toml
  lengthwise compare conf/corpus.toml --at main..HEAD")]
pub struct CompareArguments {
    /// Directories of runs, or confs that were run; the first is what the others are compared with
    #[arg(required = true)]
    targets: Vec<String>,
    /// Compare one conf as it is at two commits
    #[arg(long, value_name = "COMMIT..COMMIT")]
    at: Option<String>,
    /// Set a key of all confs
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    #[command(flatten)]
    output: OutputArguments,
}

/// Where a comparison goes.
#[derive(Args)]
pub struct OutputArguments {
    /// Write the comparison as a page into this file
    #[arg(long, value_name = "FILE")]
    html: Option<std::path::PathBuf>,
    /// Draw the comparison as SVG for a slide into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<std::path::PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub async fn main(arguments: CompareArguments) -> Result<()> {
    let mut folders = vec![];
    match &arguments.at {
        None if arguments.targets.len() < 2 => {
            return Err(Error::usage(
                "there is nothing to compare with",
                "name two runs or confs, or use --at A..B",
            ));
        }
        None => {
            for target in &arguments.targets {
                folders.push((target.clone(), folder(target, &arguments.sets, None).await?));
            }
        }
        Some(commits) => {
            let wrong =
                || Error::usage(format!("--at {commits} is not COMMIT..COMMIT"), "write --at main..HEAD");
            let (before, after) = commits.split_once("..").ok_or_else(wrong)?;
            let [conf] = &arguments.targets[..] else {
                return Err(Error::usage("--at compares one conf", "name one conf, and two commits"));
            };
            for commit in [before, after] {
                let at = folder(conf, &arguments.sets, Some(commit)).await?;
                folders.push((commit.to_owned(), at));
            }
        }
    }
    let mut sides = vec![];
    for (name, folder) in folders {
        sides.push(Side::read(name, &folder).await?);
    }
    // what they are called in their confs says more than where they are, if it tells them apart
    let names: Vec<String> = sides.iter().map(|side| side.manifest.conf.run.name.clone()).collect();
    let different: std::collections::BTreeSet<&String> = names.iter().collect();
    if arguments.at.is_none() {
        let all = different.len() == names.len();
        for (side, name) in sides.iter_mut().zip(&names) {
            side.name = if all { name.clone() } else { side.manifest.run.clone() };
        }
        // one run in two outputs
        for i in 0..sides.len() {
            let same = sides[..i].iter().filter(|side| side.manifest.run == sides[i].manifest.run).count();
            if same > 0 {
                sides[i].name += &format!(" ({})", same + 1);
            }
        }
    }
    arguments.output.print(&sides)
}

impl OutputArguments {
    pub fn print(&self, sides: &[Side]) -> Result<()> {
        let compared: Comparison = compare(sides);
        if let Some(path) = &self.html {
            let html = comparison::comparison(sides, &compared);
            write(path, html)?;
        }
        if let Some(path) = &self.svg {
            let picture = slide::svg(&compared.names.join(" · "), &slide::comparison(sides, &compared))?;
            write(path, picture)?;
        }
        print(self.json, &compared, || comparison::text(&compared))
    }
}

/// The directory of a run, or of the run of a conf.
async fn folder(target: &str, sets: &[String], at: Option<&str>) -> Result<Location> {
    if !target.ends_with(".toml") {
        return run_folder(target);
    }
    let conf = ConfArguments { conf: target.to_owned(), sets: sets.to_vec(), at: at.map(str::to_owned) };
    let run = conf.open(Goal::Look)?;
    let mut flow = Flow::default();
    flow.go(&run, Some(Stage::Train)).await?;
    let dataset = flow.dataset().ok_or_else(|| {
        Error::usage(format!("{target} has no packed dataset"), "`lengthwise run` makes one")
    })?;
    Ok(dataset.folder(&run))
}

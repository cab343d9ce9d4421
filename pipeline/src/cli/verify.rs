//! `lengthwise verify`

use clap::Args;
use indicatif::HumanCount;

use super::{print, run_folder};
use crate::sql::engine::Engine;
use crate::{Result, directory, verify};

#[derive(Args)]
pub struct VerifyArguments {
    /// The directory of a run, as `lengthwise run` prints it
    run: String,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub async fn main(arguments: VerifyArguments) -> Result<()> {
    let folder = run_folder(&arguments.run)?;
    let manifest = directory::read(&folder).await?;
    let conf = &manifest.conf.engine;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let engine = Engine::new(conf.partitions.unwrap_or(cores), conf.memory.0, None)?;
    let seen = |what: &str| tracing::debug!("verifying {what}");
    let verdict = verify::verify(&folder, &manifest, &engine, seen).await?;
    let printed = print(arguments.json, &verdict, || {
        let mut lines: Vec<String> = verdict.wrong.iter().map(|wrong| format!("wrong: {wrong}")).collect();
        lines.extend(
            verdict.withdrawn.iter().map(|at| format!("withdrawn: {at}; `lengthwise run` computes it again")),
        );
        if verdict.wrong.is_empty() {
            lines.push(format!(
                "{} is whole: {} files, {} bytes, {} rows as their manifests say",
                manifest.run,
                HumanCount(verdict.files),
                HumanCount(verdict.bytes),
                HumanCount(verdict.rows)
            ));
        }
        lines.join("\n")
    });
    if verdict.wrong.is_empty() { printed } else { Err(verify::error(&verdict)) }
}

//! `lengthwise verify`

use clap::Args;
use indicatif::HumanCount;

use super::{print, run_folder};
use crate::{Result, publish, verify};

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
    let manifest = publish::read(&folder).await?;
    let verdict = verify::verify(&folder, &manifest, |what| tracing::debug!("verifying {what}")).await?;
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

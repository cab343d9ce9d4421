//! `lengthwise report`

use clap::Args;

use super::run_folder;
use crate::directory;
use crate::storage::json_lines;
use crate::{Result, report};

#[derive(Args)]
pub struct ReportArguments {
    /// The directory of a run, as `lengthwise run` prints it
    run: String,
    /// Write to this file instead of stdout
    #[arg(long, short)]
    output: Option<std::path::PathBuf>,
}

pub async fn main(arguments: ReportArguments) -> Result<()> {
    let folder = run_folder(&arguments.run)?;
    let manifest = directory::read(&folder).await?;
    let attempts = directory::attempts(&folder).await?.into_iter();
    // the attempt that did the most work tells the most
    let longest = attempts.max_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let attempt = longest.unwrap_or_default();
    let metrics = folder.join("checkpoint/metrics.jsonl").get().await?.unwrap_or_default();
    let metrics: Vec<serde_json::Value> = json_lines(&metrics).flatten().collect();
    let html = report::html(&manifest, &attempt, &metrics);
    match arguments.output {
        Some(path) => super::write(&path, html),
        None => super::print(false, &(), || html),
    }
}

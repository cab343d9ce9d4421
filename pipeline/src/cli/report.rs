//! `lengthwise report`

use clap::Args;

use super::run_folder;
use crate::publish::{self, Attempt};
use crate::store::json_lines;
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
    let manifest = publish::read(&folder).await?;
    let mut attempts = folder.join("attempts").list().await?;
    attempts.sort_by(|a, b| a.location.cmp(&b.location));
    // the attempt that did the most work tells the most
    let mut longest: Option<Attempt> = None;
    for meta in attempts {
        let at = folder.join("attempts").join(meta.location.filename().unwrap_or_default());
        let Some(attempt) = at.get().await?.and_then(|bytes| serde_json::from_slice::<Attempt>(&bytes).ok())
        else {
            continue;
        };
        if longest.as_ref().is_none_or(|longest| attempt.seconds > longest.seconds) {
            longest = Some(attempt);
        }
    }
    let attempt = longest.unwrap_or(Attempt {
        started: String::new(),
        seconds: 0.0,
        host: String::new(),
        cores: 0,
        steps: vec![],
    });
    let metrics = folder.join("checkpoint/metrics.jsonl").get().await?.unwrap_or_default();
    let metrics: Vec<serde_json::Value> = json_lines(&metrics).flatten().collect();
    let html = report::html(&manifest, &attempt, &metrics);
    match arguments.output {
        Some(path) => super::write(&path, html),
        None => super::print(false, &(), || html),
    }
}

//! `lengthwise gc`

use clap::Args;
use indicatif::HumanBytes;
use serde_json::json;

use super::{ConfArguments, print, run_folder};
use crate::gc::{collect, leftovers};
use crate::run::Goal;
use crate::{Error, Result};

#[derive(Args)]
#[command(after_help = "Examples:
  lengthwise gc s3://bucket/lengthwise --dry-run
  lengthwise gc conf/x.toml --older-than 30d")]
pub struct GcArguments {
    /// Where runs write, or a conf that says so
    output: String,
    /// What is younger stays, and so does its folder
    #[arg(long, value_name = "AGE", default_value = "7d")]
    older_than: String,
    /// Only say what would go
    #[arg(long)]
    dry_run: bool,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub async fn main(arguments: GcArguments) -> Result<()> {
    let before = jiff::Timestamp::now().as_second() - seconds(&arguments.older_than)?;
    let output = match arguments.output.ends_with(".toml") {
        true => {
            let conf = ConfArguments { conf: arguments.output.clone(), sets: vec![], at: None };
            conf.open(Goal::Look)?.output
        }
        false => run_folder(&arguments.output)?,
    };
    let below = output.store.list_with_delimiter(Some(&output.path)).await;
    let below = below.map_err(|source| Error::Storage { doing: "list", url: output.url(), source })?;
    let ours =
        |path: &object_store::path::Path| ["stages", "runs"].contains(&path.filename().unwrap_or_default());
    if !below.common_prefixes.iter().any(ours) {
        tracing::warn!("there are no runs in {}: is it where confs have their `run.output`?", output.url());
    }
    let mut gone = vec![];
    if arguments.dry_run {
        gone = leftovers(&output, before).await?;
    } else {
        collect(&output, before, |leftover| gone.push(leftover.clone())).await?;
    }
    let bytes: u64 = gone.iter().map(|leftover| leftover.bytes).sum();
    let value =
        json!({ "output": output.url(), "removed": !arguments.dry_run, "bytes": bytes, "leftovers": gone });
    print(arguments.json, &value, || {
        let mut lines: Vec<String> = gone.iter().map(|leftover| leftover.path.clone()).collect();
        let done = if arguments.dry_run { "to remove" } else { "removed" };
        lines.push(format!("{} files, {} {done}", gone.len(), HumanBytes(bytes)));
        lines.join("\n")
    })
}

/// An age as people write it: 7d, 12h, 30m.
fn seconds(age: &str) -> Result<i64> {
    let wrong =
        || Error::usage(format!("--older-than {age} is not an age"), "write --older-than 7d, 12h or 30m");
    let span: jiff::Span = age.parse().map_err(|_| wrong())?;
    let day = jiff::SpanRelativeTo::days_are_24_hours();
    let seconds = span.total((jiff::Unit::Second, day)).map_err(|_| wrong())?;
    if seconds < 0.0 { Err(wrong()) } else { Ok(seconds as i64) }
}

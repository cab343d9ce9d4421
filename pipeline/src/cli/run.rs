//! `lengthwise run`

use clap::Args;
use serde_json::json;

use super::{ConfArguments, print, until_stopped};
use crate::flow::{Flow, remember};
use crate::run::{Goal, Run, Stage};
use crate::{Error, Result};

#[derive(Args)]
pub struct RunArguments {
    #[command(flatten)]
    conf: ConfArguments,
    /// Stop after this stage
    #[arg(long, value_name = "STAGE")]
    until: Option<Stage>,
    /// Compute this stage and all after it again, and compare with what is there
    #[arg(long, value_name = "STAGE")]
    from: Option<Stage>,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

pub async fn main(arguments: RunArguments) -> Result<()> {
    if let (Some(from), Some(until)) = (arguments.from, arguments.until)
        && from > until
    {
        let message =
            format!("--from {} comes after --until {}: nothing would be computed", from.name(), until.name());
        return Err(Error::data(
            message,
            "stages are, in order: tokenizer, tokens, catalog, domains, mixture, draw, shuffle, pack, train",
        ));
    }
    let run = arguments.conf.open(Goal::Compute { from: arguments.from })?;
    let started = jiff::Timestamp::now();
    let folder = until_stopped(&run, go(&run, arguments.until, started)).await?;
    let steps = run.steps.lock().expect("no panic while held").clone();
    print(arguments.json, &json!({ "run": folder, "stages": steps }), || folder.clone().unwrap_or_default());
    Ok(())
}

/// `lengthwise train`
#[cfg(feature = "train")]
pub async fn train(arguments: RunArguments) -> Result<()> {
    let run = arguments.conf.open(Goal::Compute { from: None })?;
    if run.conf.train.is_none() {
        return Err(Error::data("the conf has no [train] table", "add one, or use `lengthwise run`"));
    }
    main(arguments).await
}

/// Runs to the end or to `until`; the run's directory, where it came to one.
pub async fn go(run: &Run, until: Option<Stage>, started: jiff::Timestamp) -> Result<Option<String>> {
    let mut flow = Flow::default();
    let gone = flow.go(run, until).await;
    let remembered = remember(run).await;
    gone?;
    remembered?;
    for step in run.steps.lock().expect("no panic while held").iter() {
        let how = if step.cached { "was there".to_owned() } else { format!("took {:.1} s", step.seconds) };
        tracing::info!("{}: {how}", step.stage);
    }
    if flow.packed.is_none() || until.is_some_and(|until| until < Stage::Pack) {
        return Ok(None);
    }
    run.check_stop()?;
    let (folder, _) = flow.publish(run, started).await?;
    Ok::<_, Error>(Some(folder.url()))
}

//! `lengthwise preview`

use clap::Args;
use serde_json::json;

use super::{ConfArguments, print, until_stopped};
use crate::algorithms::strata::Sums;
use crate::dataflow::Flow;
use crate::preview::{Preview, against};
use crate::run::{Goal, Run};
use crate::stage::Stage;
use crate::stages::mixture::{check_budget, recipe, span_join};
use crate::{Result, dataflow::remember};

#[derive(Args)]
pub struct PreviewArguments {
    #[command(flatten)]
    conf: ConfArguments,
    /// Show this conf's mixture beside it, with the differences in points
    #[arg(long, value_name = "CONF")]
    against: Option<String>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub async fn main(arguments: PreviewArguments) -> Result<()> {
    let run = arguments.conf.open(Goal::Compute { from: None })?;
    let preview = until_stopped(&run, of(&run)).await?;
    let Some(other) = &arguments.against else {
        return print(arguments.json, &preview, || preview.text());
    };
    // --set is for the first conf alone
    let other = ConfArguments { conf: other.clone(), sets: vec![], at: arguments.conf.at.clone() };
    let other_run = other.open(Goal::Compute { from: None })?;
    let second = until_stopped(&other_run, of(&other_run)).await?;
    let sides = [(arguments.conf.conf.as_str(), &preview), (other.conf.as_str(), &second)];
    print(arguments.json, &json!({ "a": preview, "b": second }), || against(sides[0], sides[1]))
}

/// Runs what the recipe reads, if it isn't there, and then the recipe, keeping nothing but sums.
pub async fn of(run: &Run) -> Result<Preview> {
    let mut flow = Flow::default();
    flow.go(run, Some(Stage::Domains)).await?;
    remember(run).await?;
    let (Some(catalog), Some((described, domains))) = (&flow.catalog, &flow.domains) else {
        unreachable!("the flow went to the domains");
    };
    let (_, bound) = recipe(run)?;
    let mut span_join = span_join(run, catalog, described, &bound).await?;
    let mut sums = Sums::new(run.conf.mixture.long_tokens.0, run.conf.mixture.max_copies);
    while span_join
        .step(&mut |span| {
            sums.add(&span);
            Ok(())
        })
        .await?
    {}
    let asked = sums.asked();
    let mut preview = Preview::new(&run.conf.mixture, domains, &asked);
    if let Err(refused) = check_budget(run, &asked, domains) {
        preview.shortfalls.push(format!("`lengthwise run` will refuse this: {refused}"));
    }
    Ok(preview)
}

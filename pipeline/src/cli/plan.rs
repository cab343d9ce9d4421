//! `lengthwise plan`

use std::fmt::Write;

use clap::Args;
use serde_json::{Value, json};

use super::{ConfArguments, print};
use crate::dataflow::{Flow, latest_of};
use crate::output::Ingredients;
use crate::run::{Goal, Run};
use crate::stage::{About, STAGES, Stage};
use crate::{Error, Result};

#[derive(Args)]
pub struct PlanArguments {
    #[command(flatten)]
    conf: ConfArguments,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub async fn main(arguments: PlanArguments) -> Result<()> {
    let run = arguments.conf.open(Goal::Look)?;
    let latest = latest_of(&run).get().await?.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    let mut flow = Flow::default();
    let absent = match flow.go(&run, None).await {
        Ok(()) => None,
        Err(Error::Absent { stage, ingredients, .. }) => Some((stage, ingredients)),
        Err(other) => return Err(other),
    };
    let steps = run.steps.lock().expect("no panic while held").clone();
    let mut lines: Vec<(&str, &str, String)> = vec![];
    for About { stage, name, .. } in STAGES {
        let unused = (stage == Stage::Tokenizer && run.conf.tokenizer.train.is_none())
            || (stage == Stage::Train && run.conf.train.is_none())
            || (stage == Stage::Eval && run.conf.eval.is_none());
        let (state, why) = if unused {
            ("not asked for", String::new())
        } else if let Some((_, ingredients)) = absent.as_ref().filter(|(absent, _)| *absent == name) {
            ("to compute", changes(name, ingredients, latest.as_ref()))
        } else if let Some(step) = steps.iter().find(|step| step.stage.split(' ').next() == Some(name)) {
            ("cached", step.key.clone())
        } else if stage == Stage::Shuffle && steps.iter().any(|step| step.stage == "pack") {
            ("not needed", "what it is for is packed".to_owned())
        } else {
            ("to compute", "waits for the stages before it".to_owned())
        };
        lines.push((name, state, why));
    }
    let values: Vec<Value> =
        lines.iter().map(|(stage, state, why)| json!({"stage": stage, "state": state, "why": why})).collect();
    let training = training(&run).await;
    let needs = training.as_ref().map(|(needs, _)| needs);
    print(arguments.json, &json!({ "stages": values, "training": needs }), || {
        let mut out = lines.iter().fold(String::new(), |mut out, (stage, state, why)| {
            let _ = writeln!(out, "{stage:<10} {state:<14} {why}");
            out
        });
        if let Some((_, text)) = &training {
            let _ = write!(out, "\n{text}");
        }
        out
    })
}

/// What the training needs, for a machine and for a person.
#[cfg(feature = "train")]
async fn training(run: &Run) -> Option<(Value, String)> {
    match crate::stages::train::plan(run).await {
        Ok(plan) => plan.map(|plan| (json!(plan), plan.text())),
        Err(error) => {
            Some((Value::Null, format!("training: what it needs can't be said: {}", error.in_a_line())))
        }
    }
}

#[cfg(not(feature = "train"))]
async fn training(_: &Run) -> Option<(Value, String)> {
    None
}

/// Which ingredients are not those of the last run under this name.
fn changes(stage: &str, now: &Ingredients, latest: Option<&Value>) -> String {
    let Some(before) = latest.and_then(|latest| latest.get(stage)?.get("ingredients")?.as_object()) else {
        return "was never computed under this name".to_owned();
    };
    let names = now.keys().chain(before.keys().filter(|name| !now.contains_key(*name)));
    let changed: Vec<&str> =
        names.filter(|name| now.get(*name) != before.get(*name)).map(String::as_str).collect();
    match changed.as_slice() {
        [] => "its output is gone".to_owned(),
        changed => format!("changed: {}", changed.join(", ")),
    }
}

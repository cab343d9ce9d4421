//! `lengthwise sweep`

use clap::Args;

use super::compare::OutputArguments;
use super::{ConfArguments, run, run_folder};
use crate::compare::Side;
use crate::run::{Goal, Run};
use crate::sql::recipe::Recipe;
use crate::stages::mixture;
use crate::{Error, Result};

#[derive(Args)]
#[command(after_help = "Examples:
  lengthwise sweep conf/quickstart.toml --recipes cut_128k,per_source,global --html sweep.html
  lengthwise sweep conf/corpus.toml --recipes cut_128k,upsample_domain:domain=RedPajamaBook --seeds 3")]
pub struct SweepArguments {
    #[command(flatten)]
    conf: ConfArguments,
    /// Recipes by name or file, each with parameters if need be: cut_128k,upsample_domain:domain=RedPajamaBook:weight=0.6. The first is
    /// what the others are compared with
    #[arg(long, value_name = "RECIPE,…", value_delimiter = ',', required = true)]
    recipes: Vec<String>,
    /// Do all with so many seeds, to see how much of a difference is chance
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    seeds: u16,
    #[command(flatten)]
    output: OutputArguments,
}

pub async fn main(arguments: SweepArguments) -> Result<()> {
    // all of them are read before the first one begins
    let mut runs = vec![];
    for seed in 0..arguments.seeds {
        for recipe in &arguments.recipes {
            let (name, run) = open(&arguments, recipe, seed)?;
            if runs.iter().any(|(other, of, _)| *other == name && *of == seed) {
                let help =
                    "recipes are told apart by their files' names and parameters: give one another name";
                return Err(Error::usage(format!("two recipes of --recipes are called {name}"), help));
            }
            runs.push((name, seed, run));
        }
    }
    // what is wrong with one of them is said before the others have trained
    let all = runs.len();
    for (i, (name, seed, run)) in runs.iter_mut().enumerate() {
        run.begin();
        tracing::info!("sweep: the mixture of {name} with seed {}, {} of {all}", *seed + 1, i + 1);
        run::go_ahead(run).await?;
    }
    let mut sides = vec![];
    for (name, seed, mut run) in runs {
        run.begin();
        tracing::info!("sweep: {name} with seed {}, {} of {all}", seed + 1, sides.len() + 1);
        let Some(folder) = run::go(&run, None).await? else { unreachable!("the run goes to its end") };
        sides.push(Side::read(name, &run_folder(&folder)?).await?);
    }
    arguments.output.print(&sides)
}

/// The run of a recipe with a seed, and what it is called.
fn open(arguments: &SweepArguments, recipe: &str, seed: u16) -> Result<(String, Run)> {
    let mut parts = recipe.split(':');
    let file = parts.next().unwrap_or_default();
    let path = if file.ends_with(".sql") { file.to_owned() } else { format!("sql/mixtures/{file}.sql") };
    let stem = std::path::Path::new(&path).file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut name = stem;
    let mut conf = arguments.conf.clone();
    conf.sets.push(format!("mixture.recipe={path}"));
    let mut given = vec![];
    for part in parts {
        let Some((key, value)) = part.split_once('=') else {
            let message = format!("`{part}` of --recipes {recipe} is not PARAMETER=VALUE");
            return Err(Error::usage(message, "write --recipes upsample_domain:domain=RedPajamaBook"));
        };
        conf.sets.push(format!("mixture.params.{key}={value}"));
        given.push(key);
        name += &format!("-{value}");
    }
    let mut run = conf.open(Goal::Compute { from: None })?;
    if arguments.seeds > 1 {
        run.conf.run.seed += u64::from(seed);
        if let Some(train) = &mut run.conf.train {
            let before = train.get("seed").and_then(toml::Value::as_integer).unwrap_or(0);
            train.insert("seed".into(), (before + i64::from(seed)).into());
        }
    }
    // runs of one name are the same with other seeds; the name becomes a folder's, whatever a parameter has in it
    let plain: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect();
    run.conf.run.name = match arguments.seeds {
        1 => format!("{}-{plain}", run.conf.run.name),
        _ => format!("{}-{plain}-{}", run.conf.run.name, seed + 1),
    };
    // parameters of the conf are for its own recipe; another one takes those that it knows
    let text = run.files.read(&path).map_err(|e| {
        let help = "--recipes names files of sql/mixtures/ without their .sql, or files by path";
        Error::usage(format!("--recipes {recipe}: {e}"), help)
    })?;
    let parsed = Recipe::parse(&path, &text)?;
    run.conf
        .mixture
        .params
        .retain(|key, _| given.contains(&key.as_str()) || parsed.parameters.iter().any(|p| p.name == *key));
    run.conf = run.conf.resolved()?;
    mixture::recipe(&run)?;
    Ok((name, run))
}

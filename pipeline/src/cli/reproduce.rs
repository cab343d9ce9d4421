//! `lengthwise reproduce`

use std::path::Path;

use clap::Args;
use serde_json::json;

use super::{print, run, run_folder};
use crate::directory::{self, Build, RunManifest, output_of};
use crate::hash::Digest;
use crate::output::File;
use crate::run::{Goal, Run};
use crate::sql::Files;
use crate::stage::Stage;
use crate::storage::Location;
use crate::verify::digest_of;
use crate::{Error, Result};

#[derive(Args)]
pub struct ReproduceArguments {
    /// The directory of a run, as `lengthwise run` prints it
    run: String,
    /// The output to run into; `reproduced` beside the run's stages by default. All of it is computed anew each time
    #[arg(long, value_name = "URL")]
    into: Option<String>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub async fn main(arguments: ReproduceArguments) -> Result<()> {
    let folder = run_folder(&arguments.run)?;
    let manifest = directory::read(&folder).await?;
    let build = manifest.build.differences(&Build::this());
    for difference in &build {
        tracing::warn!("{difference}");
    }
    let mut conf = manifest.conf.clone();
    conf.run.output = arguments.into.unwrap_or_else(|| output_of(&folder).join("reproduced").url());
    let root = std::env::current_dir()
        .map_err(|source| Error::Io { doing: "cannot tell the current folder".into(), source })?;
    let files = Files { root, commit: None, texts: manifest.sql.clone() };
    // what an earlier one left there is no proof of anything
    let again = Goal::Compute { from: Some(Stage::Tokenizer) };
    let mut again = Run::new(conf, &manifest.conf_file, files, again)?;
    let (into, output) = (place_of(&again.output), place_of(&output_of(&folder)));
    if into == output || ["stages", "runs"].iter().any(|own| below(&into, &format!("{output}/{own}"))) {
        return Err(Error::usage(
            "--into names the output that the run itself is in",
            "name another place: what is compared would be overwritten",
        ));
    }
    again.outputs.push(output_of(&folder));
    let (second_folder, second) = go(&again).await?;

    let mut lines = vec![];
    if manifest.inputs != second.inputs {
        lines.push(inputs_differ(&manifest, &second));
    }
    if manifest.tokenizer != second.tokenizer {
        lines.push("the tokenizer is another one".to_owned());
    }
    let of = |part: &'static str| manifest.files.iter().filter(move |file| file.name.starts_with(part));
    let mut compared = Compared::default();
    for file in of("data/").chain(of("heldout/")) {
        compared.packed(file, &folder, &second_folder, &second).await?;
    }
    for file in second.files.iter().filter(|file| !manifest.files.iter().any(|f| f.name == file.name)) {
        compared.wrong.push(format!("{} is new", file.name));
    }
    // GPUs add up in another order each time, unless train.deterministic is set
    let (mut trained, mut same_checkpoint) = (false, true);
    for file in of("checkpoint/") {
        trained = true;
        let (_, twin) = compared.digests(file, &folder, &second).await?;
        same_checkpoint &= twin.is_some_and(|twin| twin == file.blake3);
    }
    let Compared { files, same_bytes, wrong } = compared;
    lines.extend(wrong);
    let checkpoint = match same_checkpoint {
        _ if !trained => "",
        true => ", and so has the checkpoint",
        false => "; the checkpoint has others",
    };
    let same_rows = lines.is_empty();
    let mut text = if same_rows && same_bytes {
        format!("reproduced: {files} files, the same bytes{checkpoint}")
    } else if same_rows {
        "reproduced: the same rows, in other bytes (another Parquet or zstd library wrote them)".to_owned()
    } else {
        lines.join("\n")
    };
    if !build.is_empty() {
        text += &format!("\nby another build:\n  {}", build.join("\n  "));
    }
    let value = json!({
        "same_rows": same_rows,
        "same_bytes": same_bytes && same_rows,
        "same_checkpoint": same_checkpoint,
        "differences": lines,
        "build": build,
    });
    let printed = print(arguments.json, &value, || text);
    if same_rows { printed } else { Err(Error::Differs(format!("{} was not reproduced", manifest.run))) }
}

/// Where a location really is, by whatever links it is named.
fn place_of(at: &Location) -> String {
    let url = at.url();
    if !url.starts_with('/') {
        return url;
    }
    // what isn't there yet will be below what is
    let whole = Path::new(&url);
    let there = whole.ancestors().find_map(|path| Some((path.canonicalize().ok()?, path)));
    let real = there.map(|(real, path)| real.join(whole.strip_prefix(path).unwrap_or(path)));
    real.map_or(url.clone(), |real| real.to_string_lossy().trim_end_matches('/').to_owned())
}

fn below(place: &str, folder: &str) -> bool {
    place.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// What a comparison of the two runs' files came to. The first run's are read as they lie there.
struct Compared {
    files: usize,
    same_bytes: bool,
    /// A line each.
    wrong: Vec<String>,
}

impl Default for Compared {
    fn default() -> Self {
        Self { files: 0, same_bytes: true, wrong: vec![] }
    }
}

impl Compared {
    /// The digest of a file as it lies there, and that of its twin. Says where it is not what its manifest says.
    async fn digests(
        &mut self,
        file: &File,
        folder: &Location,
        second: &RunManifest,
    ) -> Result<(Option<Digest>, Option<Digest>)> {
        let at = folder.join(&file.name);
        let there = match at.head().await? {
            Some(_) => Some(at.digest().await?),
            None => None,
        };
        if there != Some(file.blake3) {
            let how = if there.is_some() { "is not what its manifest says" } else { "is gone" };
            self.wrong.push(format!("{} {how}; `lengthwise verify` withdraws what is broken", at.url()));
        }
        let twin = second.files.iter().find(|other| other.name == file.name);
        Ok((there, twin.map(|twin| twin.blake3)))
    }

    /// Compares a packed file with its twin: its bytes, or else its rows.
    async fn packed(
        &mut self,
        file: &File,
        folder: &Location,
        second_folder: &Location,
        second: &RunManifest,
    ) -> Result<()> {
        self.files += 1;
        let (there, twin) = self.digests(file, folder, second).await?;
        let Some(twin) = twin else {
            self.wrong.push(format!("{} was not made again", file.name));
            return Ok(());
        };
        if there == Some(twin) {
            return Ok(());
        }
        self.same_bytes = false;
        let rows = async |folder: &Location| {
            let bytes = folder.join(&file.name).get().await?.unwrap_or_default();
            // one that can't be read has no rows, and was said to be broken
            Ok::<_, Error>(digest_of(bytes).ok())
        };
        if rows(folder).await? != rows(second_folder).await? {
            self.wrong.push(format!("{} has other rows", file.name));
        }
        Ok(())
    }
}

async fn go(again: &Run) -> Result<(Location, RunManifest)> {
    let Some(url) = run::go(again, None).await? else {
        unreachable!("the run goes to its end");
    };
    let folder = run_folder(&url)?;
    let manifest = directory::read(&folder).await?;
    Ok((folder, manifest))
}

fn inputs_differ(before: &RunManifest, now: &RunManifest) -> String {
    let changed: Vec<&str> = before
        .inputs
        .iter()
        .filter(|input| !now.inputs.contains(input))
        .map(|input| input.url.as_str())
        .collect();
    let new = now.inputs.iter().filter(|input| !before.inputs.iter().any(|b| b.url == input.url)).count();
    format!(
        "inputs differ: {} changed or gone ({}), {new} new",
        changed.len(),
        changed.iter().take(5).copied().collect::<Vec<_>>().join(", ")
    )
}

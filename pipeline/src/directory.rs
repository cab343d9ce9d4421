//! The directory of a run: what a person, a trainer and `verify` find.
//!
//! ```text
//! <output>/runs/<name>-<hash of its last stages' keys>/
//!     data/train-00000-of-000NN.parquet    heldout/heldout-….parquet    checkpoint/…
//!     report.html    attempts/<time>.json: machines and times, outside every hash
//!     manifest.json                        written last, if absent
//! ```

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::algorithms::strata::Asked;
use crate::conf::Conf;
use crate::hash::Digest;
use crate::output::{self, File, Input, Published, StageKey, Table};
use crate::run::{Run, Step};
use crate::source::Unread;
use crate::sql::git;
use crate::stages::domains::Domain;
use crate::stages::shuffle::Planned;
use crate::storage::Location;
use crate::storage::sealed;
use crate::{Error, Result};

/// All that a run was made of and all that it made. Nothing in it says when or where.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct RunManifest {
    /// The run's id: its name, and a hash of its last stages' keys.
    pub run: String,
    pub build: Build,
    /// The git commit of the folder that conf and SQL were read from, where it is one.
    pub commit: Option<String>,
    /// Whether tracked files differed from that commit.
    pub dirty: bool,
    /// The path of the conf.
    pub conf_file: String,
    /// The resolved conf, with all defaults.
    #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
    pub conf: Conf,
    /// The texts of the recipe, the checks and the stages' SQL, by path.
    pub sql: BTreeMap<String, String>,
    /// The sources' files that were read.
    pub inputs: Vec<Input>,
    /// What looked like data where a source's files are, and was not read, by the source's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub not_read: BTreeMap<String, Vec<Unread>>,
    /// The digest of the tokenizer.
    pub tokenizer: Digest,
    /// The keys of the stages, in order.
    pub stages: Vec<StageKey>,
    /// Files of this directory, by path.
    pub files: Vec<File>,
    /// Digests of rows of the packed tables, whatever library wrote their bytes.
    pub tables: BTreeMap<String, Table>,
    pub summary: Summary,
}

/// What a program is made of, as far as what it computes may depend on it.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, JsonSchema)]
pub struct Build {
    /// The version of lengthwise.
    pub lengthwise: String,
    /// A digest of its sources, and of the SQL in it.
    pub sources: String,
    /// Libraries and their versions.
    pub libraries: BTreeMap<String, String>,
}

impl Build {
    /// This program's.
    pub fn this() -> Self {
        let libraries = env!("LENGTHWISE_LIBRARIES").split(',').filter_map(|library| library.split_once(' '));
        Self {
            lengthwise: env!("CARGO_PKG_VERSION").to_owned(),
            sources: env!("LENGTHWISE_SOURCES").to_owned(),
            libraries: libraries.map(|(name, version)| (name.to_owned(), version.to_owned())).collect(),
        }
    }

    /// What differs from another build, a line each.
    pub fn differences(&self, other: &Build) -> Vec<String> {
        let mut lines = vec![];
        let mut differ = |what: &str, a: Option<&String>, b: Option<&String>| {
            if a != b {
                let shown = |version: Option<&String>| version.map_or("none", String::as_str).to_owned();
                lines.push(format!("{what}: {} then, {} now", shown(a), shown(b)));
            }
        };
        differ("lengthwise", Some(&self.lengthwise), Some(&other.lengthwise));
        differ("digest of lengthwise's sources", Some(&self.sources), Some(&other.sources));
        let names: BTreeSet<&String> = self.libraries.keys().chain(other.libraries.keys()).collect();
        for name in names {
            differ(name, self.libraries.get(name), other.libraries.get(name));
        }
        lines
    }
}

/// The run in numbers, for the report and for comparisons.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Summary {
    /// Numbers by name: documents, tokens, duplicates, rejects and more.
    pub counts: BTreeMap<String, u64>,
    /// The domains of the corpus.
    pub domains: Vec<Domain>,
    /// What the recipe asks for.
    pub asked: Asked,
    /// What was drawn.
    pub drawn: Asked,
    pub planned: Planned,
    /// What each evaluation gave.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub evaluations: BTreeMap<String, serde_json::Value>,
}

impl Summary {
    /// The one number that an evaluation comes to, if it comes to one.
    pub fn score(&self, evaluation: &str) -> Option<f64> {
        let notes = self.evaluations.get(evaluation)?;
        ["score", "f1", "accuracy"].iter().find_map(|key| notes[*key].as_f64())
    }
}

/// One attempt at a run, successful or not.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct Attempt {
    /// When it began, as RFC 3339 has it.
    pub started: String,
    /// How long it took.
    pub seconds: f64,
    /// The machine's name.
    pub host: String,
    /// How many cores the machine has.
    pub cores: usize,
    /// The stages that it went through.
    pub steps: Vec<Step>,
    /// The files it wrote into the run's directory that say when, where or how fast, or that a newer version would word in
    /// another way: report, cards and the training's logs.
    pub files: Vec<File>,
}

/// The attempts at a run, the first one first.
pub async fn attempts(folder: &Location) -> Result<Vec<Attempt>> {
    let mut listed = folder.join("attempts").list().await?;
    listed.sort_by(|a, b| a.location.cmp(&b.location));
    let mut attempts = vec![];
    for meta in listed {
        let at = folder.join("attempts").join(meta.location.filename().unwrap_or_default());
        let bytes = at.get().await?.unwrap_or_default();
        // what a manifest said before lies there, too
        attempts.extend(serde_json::from_slice::<Attempt>(&bytes).ok());
    }
    Ok(attempts)
}

/// The commit of a folder, and whether tracked files differ from it.
pub fn commit_of(run: &Run) -> (Option<String>, bool) {
    let ask = |arguments: &[&str]| {
        let output = git(&run.files.root, arguments).ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    match &run.files.commit {
        Some(commit) => (ask(&["rev-parse", commit]), false),
        None => {
            let dirty =
                ask(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| !text.is_empty());
            let untracked = [&run.conf_file, &run.conf.mixture.recipe]
                .iter()
                .any(|file| ask(&["ls-files", "--error-unmatch", file]).is_none());
            let commit = ask(&["rev-parse", "HEAD"]);
            let dirty = commit.is_some() && (dirty || untracked);
            (commit, dirty)
        }
    }
}

/// A run's id: its name and the hash of its last stages' keys, so that a killed run finds itself again.
pub fn id(name: &str, last: &[&Published]) -> String {
    let keys: Vec<&str> = last.iter().map(|stage| stage.manifest.key.as_str()).collect();
    format!("{name}-{}", &Digest::of(keys.join(" ").as_bytes()).to_string()[..12])
}

/// Copies a stage's files into a folder of the run; a hard link each where storage is local, and can.
///
/// # Errors
/// [`Error::Withdrawn`] where a file of the stage is broken.
pub async fn copy_table(from: &Published, table: &str, folder: &Location, below: &str) -> Result<Vec<File>> {
    let mut files = vec![];
    for file in from.table(table).files {
        let placed = File { name: format!("{below}/{}", file.name), ..file.clone() };
        let (own, copy) = (from.folder.join(&file.name), folder.join(&placed.name));
        if !copy.is_copy_of(&own).await? && !placed.is_sound(folder).await? {
            file.check(&from.folder).await?;
            own.copy_to(&copy).await?;
        }
        files.push(placed);
    }
    Ok(files)
}

/// The manifest in a run's directory, whether or not its files are there.
pub async fn written(folder: &Location) -> Result<Option<RunManifest>> {
    let at = folder.join("manifest.json");
    let Some(bytes) = at.get().await? else { return Ok(None) };
    let manifest = sealed::open(&bytes).map_err(|e| Error::Corrupt {
        url: at.url(),
        message: format!("it is not the manifest of a run of this version: {e}"),
    });
    manifest.map(Some)
}

/// The manifest that a person asks for by the run's directory.
pub async fn read(folder: &Location) -> Result<RunManifest> {
    written(folder).await?.ok_or_else(|| {
        Error::usage(
            format!("{} is not the directory of a finished run: it has no manifest.json", folder.url()),
            "`lengthwise run CONF` prints the directory as its last line",
        )
    })
}

/// Where a run's stages are: two folders up.
pub fn output_of(run_folder: &Location) -> Location {
    run_folder.parent().parent()
}

/// A stage of a run, by its key.
pub async fn stage_of(output: &Location, key: &StageKey) -> Result<Option<(Location, output::Manifest)>> {
    let folder = output.join("stages").join(&key.stage).join(&key.key);
    let Some(bytes) = folder.join("manifest.json").get().await? else { return Ok(None) };
    let corrupt = |message| Error::Corrupt { url: folder.join("manifest.json").url(), message };
    Ok(Some((folder.clone(), sealed::open(&bytes).map_err(corrupt)?)))
}

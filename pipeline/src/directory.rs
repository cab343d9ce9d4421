//! The directory of a run, which people, trainers and `verify` read.
//!
//! ```text
//! <output>/runs/<name>-<hash of its last stages' keys>/
//!     data/train-00000-of-000NN.parquet    heldout/heldout-….parquet    checkpoint/…
//!     report.html    attempts/<time>.json: machines and times, outside every hash
//!     manifest.json                        written last; one that it replaces is kept in attempts/
//! ```

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::algorithms::strata::Asked;
use crate::conf::Conf;
use crate::hash::Digest;
use crate::output::{self, File, Input, StageKey, Table};
use crate::run::Step;
use crate::source::Unread;
use crate::stages::domains::Domain;
use crate::stages::shuffle::Planned;
use crate::storage::{Location, sealed};
use crate::{Error, Result};

/// Everything that a run was made from, and everything that it produced. It contains no times and no machine
/// names, so that equal runs have equal manifests.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct RunManifest {
    /// The run's id: its name, and a hash of its last stages' keys.
    pub run: String,
    /// The build that computed the run.
    pub build: Build,
    /// The git commit of the folder that the conf and the SQL were read from; `None` if it is not a git
    /// repository.
    pub commit: Option<String>,
    /// Whether tracked files differed from that commit, or the conf or the recipe was not tracked.
    pub dirty: bool,
    /// The path of the conf.
    pub conf_file: String,
    /// The resolved conf, with defaults.
    #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
    pub conf: Conf,
    /// The texts of the recipe, the checks and the stages' SQL, by path.
    pub sql: BTreeMap<String, String>,
    /// The sources' files that were read.
    pub inputs: Vec<Input>,
    /// Files that look like data and lie among a source's files, but were not read, by the source's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub not_read: BTreeMap<String, Vec<Unread>>,
    /// The digest of the tokenizer.
    pub tokenizer: Digest,
    /// The keys of the stages, in order.
    pub stages: Vec<StageKey>,
    /// The files of this directory; names are relative to it.
    pub files: Vec<File>,
    /// Row counts and row digests of the packed tables, which do not depend on the library that wrote the
    /// bytes. Their `files` are empty.
    pub tables: BTreeMap<String, Table>,
    pub summary: Summary,
}

/// The parts of a program that its results may depend on.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, JsonSchema)]
pub struct Build {
    /// The version of lengthwise.
    pub lengthwise: String,
    /// A digest of its sources and of the built-in SQL.
    pub sources: String,
    /// Versions of the libraries, by name.
    pub libraries: BTreeMap<String, String>,
}

impl Build {
    /// The build of this program.
    pub fn this() -> Self {
        let libraries = env!("LENGTHWISE_LIBRARIES").split(',').filter_map(|library| library.split_once(' '));
        Self {
            lengthwise: env!("CARGO_PKG_VERSION").to_owned(),
            sources: env!("LENGTHWISE_SOURCES").to_owned(),
            libraries: libraries.map(|(name, version)| (name.to_owned(), version.to_owned())).collect(),
        }
    }

    /// The differences from a later build `other`, one line each.
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
    /// Results of the evaluations, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub evaluations: BTreeMap<String, serde_json::Value>,
}

impl Summary {
    /// The single score of an evaluation, if it has one.
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
    /// Files in the run's directory that contain times, machine names or speeds, or that a newer version may
    /// word differently: the report, the cards and the training logs.
    pub files: Vec<File>,
}

/// The attempts at a run, in the order in which they started.
pub async fn attempts(folder: &Location) -> Result<Vec<Attempt>> {
    let mut listed = folder.join("attempts").list().await?;
    listed.sort_by(|a, b| a.location.cmp(&b.location));
    let mut attempts = vec![];
    for meta in listed {
        let at = folder.join("attempts").join(meta.location.filename().unwrap_or_default());
        let bytes = at.get().await?.unwrap_or_default();
        // the folder also holds manifests that were replaced
        attempts.extend(serde_json::from_slice::<Attempt>(&bytes).ok());
    }
    Ok(attempts)
}

/// The manifest in a run's directory; `None` if there is none. The run's files may be missing all the same.
///
/// # Errors
/// [`Error::Corrupt`] if it is not the manifest of a run of this version.
pub async fn written(folder: &Location) -> Result<Option<RunManifest>> {
    let at = folder.join("manifest.json");
    let Some(bytes) = at.get().await? else { return Ok(None) };
    let manifest = sealed::open(&bytes).map_err(|e| Error::Corrupt {
        url: at.url(),
        message: format!("it is not the manifest of a run of this version: {e}"),
    });
    manifest.map(Some)
}

/// The manifest of a run whose directory a user named.
///
/// # Errors
/// [`Error::Usage`] if the folder has no manifest.
pub async fn read(folder: &Location) -> Result<RunManifest> {
    written(folder).await?.ok_or_else(|| {
        Error::usage(
            format!("{} is not the directory of a finished run: it has no manifest.json", folder.url()),
            "`lengthwise run CONF` prints the directory as its last line",
        )
    })
}

/// The output that a run's directory belongs to: two folders up.
pub fn output_of(run_folder: &Location) -> Location {
    run_folder.parent().parent()
}

/// The folder and the manifest of a stage's output, by the stage's key; `None` if it does not exist.
pub async fn stage_of(output: &Location, key: &StageKey) -> Result<Option<(Location, output::Manifest)>> {
    let folder = output.join("stages").join(&key.stage).join(&key.key);
    let Some(bytes) = folder.join("manifest.json").get().await? else { return Ok(None) };
    let corrupt = |message| Error::Corrupt { url: folder.join("manifest.json").url(), message };
    Ok(Some((folder.clone(), sealed::open(&bytes).map_err(corrupt)?)))
}

//! The directory of a run: what a person, a trainer and `verify` find.
//!
//! ```text
//! <output>/runs/<name>-<hash of its last stages' keys>/
//!     data/train-00000-of-000NN.parquet    heldout/heldout-….parquet    checkpoint/…
//!     report.html    attempts/<time>.json: machines and times, outside every hash
//!     manifest.json                        written last, if absent
//! ```

use std::collections::{BTreeMap, BTreeSet};

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

/// All that a run was made of and all that it made. Nothing in it says when or where.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunManifest {
    pub run: String,
    /// What computed it.
    pub build: Build,
    /// The git commit of the folder that conf and SQL were read from, where it is one.
    pub commit: Option<String>,
    /// Whether tracked files differed from that commit.
    pub dirty: bool,
    pub conf_file: String,
    /// As resolved, with defaults.
    pub conf: Conf,
    pub sql: BTreeMap<String, String>,
    pub inputs: Vec<Input>,
    /// What looked like data where a source's files are, and was not read, by the source's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub not_read: BTreeMap<String, Vec<Unread>>,
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
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
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
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    /// documents, tokens, duplicates, rejects, …
    pub counts: BTreeMap<String, u64>,
    pub domains: Vec<Domain>,
    pub asked: Asked,
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
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Attempt {
    pub started: String,
    pub seconds: f64,
    pub host: String,
    pub cores: usize,
    pub steps: Vec<Step>,
    /// What it wrote into the run's directory that says when, where or how fast, or that a newer version would word in
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

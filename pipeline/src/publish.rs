//! How a run's directory is written: files first, the manifest last.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use serde_json::Value;

use crate::directory::{Attempt, Build, RunManifest, Summary, written};
use crate::hash::Digest;
use crate::output::{File, Published, StageKey, Table};
use crate::run::{Run, Step};
use crate::sql::engine::put_file;
use crate::sql::git;
use crate::stage::Stage;
use crate::stages::domains::Domain;
use crate::stages::tokenizer::Tokenizer;
use crate::stages::tokens::Tokens;
use crate::storage::{Location, json_lines, sealed};
use crate::{Error, Result};

/// The outputs that a run's directory is made from, once sequences are packed.
pub struct Dataset<'a> {
    pub tokenizer: &'a Tokenizer,
    pub tokens: &'a Tokens,
    pub catalog: &'a Published,
    pub domains: &'a [Domain],
    pub mixture: &'a Published,
    pub drawn: &'a Published,
    pub packed: &'a Published,
    pub heldout: Option<&'a Published>,
    pub trained: Option<&'a Published>,
    /// Pairs of an evaluation's name and its output.
    pub evaluated: &'a [(String, Published)],
}

impl Dataset<'_> {
    /// The location of the run's directory.
    pub fn folder(&self, run: &Run) -> Location {
        let last: Vec<&Published> =
            [Some(self.packed), self.heldout, self.trained].into_iter().flatten().collect();
        run.output.join("runs").join(&id(&run.conf.run.name, &last))
    }

    /// Writes the run's directory, and returns its location.
    pub async fn publish(&self, run: &Run) -> Result<Location> {
        let folder = self.folder(run);
        let steps = run.steps.lock().expect("no panic while held").clone();
        let mut attempt = attempt(run, &steps, self.logs());
        // written first, because the files may be links to old ones: `gc` sees by it that the folder is in
        // use
        let name = format!("attempts/{}-{}", run.started.strftime("%Y%m%dT%H%M%S"), std::process::id());
        let at = folder.join(&format!("{name}.json"));
        at.put(serde_json::to_vec_pretty(&attempt).expect("plain values")).await?;

        let mut files = self.copy_files(&folder).await?;
        let mut evaluations: BTreeMap<String, Value> =
            self.evaluated.iter().map(|(name, e)| (name.clone(), e.manifest.notes.clone())).collect();
        // results of earlier evaluations of the same model, by a conf with another [eval], remain valid
        let before = match written(&folder).await {
            // a broken manifest is replaced below
            Err(Error::Corrupt { .. }) => None,
            before => before?,
        };
        for (name, notes) in before.iter().flat_map(|before| &before.summary.evaluations) {
            if let Entry::Vacant(vacant) = evaluations.entry(name.clone()) {
                vacant.insert(notes.clone());
                let prefix = format!("eval/{name}/");
                let old = before.iter().flat_map(|before| &before.files);
                files.extend(old.filter(|file| file.name.starts_with(&prefix)).cloned());
            }
        }
        let manifest = self.manifest(run, &folder, &steps, files, evaluations)?;
        let report = ("report.html", crate::report::html(&manifest, &attempt, &self.metrics().await?));
        for (name, text) in crate::cards::cards(&manifest).into_iter().chain([report]) {
            attempt.files.push(put_file(&folder, name, text.into_bytes(), 0).await?);
        }
        at.put(serde_json::to_vec_pretty(&attempt).expect("plain values")).await?;

        // the manifest describes the last run; the one before it is kept beside the attempt
        let (text, at) = (sealed::seal(&manifest), folder.join("manifest.json"));
        match at.get().await? {
            Some(before) if before == text => {}
            before => {
                if let Some(before) = before {
                    folder.join(&format!("{name}-manifest-before.json")).put(before).await?;
                }
                at.put(text).await?;
            }
        }
        Ok(folder)
    }

    /// The files of the training logs, each with its stage's output; empty if nothing was trained.
    fn logs(&self) -> Vec<(&Published, File)> {
        let logs = self.trained.map(|trained| (trained, trained.table("logs").files));
        logs.into_iter()
            .flat_map(|(trained, files)| files.into_iter().map(move |file| (trained, file)))
            .collect()
    }

    /// Copies the stages' files into the run's directory, and returns them. The training logs are copied
    /// beside the model, where people look for them, but are not returned, because they contain times and
    /// speeds.
    async fn copy_files(&self, folder: &Location) -> Result<Vec<File>> {
        let mut files = copy_table(self.packed, "train", folder, "data").await?;
        if let Some(heldout) = self.heldout {
            files.extend(copy_table(heldout, "heldout", folder, "heldout").await?);
        }
        if let Some(trained) = self.trained {
            files.extend(copy_table(trained, "checkpoint", folder, "checkpoint").await?);
        }
        for (trained, file) in self.logs() {
            trained.folder.join(&file.name).copy_to(&folder.join(&in_checkpoint(&file))).await?;
        }
        for (name, evaluated) in self.evaluated {
            files.extend(copy_table(evaluated, "cases", folder, &format!("eval/{name}")).await?);
        }
        Ok(files)
    }

    fn manifest(
        &self,
        run: &Run,
        folder: &Location,
        steps: &[Step],
        files: Vec<File>,
        evaluations: BTreeMap<String, Value>,
    ) -> Result<RunManifest> {
        let mut counts = self.tokens.counts();
        for (name, stage, count) in [
            ("distinct_documents", self.catalog, "documents"),
            ("duplicates", self.catalog, "duplicates"),
            ("heldout_documents", self.catalog, "heldout_documents"),
            ("drawn_tokens", self.drawn, "tokens"),
            ("sequences", self.packed, "sequences"),
            ("padding", self.packed, "padding"),
        ] {
            *counts.entry(name.to_owned()).or_default() += stage.count(count);
        }
        let tables = [("train", Some(self.packed)), ("heldout", self.heldout)];
        let tables = tables.into_iter().filter_map(|(name, stage)| {
            let Table { rows, digest, .. } = stage?.table(name);
            Some((name.to_owned(), Table { rows, digest, files: vec![] }))
        });
        // the units of `tokens` are added by their own keys, `shuffle` leaves nothing in a run, and
        // evaluations may be added later
        let is_of_run = |step: &&Step| {
            !matches!(Stage::of_step(&step.stage), Some(Stage::Tokens | Stage::Shuffle | Stage::Eval))
        };
        let stages = steps.iter().filter(is_of_run);
        let stages = stages.map(|step| StageKey { stage: step.stage.clone(), key: step.key.clone() });
        let (commit, dirty) = commit_of(run);
        Ok(RunManifest {
            run: folder.path.filename().unwrap_or_default().to_owned(),
            build: Build::this(),
            commit,
            dirty,
            conf_file: run.conf_file.clone(),
            conf: run.conf.clone(),
            sql: run.sql.lock().expect("no panic while held").clone(),
            inputs: self.tokens.inputs.clone(),
            not_read: self.tokens.not_read.clone(),
            tokenizer: self.tokenizer.fingerprint,
            stages: self.tokens.keys().into_iter().chain(stages).collect(),
            files,
            tables: tables.collect(),
            summary: Summary {
                counts,
                domains: self.domains.to_vec(),
                asked: self.mixture.notes()?,
                drawn: self.drawn.notes()?,
                planned: self.packed.notes()?,
                evaluations,
            },
        })
    }

    /// The lines of the checkpoint's metrics.jsonl.
    async fn metrics(&self) -> Result<Vec<Value>> {
        let logs = self.logs();
        let Some((trained, file)) = logs.iter().find(|(_, file)| file.name.ends_with("metrics.jsonl")) else {
            return Ok(vec![]);
        };
        let Some(bytes) = trained.folder.join(&file.name).get().await? else { return Ok(vec![]) };
        Ok(json_lines(&bytes).flatten().collect())
    }
}

/// This attempt at a run, without the files that are written after it.
fn attempt(run: &Run, steps: &[Step], logs: Vec<(&Published, File)>) -> Attempt {
    let host = std::env::var("HOSTNAME").or_else(|_| std::fs::read_to_string("/etc/hostname"));
    Attempt {
        started: run.started.to_string(),
        seconds: run.seconds(),
        host: host.unwrap_or_default().trim().to_owned(),
        cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
        steps: steps.to_vec(),
        files: logs.into_iter().map(|(_, file)| File { name: in_checkpoint(&file), ..file }).collect(),
    }
}

/// The path of a training log in a run's directory.
fn in_checkpoint(log: &File) -> String {
    format!("checkpoint/{}", log.name.rsplit('/').next().unwrap_or_default())
}

/// The commit that the run's files were read from, and whether tracked files differ from it or the conf or
/// the recipe is untracked.
fn commit_of(run: &Run) -> (Option<String>, bool) {
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

/// A run's id: its name and a hash of its last stages' keys, so that a run that was killed finds its
/// directory again.
fn id(name: &str, last: &[&Published]) -> String {
    let keys: Vec<&str> = last.iter().map(|stage| stage.manifest.key.as_str()).collect();
    format!("{name}-{}", &Digest::of(keys.join(" ").as_bytes()).to_string()[..12])
}

/// Copies a stage's files into a folder of the run, by hard link if the storage is local and supports it.
///
/// # Errors
/// [`Error::Withdrawn`] if a file of the stage is broken.
async fn copy_table(from: &Published, table: &str, folder: &Location, below: &str) -> Result<Vec<File>> {
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

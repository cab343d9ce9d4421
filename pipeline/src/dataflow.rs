//! The dataflow of a run, from sources to the trained checkpoint: which stage takes what of which.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use serde_json::json;

use crate::directory::{self, Attempt, Build, RunManifest, Summary};
use crate::output::{File, Published, StageKey, Table};
use crate::run::{Goal, Run};
use crate::sql::engine::put_file;
use crate::stage::Stage;
use crate::stages::domains::Domain;
use crate::stages::shuffle::Drawn;
use crate::stages::tokenizer::Tokenizer;
use crate::stages::tokens::Tokens;
use crate::stages::{self, catalog, domains, draw, mixture, pack, shuffle};
use crate::storage::{Location, json_lines};
use crate::{Error, Result};

/// What the stages gave, as far as the run went.
#[derive(Default)]
pub struct Flow {
    pub tokenizer: Option<Tokenizer>,
    pub tokens: Option<Tokens>,
    pub catalog: Option<Published>,
    pub domains: Option<(Published, Vec<Domain>)>,
    pub mixture: Option<Published>,
    pub drawn: Option<Published>,
    pub packed: Option<Published>,
    pub heldout: Option<Published>,
    pub trained: Option<Published>,
    /// By the evaluation's name.
    pub evaluated: Vec<(String, Published)>,
}

/// That this build has what the conf's `[train]` asks for.
#[cfg(feature = "train")]
fn can_train(run: &Run) -> Result<()> {
    stages::train::check_devices(run)
}

#[cfg(not(feature = "train"))]
fn can_train(run: &Run) -> Result<()> {
    if run.conf.train.is_none() {
        return Ok(());
    }
    let help = "build with the feature `train`, or end at the packed dataset with `--until pack`";
    let message = "this build of lengthwise has no trainer";
    Err(run.conf.wrong(&["train"], message, "asked for here", Some(help.into())))
}

fn ends(until: Option<Stage>, stage: Stage) -> bool {
    until.is_some_and(|until| until <= stage)
}

/// The tokenizer, after what can be wrong in the conf of a run up to `until` was looked for: it is said before hours are spent.
pub async fn checked(run: &Run, until: Option<Stage>) -> Result<Tokenizer> {
    #[cfg(feature = "train")]
    {
        stages::train::conf(run)?;
        stages::eval::conf(run)?;
    }
    let trains = run.goal != Goal::Look && !ends(until, Stage::Pack);
    if trains {
        can_train(run)?;
    }
    mixture::recipe(run)?;
    let tokenizer = stages::tokenizer::obtain(run).await?;
    #[cfg(feature = "train")]
    if trains {
        stages::train::check_checkpoint(run, &tokenizer).await?;
        if !ends(until, Stage::Train) {
            stages::eval::check(run, &tokenizer).await?;
        }
    }
    Ok(tokenizer)
}

/// A run that finds so many outputs broken, one after the other, gives up.
const MOST_WITHDRAWN: usize = 100;

/// Does `work` again where it finds that what a stage left is broken: that is withdrawn by then, and computed again.
pub async fn mended<T>(run: &Run, mut work: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    for _ in 0..MOST_WITHDRAWN {
        match work().await {
            Err(Error::Withdrawn { url }) if run.goal != Goal::Look => {
                tracing::warn!("{url} is broken; its stage is computed again");
                run.steps.lock().expect("no panic while held").clear();
            }
            done => return done,
        }
    }
    work().await
}

impl Flow {
    /// Goes through the stages up to `until`, and leaves in `self` what there is when one fails. Where a stage finds that
    /// what an earlier one left is broken, that is computed again.
    pub async fn go(&mut self, run: &Run, until: Option<Stage>) -> Result<()> {
        mended(run, async || {
            *self = Self::default();
            self.through(run, until).await
        })
        .await
    }

    async fn through(&mut self, run: &Run, until: Option<Stage>) -> Result<()> {
        let ends = |stage: Stage| ends(until, stage);
        let tokenizer = self.tokenizer.insert(checked(run, until).await?);
        if ends(Stage::Tokenizer) {
            return Ok(());
        }
        let tokens = stages::tokens::obtain(run, tokenizer).await?;
        let tokens = self.tokens.insert(tokens);
        if ends(Stage::Tokens) {
            return Ok(());
        }
        let catalog = catalog::obtain(run, tokens).await?;
        let catalog = self.catalog.insert(catalog);
        if ends(Stage::Catalog) {
            return Ok(());
        }
        let described = domains::obtain(run, catalog).await?;
        let rows = domains::read(&described).await?;
        let (described, domain_rows) = self.domains.insert((described, rows));
        if ends(Stage::Domains) {
            return Ok(());
        }
        let mixed = mixture::obtain(run, catalog, described).await?;
        let mixed = self.mixture.insert(mixed);
        mixture::check_budget(run, &notes(mixed)?, domain_rows)?;
        if ends(Stage::Mixture) {
            return Ok(());
        }
        let drawn = draw::obtain(run, mixed).await?;
        let drawn = self.drawn.insert(drawn);
        if ends(Stage::Draw) {
            return Ok(());
        }
        let chosen = Drawn {
            folder: drawn.folder.clone(),
            table: drawn.table("drawn"),
            tokens: drawn.count("tokens"),
        };
        if ends(Stage::Shuffle) {
            let layout = pack::layout(run, tokenizer, "train")?;
            shuffle::obtain(run, tokens, catalog, &chosen, layout).await?;
            return Ok(());
        }
        let packed = pack::obtain(run, tokenizer, tokens, catalog, &chosen, "train").await?;
        self.packed = Some(packed);
        let (table, count) = (catalog.table("heldout"), catalog.count("heldout_tokens"));
        if count > 0 && count < run.conf.pack.sequence_tokens.0 {
            tracing::warn!(
                "{count} held-out tokens do not fill a sequence: there is no heldout/; raise `mixture.holdout`"
            );
        } else if count > 0 {
            let all = Drawn { folder: catalog.folder.clone(), table, tokens: count };
            self.heldout = Some(pack::obtain(run, tokenizer, tokens, catalog, &all, "heldout").await?);
        }
        if ends(Stage::Pack) {
            return Ok(());
        }
        #[cfg(feature = "train")]
        if let Some(packed) = &self.packed {
            self.trained = stages::train::obtain(run, tokenizer, packed).await?;
            if ends(Stage::Train) {
                return Ok(());
            }
            if let Some(trained) = &self.trained {
                self.evaluated = stages::eval::all(run, trained, self.heldout.as_ref()).await?;
            }
        }
        Ok(())
    }

    /// Where the run's directory is.
    pub fn folder(&self, run: &Run) -> Location {
        let last = [self.packed.as_ref(), self.heldout.as_ref(), self.trained.as_ref()];
        let last: Vec<&Published> = last.into_iter().flatten().collect();
        run.output.join("runs").join(&directory::id(&run.conf.run.name, &last))
    }

    /// The run's directory, and its manifest; only for a flow that came to packed sequences.
    pub async fn publish(&self, run: &Run) -> Result<(Location, RunManifest)> {
        let (
            Some(tokenizer),
            Some(tokens),
            Some((_, domains)),
            Some(catalog),
            Some(mixed),
            Some(drawn),
            Some(packed),
        ) = (
            &self.tokenizer,
            &self.tokens,
            &self.domains,
            &self.catalog,
            &self.mixture,
            &self.drawn,
            &self.packed,
        )
        else {
            unreachable!("publish is called after the pack stage");
        };
        let folder = self.folder(run);
        let id = folder.path.filename().unwrap_or_default().to_owned();

        let steps = run.steps.lock().expect("no panic while held").clone();
        let trained = self.trained.as_ref();
        let logs: Vec<(&Published, File)> = trained
            .into_iter()
            .flat_map(|trained| trained.table("logs").files.into_iter().map(move |file| (trained, file)))
            .collect();
        let mut attempt = Attempt {
            started: run.started.to_string(),
            seconds: run.seconds(),
            host: std::env::var("HOSTNAME")
                .or_else(|_| std::fs::read_to_string("/etc/hostname"))
                .unwrap_or_default()
                .trim()
                .to_owned(),
            cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
            steps: steps.clone(),
            files: logs.iter().map(|(_, file)| File { name: in_checkpoint(file), ..file.clone() }).collect(),
        };
        // before files that may be links to old ones: `gc` sees that the folder is worked in
        let name = format!("attempts/{}-{}", run.started.strftime("%Y%m%dT%H%M%S"), std::process::id());
        let at = folder.join(&format!("{name}.json"));
        at.put(serde_json::to_vec_pretty(&attempt).expect("plain values")).await?;

        let mut files = directory::copy_table(packed, "train", &folder, "data").await?;
        if let Some(heldout) = &self.heldout {
            files.extend(directory::copy_table(heldout, "heldout", &folder, "heldout").await?);
        }
        if let Some(trained) = &self.trained {
            files.extend(directory::copy_table(trained, "checkpoint", &folder, "checkpoint").await?);
        }
        // beside the model, as one looks for them there
        for (trained, file) in &logs {
            trained.folder.join(&file.name).copy_to(&folder.join(&in_checkpoint(file))).await?;
        }
        let notes_of = |(name, e): &(String, Published)| (name.clone(), e.manifest.notes.clone());
        let mut evaluations: BTreeMap<_, _> = self.evaluated.iter().map(notes_of).collect();
        for (name, evaluated) in &self.evaluated {
            files.extend(directory::copy_table(evaluated, "cases", &folder, &format!("eval/{name}")).await?);
        }
        // what the same model was asked before, by a conf with another [eval], is no less true
        let before = match directory::written(&folder).await {
            // a broken one is written anew
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
        let mut counts = tokens.counts();
        for (name, stage, count) in [
            ("distinct_documents", catalog, "documents"),
            ("duplicates", catalog, "duplicates"),
            ("heldout_documents", catalog, "heldout_documents"),
            ("drawn_tokens", drawn, "tokens"),
            ("sequences", packed, "sequences"),
            ("padding", packed, "padding"),
        ] {
            *counts.entry(name.to_owned()).or_default() += stage.count(count);
        }
        let tables = [("train", Some(packed)), ("heldout", self.heldout.as_ref())];
        let tables = tables.into_iter().filter_map(|(name, stage)| {
            let Table { rows, digest, .. } = stage?.table(name);
            Some((name.to_owned(), Table { rows, digest, files: vec![] }))
        });
        let (commit, dirty) = directory::commit_of(run);
        let manifest = RunManifest {
            run: id,
            build: Build::this(),
            commit,
            dirty,
            conf_file: run.conf_file.clone(),
            conf: run.conf.clone(),
            sql: run.sql.lock().expect("no panic while held").clone(),
            inputs: tokens.inputs.clone(),
            not_read: tokens.not_read.clone(),
            tokenizer: tokenizer.fingerprint,
            stages: tokens
                .keys()
                .into_iter()
                .chain(
                    steps
                        .iter()
                        .filter(|s| !["tokens", "shuffle"].contains(&s.stage.as_str()))
                        .filter(|s| !s.stage.starts_with("eval "))
                        .map(|s| StageKey { stage: s.stage.clone(), key: s.key.clone() }),
                )
                .collect(),
            files,
            tables: tables.collect(),
            summary: Summary {
                counts,
                domains: domains.clone(),
                asked: notes(mixed)?,
                drawn: notes(drawn)?,
                planned: notes(packed)?,
                evaluations,
            },
        };
        let metrics = self.metrics().await?;
        let report = ("report.html", crate::report::html(&manifest, &attempt, &metrics));
        for (name, text) in crate::cards::cards(&manifest).into_iter().chain([report]) {
            attempt.files.push(put_file(&folder, name, text.into_bytes(), 0).await?);
        }
        at.put(serde_json::to_vec_pretty(&attempt).expect("plain values")).await?;

        // the manifest says what the last run was made of
        let (text, at) = (crate::storage::sealed::seal(&manifest), folder.join("manifest.json"));
        match at.get().await? {
            Some(before) if before == text => {}
            before => {
                if let Some(before) = before {
                    folder.join(&format!("{name}-manifest-before.json")).put(before).await?;
                }
                at.put(text).await?;
            }
        }
        Ok((folder, manifest))
    }

    /// The lines of the checkpoint's metrics.jsonl.
    async fn metrics(&self) -> Result<Vec<serde_json::Value>> {
        let Some(trained) = &self.trained else { return Ok(vec![]) };
        let logs = trained.table("logs").files;
        let Some(file) = logs.iter().find(|file| file.name.ends_with("metrics.jsonl")) else {
            return Ok(vec![]);
        };
        let Some(bytes) = trained.folder.join(&file.name).get().await? else { return Ok(vec![]) };
        Ok(json_lines(&bytes).flatten().collect())
    }
}

/// Where a file of the training's logs is in a run's directory.
fn in_checkpoint(log: &File) -> String {
    format!("checkpoint/{}", log.name.rsplit('/').next().unwrap_or_default())
}

/// What a stage left in its notes.
pub fn notes<T: serde::de::DeserializeOwned>(stage: &Published) -> Result<T> {
    serde_json::from_value(stage.manifest.notes.clone())
        .map_err(|e| Error::Corrupt { url: stage.folder.join("manifest.json").url(), message: e.to_string() })
}

/// Remembers what this conf's stages were made of, so that the next `plan` can say what changed.
pub async fn remember(run: &Run) -> Result<()> {
    if run.goal == Goal::Look || run.steps.lock().expect("no panic while held").is_empty() {
        return Ok(());
    }
    let at = latest_of(run);
    // a preview goes less far than the run before it
    let before = at.get().await?.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let mut latest: serde_json::Map<String, serde_json::Value> = before.unwrap_or_default();
    for step in run.steps.lock().expect("no panic while held").iter() {
        latest.insert(step.stage.clone(), json!({"key": step.key, "ingredients": step.ingredients}));
    }
    at.put(serde_json::to_vec_pretty(&latest).expect("plain values")).await
}

/// Where [`remember`] writes.
pub fn latest_of(run: &Run) -> Location {
    run.output.join("latest").join(&format!("{}.json", run.conf.run.name))
}

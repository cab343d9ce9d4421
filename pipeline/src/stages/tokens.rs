//! tokens: turns source rows into documents and their texts into ids, in one pass. Parts are tokenised in
//! parallel, and those that an interrupted run finished are not done again.
//!
//! A unit (a large file, or a bundle of small ones) is published by itself, under a hash of how it is read,
//! its files' sizes and versions, and the tokenizer. A new source file therefore causes only its own unit to
//! be tokenised.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use datafusion::prelude::SessionContext;
use futures::{StreamExt, TryStreamExt};
use hashbrown::HashMap;
use serde_json::{Value, json};

use super::tokenizer::Tokenizer;
use crate::hash::{Digest, RowDigest};
use crate::output::{self, Ingredients, Input, Manifest, Output, StageKey, Table};
use crate::run::{Goal, Run, Step, ingredients};
use crate::source::{Unit, Unread};
use crate::stage::Stage;
use crate::stages::sources::{self, Source};
use crate::storage::Location;
use crate::tasks::Task;
use crate::tasks::tokenize::Tokenize;
use crate::{Error, Result, tables};

/// How many units are looked up at a time.
const LOOKUPS: usize = 32;

/// All units of all sources.
pub struct Tokens {
    units: Vec<(Location, Arc<Manifest>)>,
    /// The table of ids of each part, with its folder.
    parts: HashMap<i64, (Location, Table)>,
    /// The source files that were read, sorted by URL.
    pub inputs: Vec<Input>,
    /// Files that look like source files but were not read, by source.
    pub not_read: BTreeMap<String, Vec<Unread>>,
    narrow: bool,
}

impl Tokens {
    /// The digest of a table over all units, in whatever order they come.
    pub fn digest(&self, table: &str) -> RowDigest {
        let mut digest = RowDigest::default();
        for (_, manifest) in &self.units {
            digest.add(manifest.tables.get(table).map(|table| table.digest).unwrap_or_default());
        }
        digest
    }

    /// Identifies the set of parts, and so where ids are to be found.
    pub fn parts_digest(&self) -> Digest {
        let mut parts: Vec<i64> = self.parts.keys().copied().collect();
        parts.sort_unstable();
        Digest::of(&parts.iter().flat_map(|part| part.to_le_bytes()).collect::<Vec<_>>())
    }

    /// A count, summed over all units.
    pub fn count(&self, name: &str) -> u64 {
        self.units.iter().map(|(_, manifest)| manifest.counts.get(name).copied().unwrap_or(0)).sum()
    }

    /// All counts, summed over all units, and `files_not_read`.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        let not_read = self.not_read.values().flatten().map(|unread| unread.files).sum();
        let mut counts = BTreeMap::from([("files_not_read".to_owned(), not_read)]);
        for (name, count) in self.units.iter().flat_map(|(_, manifest)| &manifest.counts) {
            *counts.entry(name.clone()).or_default() += count;
        }
        counts
    }

    /// The key of each unit.
    pub fn keys(&self) -> Vec<StageKey> {
        self.units.iter().map(|(_, m)| StageKey { stage: m.stage.clone(), key: m.key.clone() }).collect()
    }

    /// The table of ids of a part, with its folder.
    ///
    /// # Errors
    /// [`Error::Unbalanced`] if no unit has the part.
    pub fn ids(&self, part: i64) -> Result<(Location, Table)> {
        self.parts.get(&part).cloned().ok_or_else(|| Error::Unbalanced {
            stage: "shuffle",
            message: format!("the catalog names part {part:016x}, which no unit has"),
        })
    }

    /// Bytes of an id: 2 for a vocabulary of up to 65,536 ids, otherwise 4.
    pub fn width(&self) -> usize {
        if self.narrow { 2 } else { 4 }
    }

    /// The tables of a name of all units that have one, with their folders.
    pub fn tables(&self, name: &str) -> Vec<(&Location, &Table)> {
        self.units.iter().filter_map(|(folder, m)| Some((folder, m.tables.get(name)?))).collect()
    }

    /// Registers `documents`, `tokens` or `rejects` over all units.
    pub async fn register(&self, run: &Run, session: &SessionContext, name: &str) -> Result<()> {
        let schema = match name {
            "documents" => tables::documents(),
            "tokens" => tables::tokens(self.narrow),
            _ => tables::rejects(),
        };
        run.engine.register(session, name, schema, &self.tables(name), &[]).await
    }
}

/// What a text's ids depend on besides the tokenizer's file: the version of this stage, and the encoder with
/// its libraries.
pub fn encoding() -> Value {
    json!([Stage::Tokens.about().version, crate::algorithms::tokenizer::ENCODER])
}

/// Finds or computes every unit.
pub async fn obtain(run: &Run, tokenizer: &Tokenizer) -> Result<Tokens> {
    let started = Instant::now();
    let sources = sources::list(run).await?;
    let with_unread = sources.iter().filter(|source| !source.unread.is_empty());
    let not_read: BTreeMap<String, Vec<Unread>> =
        with_unread.map(|source| (source.spec.origin.clone(), source.unread.clone())).collect();
    if run.goal != Goal::Look {
        for (source, unread) in &not_read {
            tracing::warn!("source {source}: {}", Unread::summary(unread));
        }
    }
    let narrow = tokenizer.loaded.vocab_size() <= 1 << 16;
    let jobs: Vec<(&Source, &Unit)> =
        sources.iter().flat_map(|s| s.units.iter().map(move |unit| (s, unit))).collect();
    let again = matches!(run.goal, Goal::Compute { from: Some(from) } if Stage::Tokens >= from);

    let lookups = jobs.iter().map(|(source, unit)| async move {
        // files are identified by what the store says of them: to hash their content, they would all have to
        // be read
        let list = ingredients(
            Stage::Tokens,
            [
                ("encoder", json!(crate::algorithms::tokenizer::ENCODER)),
                ("unit", source.unit_identity(unit)),
                ("tokenizer", json!(tokenizer.fingerprint)),
            ],
        );
        let key = output::key(Stage::Tokens.name(), &list);
        let folder = run.output.join("stages").join(Stage::Tokens.name()).join(&key);
        let found = if again { None } else { output::find(&folder).await? };
        Ok::<_, Error>((list, key, folder, found))
    });
    let found: Vec<_> = futures::stream::iter(lookups).buffered(LOOKUPS).try_collect().await?;
    let all: Ingredients = [
        ("sources".to_owned(), json!(run.conf.source)),
        (
            "files".to_owned(),
            json!(Digest::of(
                json!(sources.iter().map(Source::identity).collect::<Vec<_>>()).to_string().as_bytes()
            )),
        ),
        ("tokenizer".to_owned(), json!(tokenizer.fingerprint)),
    ]
    .into();
    let missing: Vec<usize> = (0..jobs.len()).filter(|i| found[*i].3.is_none()).collect();
    if !missing.is_empty() && run.goal == Goal::Look {
        return Err(Error::Absent { stage: Stage::Tokens.name(), key: String::new(), ingredients: all });
    }

    let mut units: Vec<Option<(Location, Manifest)>> = vec![];
    let mut todo = vec![];
    for (i, (list, key, folder, manifest)) in found.into_iter().enumerate() {
        units.push(manifest.map(|manifest| (folder.clone(), manifest)));
        if units[i].is_none() {
            todo.push((i, list, key, folder));
        }
    }
    let bar = run.progress.stage(Stage::Tokens.name(), missing.iter().map(|i| jobs[*i].1.bytes()).sum());
    let at = run.output.join("tokenizers").join(&format!("{}.json", tokenizer.fingerprint));
    run.executor.here.keep(tokenizer.fingerprint, tokenizer.loaded.clone());
    if run.executor.is_remote() && !todo.is_empty() {
        at.put(tokenizer.json.clone()).await?;
    }
    let computing = todo.into_iter().map(|(i, list, key, folder)| {
        let (source, unit) = jobs[i];
        let (bar, tokenizer_url) = (bar.clone(), at.url());
        async move {
            run.check_stop()?;
            let task = Tokenize {
                source: source.conf.clone(),
                unit: unit.clone(),
                key: key.clone(),
                folder: folder.url(),
                again,
                tokenizer: tokenizer.fingerprint,
                tokenizer_url,
            };
            let output = run.executor.perform(Task::Tokenize(task), &bar).await?;
            if run.executor.is_remote() {
                let counted = |name| output.counted(name);
                bar.add(unit.bytes(), counted("rows"), counted("tokens"), counted("bytes"));
            }
            let Output { tables, counts, notes } = output;
            let manifest = Manifest {
                stage: Stage::Tokens.name().into(),
                key,
                ingredients: list,
                tables,
                counts,
                notes,
            };
            output::publish(&folder, &manifest).await?;
            Ok::<_, Error>((i, folder, manifest))
        }
    });
    let mut computing = futures::stream::iter(computing).buffer_unordered(run.executor.tasks_at_a_time());
    while let Some((i, folder, manifest)) = computing.try_next().await? {
        units[i] = Some((folder, manifest));
    }
    drop(computing);

    let mut tokens = Tokens { units: vec![], parts: HashMap::new(), inputs: vec![], not_read, narrow };
    for (folder, manifest) in units.into_iter().flatten() {
        for file in manifest.tables.get("tokens").into_iter().flat_map(|table| &table.files) {
            let Some(part) = part_of(&file.name) else { continue };
            let (_, table) = tokens.parts.entry(part).or_insert_with(|| (folder.clone(), Table::default()));
            table.files.push(file.clone());
        }
        let inputs = manifest.notes.get("inputs").cloned().unwrap_or_default();
        tokens.inputs.extend(serde_json::from_value::<Vec<Input>>(inputs).unwrap_or_default());
        tokens.units.push((folder, Arc::new(manifest)));
    }
    tokens.inputs.sort_by(|a, b| a.url.cmp(&b.url));
    let step = Step {
        stage: Stage::Tokens.name().into(),
        key: tokens.parts_digest().short(),
        cached: missing.is_empty(),
        seconds: started.elapsed().as_secs_f64(),
        ended: jiff::Timestamp::now().to_string(),
        counts: tokens.counts(),
        ingredients: all,
    };
    run.steps.lock().expect("no panic while held").push(step);
    if run.goal != Goal::Look {
        check_rejects(&sources, &jobs, &tokens)?;
    }
    Ok(tokens)
}

/// Fails if more of a source's rows were rejected than its `max_reject_share` allows.
fn check_rejects(sources: &[Source], jobs: &[(&Source, &Unit)], tokens: &Tokens) -> Result<()> {
    for source in sources {
        let own = jobs.iter().zip(&tokens.units).filter(|((s, _), _)| std::ptr::eq(*s, source));
        let (mut rows, mut rejects, mut empty) = (0, 0, 0);
        let mut reasons = BTreeMap::<String, u64>::new();
        let mut first: Option<String> = None;
        for (_, (_, manifest)) in own {
            rows += manifest.counts.get("rows").copied().unwrap_or(0);
            rejects += manifest.counts.get("rejects").copied().unwrap_or(0);
            empty += manifest.counts.get("empty").copied().unwrap_or(0);
            let counted: BTreeMap<String, u64> =
                serde_json::from_value(manifest.notes.get("reasons").cloned().unwrap_or_default())
                    .unwrap_or_default();
            counted.into_iter().for_each(|(reason, count)| *reasons.entry(reason).or_default() += count);
            first = first.or_else(|| manifest.notes.get("first_reject")?.as_str().map(str::to_owned));
        }
        if empty > 0 {
            tracing::info!(
                "source {}: {empty} of {rows} rows have an empty text, and are no documents",
                source.spec.origin
            );
        }
        if rejects > 0 {
            let listed: Vec<String> =
                reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
            let what = format!(
                "source {}: {rejects} of {rows} rows were rejected ({})",
                source.spec.origin,
                listed.join(", ")
            );
            if rejects as f64 > source.conf.max_reject_share * rows as f64 {
                let message = format!(
                    "{what}, more than max_reject_share = {}\n  the first: {}",
                    source.conf.max_reject_share,
                    first.unwrap_or_default()
                );
                return Err(Error::data(
                    message,
                    "`lengthwise sql CONF \"select * from rejects\"` shows them all; mend the source or the conf's columns, or raise `max_reject_share`",
                ));
            }
            tracing::warn!("{what}");
        }
    }
    Ok(())
}

fn part_of(name: &str) -> Option<i64> {
    i64::from_str_radix(name.strip_prefix("tokens-")?.split('-').next()?, 16).ok()
}

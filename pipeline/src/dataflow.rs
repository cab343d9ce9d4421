//! The dataflow of a run, from sources to the trained checkpoint: which stage takes which outputs of earlier
//! stages.

use serde_json::json;

use crate::output::Published;
use crate::publish::Dataset;
use crate::run::{Goal, Run};
use crate::stage::Stage;
use crate::stages::domains::Domain;
use crate::stages::shuffle::Drawn;
use crate::stages::tokenizer::Tokenizer;
use crate::stages::tokens::Tokens;
use crate::stages::{self, catalog, domains, draw, mixture, pack, shuffle};
use crate::storage::Location;
use crate::{Error, Result};

/// The outputs of the stages that a run has gone through so far.
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
    /// Pairs of an evaluation's name and its output.
    pub evaluated: Vec<(String, Published)>,
}

/// Checks that this build and machine have what the conf's `[train]` asks for.
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

/// Checks the conf of a run up to `until`, so that its errors are reported before hours are spent, and
/// returns the tokenizer.
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

/// A run gives up after it has found this many broken outputs.
const MAX_WITHDRAWN: usize = 100;

/// Repeats `work` when it finds that a stage's output is broken. The output has been withdrawn by then, and
/// is computed again.
pub async fn mended<T>(run: &Run, mut work: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    for _ in 0..MAX_WITHDRAWN {
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
    /// Goes through the stages up to `until`. If one fails, `self` keeps the outputs before it. If a stage
    /// finds an earlier output broken, that output is computed again.
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
        mixture::check_budget(run, &mixed.notes()?, domain_rows)?;
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

    /// The outputs that a run's directory is made from; `None` if the flow ended before sequences were
    /// packed.
    pub fn dataset(&self) -> Option<Dataset<'_>> {
        Some(Dataset {
            tokenizer: self.tokenizer.as_ref()?,
            tokens: self.tokens.as_ref()?,
            catalog: self.catalog.as_ref()?,
            domains: &self.domains.as_ref()?.1,
            mixture: self.mixture.as_ref()?,
            drawn: self.drawn.as_ref()?,
            packed: self.packed.as_ref()?,
            heldout: self.heldout.as_ref(),
            trained: self.trained.as_ref(),
            evaluated: &self.evaluated,
        })
    }
}

/// Records the keys and ingredients of this conf's stages, so that the next `plan` can say what changed.
pub async fn remember(run: &Run) -> Result<()> {
    if run.goal == Goal::Look || run.steps.lock().expect("no panic while held").is_empty() {
        return Ok(());
    }
    let at = latest_of(run);
    // a preview ends at an earlier stage than the run before it, whose later stages are kept
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

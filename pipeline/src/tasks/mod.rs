//! A stage's unit of work as a value: what is read, and what is written. The run does it itself or sends it to an executor of
//! its cluster; either way it is the same code and the same named files, so that a task done twice is a task done once.

pub mod distinct;
pub mod pack;
pub mod pass;
pub mod scatter;
pub mod tokenize;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use hashbrown::HashMap;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use crate::algorithms::tokenizer::Tokenizer;
use crate::hash::Digest;
use crate::output::Output;
use crate::progress::Bar;
use crate::source::Reader;
use crate::sql::engine::Engine;
use crate::stop::check_stop;
use crate::storage::{Location, Stores};
use crate::{Error, Result};
use distinct::Distinct;
use pack::PackFile;
use pass::Pass;
use scatter::Scatter;
use tokenize::Tokenize;

/// What is to be done. Everything that it needs is in it or in storage.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "snake_case")]
pub enum Task {
    /// A unit of source files becomes documents and ids.
    Tokenize(Tokenize),
    /// A bucket's documents become distinct.
    Distinct(Distinct),
    /// A pass of the draw over some of the mixture.
    Pass(Pass),
    /// A part's drawn ids, in the order of the output files.
    Scatter(Scatter),
    /// An output file.
    Pack(PackFile),
}

impl Task {
    /// Does it, here. `bar` is told of what a long task has done so far.
    pub async fn perform(self, worker: &Worker, bar: &Bar) -> Result<Output> {
        match self {
            Task::Tokenize(tokenize) => tokenize.perform(worker, bar).await,
            Task::Distinct(distinct) => distinct.perform(worker, bar).await,
            Task::Pass(pass) => pass.perform(worker, bar).await,
            Task::Scatter(scatter) => scatter.perform(worker).await,
            Task::Pack(pack) => pack.perform(worker).await,
        }
    }
}

/// Where tasks are done: what a process has for all of them.
pub struct Worker {
    pub stores: Stores,
    /// A local folder with room for a source file.
    spool: PathBuf,
    /// For the queries of all tasks together.
    pub engine: Arc<Engine>,
    /// How many parts are tokenised at a time, by all tasks together.
    pub parts: Arc<Semaphore>,
    /// Set by a signal; hot loops look at it.
    pub stop: Arc<AtomicBool>,
    tokenizers: Mutex<HashMap<Digest, Arc<Tokenizer>>>,
}

impl Worker {
    pub fn new(stores: Stores, spool: Option<&str>, engine: Arc<Engine>, stop: Arc<AtomicBool>) -> Self {
        Self {
            stores,
            spool: spool.map_or_else(std::env::temp_dir, PathBuf::from),
            parts: Arc::new(Semaphore::new(engine.partitions)),
            engine,
            stop,
            tokenizers: Mutex::default(),
        }
    }

    /// Ends a computation at the next good place.
    pub fn check_stop(&self) -> Result<()> {
        check_stop(&self.stop)
    }

    pub fn reader(&self, at: Location) -> Reader {
        Reader { store: at.store, spool: self.spool.clone(), stop: self.stop.clone() }
    }

    /// Knows a tokenizer from now on.
    pub fn keep(&self, fingerprint: Digest, tokenizer: Arc<Tokenizer>) {
        self.tokenizers.lock().expect("no panic while held").insert(fingerprint, tokenizer);
    }

    /// The tokenizer with a fingerprint: the one that is known, or the one at `url`.
    pub async fn tokenizer(&self, fingerprint: Digest, url: &str) -> Result<Arc<Tokenizer>> {
        if let Some(known) = self.tokenizers.lock().expect("no panic while held").get(&fingerprint) {
            return Ok(known.clone());
        }
        let json = self.stores.open(url)?.read().await?;
        if Digest::of(&json) != fingerprint {
            let message = "its bytes are not those of the run's tokenizer".into();
            return Err(Error::Corrupt { url: url.to_owned(), message });
        }
        let loaded = Arc::new(Tokenizer::from_json(&json, url)?);
        self.keep(fingerprint, loaded.clone());
        Ok(loaded)
    }
}

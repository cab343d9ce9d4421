//! A stage's unit of work as a value: what it reads and what it writes. The run performs it itself or sends
//! it to an executor of its cluster. Either way it is the same code and writes the same named files, so
//! performing a task twice is the same as performing it once.

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

/// A unit of work. Everything that it needs is in the value or in storage.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "snake_case")]
pub enum Task {
    /// Turns a unit of source files into documents and ids.
    Tokenize(Tokenize),
    /// Makes the documents of a bucket distinct.
    Distinct(Distinct),
    /// Makes a pass of the draw over some of the mixture.
    Pass(Pass),
    /// Copies a part's drawn ids into the order of the output files.
    Scatter(Scatter),
    /// Writes an output file.
    Pack(PackFile),
}

impl Task {
    /// Performs the task in this process. A long task reports its progress to `bar`.
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

/// What a process shares between all tasks that it performs.
pub struct Worker {
    pub stores: Stores,
    /// A local folder with room for a copy of a source file.
    spool: PathBuf,
    /// Runs the queries of all tasks, within one set of limits.
    pub engine: Arc<Engine>,
    /// Limits how many parts are tokenised at a time by all tasks together.
    pub parts: Arc<Semaphore>,
    /// Set by a signal; hot loops check it.
    pub stop: Arc<AtomicBool>,
    tokenizers: Mutex<HashMap<Digest, Arc<Tokenizer>>>,
}

impl Worker {
    /// `spool` is the local folder for copies of source files, by default the system's temporary folder.
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
    ///
    /// # Errors
    /// [`Error::Stopped`] once a signal has set the flag.
    pub fn check_stop(&self) -> Result<()> {
        check_stop(&self.stop)
    }

    /// A reader for the store of `at`.
    pub fn reader(&self, at: Location) -> Reader {
        Reader { store: at.store, spool: self.spool.clone(), stop: self.stop.clone() }
    }

    /// Keeps a loaded tokenizer for later tasks.
    pub fn keep(&self, fingerprint: Digest, tokenizer: Arc<Tokenizer>) {
        self.tokenizers.lock().expect("no panic while held").insert(fingerprint, tokenizer);
    }

    /// The tokenizer with this fingerprint: the one that is kept, or else the one at `url`.
    ///
    /// # Errors
    /// The file at `url` cannot be read, cannot be used, or has another fingerprint.
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

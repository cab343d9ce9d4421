//! Reads a unit. A blocking thread opens its files, decodes them and cuts them into parts, while workers take
//! the parts' rows.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures::{StreamExt, stream};
use object_store::ObjectStore;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::files::Unit;
use super::part::{Cutter, Part, Pieces};
use super::stored::{self, Stored};
use super::{Format, Spec, jsonl, parquet, text};
use crate::{Error, Result};

/// How many files are opened ahead. For small files, the requests take the time, not the bytes.
const FILES_AHEAD: usize = 8;

/// Reads units of one store.
#[derive(Clone, Debug)]
pub struct Reader {
    pub store: Arc<dyn ObjectStore>,
    /// A local folder with room for a file. A large Parquet file of a remote store is copied there while it
    /// is read, because its reader needs random access. The copy has no name, so it disappears even after a
    /// kill.
    pub spool: PathBuf,
    /// Set by a signal. Reading then ends with [`Error::Stopped`] within a megabyte.
    pub stop: Arc<AtomicBool>,
}

/// What is known about a file once it was read to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSummary {
    pub url: String,
    pub size: u64,
    /// Hash of the stored bytes.
    pub blake3: blake3::Hash,
    /// How many pieces its rows were read in: for JSONL one per part, for Parquet one per range of rows.
    pub parts: u32,
    /// Number of lines or rows: good, bad and blank.
    pub lines: u64,
}

/// The parts of a unit, in order. Dropping it ends the reading.
#[derive(Debug)]
pub struct Parts {
    parts: mpsc::Receiver<Part>,
    reading: Option<JoinHandle<Result<Vec<FileSummary>>>>,
    files: Vec<FileSummary>,
}

impl Reader {
    /// Streams the parts of a unit. One part is being read while one waits to be taken, so with *n* workers
    /// at most *n* + 2 are in memory.
    ///
    /// `skip` is called once with each part's index. A part for which it returns true, for example because it
    /// is cached, is read past and not returned. Must be called inside a tokio runtime.
    pub fn parts(&self, unit: Unit, spec: Arc<Spec>, skip: impl Fn(u32) -> bool + Send + 'static) -> Parts {
        let (send, parts) = mpsc::channel(1);
        let reader = self.clone();
        let cutter = Cutter::new(send, skip, self.stop.clone());
        let reading = tokio::task::spawn_blocking(move || reader.read(unit, &spec, cutter));
        Parts { parts, reading: Some(reading), files: Vec::new() }
    }

    /// Reads a unit's files one after the other.
    fn read(&self, unit: Unit, spec: &Spec, mut cutter: Cutter) -> Result<Vec<FileSummary>> {
        let runtime = Handle::current();
        let mut opened = stream::iter(unit.files)
            .map(|file| stored::open(&*self.store, file, self.stop.clone()))
            .buffered(FILES_AHEAD);
        let mut files = Vec::new();
        while let Some(stored) = runtime.block_on(opened.next()) {
            files.push(self.read_file(stored?, spec, &mut cutter)?);
        }
        cutter.cut()?;
        Ok(files)
    }

    fn read_file(&self, mut stored: Stored, spec: &Spec, cutter: &mut Cutter) -> Result<FileSummary> {
        let file = stored.file.clone();
        let mut pieces = Pieces::new(&file, cutter);
        let (lines, blake3) = match spec.format {
            Format::Jsonl => (jsonl::read(&mut stored, spec, &mut pieces)?, stored.finish()?),
            Format::Text => (text::read(&mut stored, spec, &mut pieces)?, stored.finish()?),
            Format::Parquet => {
                let (bytes, blake3) = stored.keep(&self.spool)?;
                (parquet::read(bytes, spec, &mut pieces)?, blake3)
            }
        };
        Ok(FileSummary { url: file.url.clone(), size: file.size, blake3, parts: pieces.count(), lines })
    }
}

impl Parts {
    /// The next part; `None` after the last one.
    ///
    /// # Errors
    /// A file is damaged, has changed or cannot be read, or the run was stopped. No part follows an error.
    pub async fn next(&mut self) -> Result<Option<Part>> {
        if let Some(part) = self.parts.recv().await {
            return Ok(Some(part));
        }
        if let Some(reading) = &mut self.reading {
            let done = reading.await;
            self.reading = None;
            self.files = match done {
                Ok(files) => files?,
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                // the runtime is being shut down
                Err(_) => return Err(Error::Stopped),
            };
        }
        Ok(None)
    }

    /// The files, in order. It is complete once [`next`](Self::next) has returned `None`, and empty before.
    pub fn files(&self) -> &[FileSummary] {
        &self.files
    }
}

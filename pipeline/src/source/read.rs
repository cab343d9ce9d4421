//! Reading a unit: files are opened, decoded and cut into parts on a blocking thread, while workers take
//! the parts' rows.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures::{StreamExt, stream};
use object_store::ObjectStore;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::files::{SourceFile, Unit};
use super::stored::{self, Stored};
use super::{Format, Outcome, Row, Spec, jsonl, parquet, text};
use crate::{Error, Result};

/// A part ends with the row that brings it to this size, after decompression.
pub const PART_BYTES: u64 = 32 << 20;

/// Or with so many rows: where they are a few bytes each, all bad ones of a part are still held in memory, with file, line
/// and reason.
pub(super) const PART_ROWS: u64 = 1 << 20;

/// How many small files are fetched at once: what takes time is the asking, not the bytes.
const FILES_AHEAD: usize = 8;

/// Reads units of one store.
#[derive(Clone, Debug)]
pub struct Reader {
    pub store: Arc<dyn ObjectStore>,
    /// A local folder with room for a file: a large Parquet file of a remote store is copied there while it
    /// is read, as its reader has to go back and forth. The copy goes away by itself, even after a kill.
    pub spool: PathBuf,
    /// Set by a signal; then reading ends with [`Error::Stopped`] within a megabyte.
    pub stop: Arc<AtomicBool>,
}

/// What is known of a file once it was read to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSummary {
    pub url: String,
    pub size: u64,
    /// Hash of the bytes as they are stored.
    pub blake3: blake3::Hash,
    /// How many parts have rows of this file.
    pub parts: u32,
    /// Lines or rows, good, bad and blank.
    pub lines: u64,
}

/// The parts of a unit, in order. Dropping it ends the reading.
#[derive(Debug)]
pub struct Parts {
    parts: mpsc::Receiver<Part>,
    reading: Option<JoinHandle<Result<Vec<FileSummary>>>>,
    files: Vec<FileSummary>,
}

/// A piece of a unit: whole rows of one file, or of several small ones.
#[derive(Debug)]
pub struct Part {
    /// Counts the unit's parts from 0.
    pub index: u32,
    pieces: Vec<Piece>,
    bytes: u64,
    stop: Arc<AtomicBool>,
}

/// Rows of one file that lie in one part.
#[derive(Debug)]
pub(super) struct Piece {
    pub file: Arc<SourceFile>,
    pub rows: Rows,
}

#[derive(Debug)]
pub(super) enum Rows {
    Lines(jsonl::Lines),
    Text(text::Text),
    Table(parquet::Range),
}

impl Reader {
    /// Streams the parts of a unit. One part is being read while one waits to be taken, so with *n* workers
    /// at most *n* + 2 are in memory.
    ///
    /// `skip` is asked once for each index; a part that it skips (it is cached, say) is read past and not
    /// given out. To be called inside a tokio runtime.
    pub fn parts(&self, unit: Unit, spec: Arc<Spec>, skip: impl Fn(u32) -> bool + Send + 'static) -> Parts {
        let (send, parts) = mpsc::channel(1);
        let reader = self.clone();
        let cutter = Cutter {
            send,
            skip: Box::new(skip),
            stop: self.stop.clone(),
            index: 0,
            pieces: Vec::new(),
            rows: 0,
            bytes: 0,
        };
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
        let mut pieces = Pieces { file: &file, cutter, count: 0 };
        let (lines, blake3) = match spec.format {
            Format::Jsonl => (jsonl::read(&mut stored, spec, &mut pieces)?, stored.finish()?),
            Format::Text => (text::read(&mut stored, spec, &mut pieces)?, stored.finish()?),
            Format::Parquet => {
                let (bytes, blake3) = stored.keep(&self.spool)?;
                (parquet::read(bytes, spec, &mut pieces)?, blake3)
            }
        };
        Ok(FileSummary { url: file.url.clone(), size: file.size, blake3, parts: pieces.count, lines })
    }
}

impl Parts {
    /// The next part; `None` after the last one.
    ///
    /// # Errors
    /// A file is damaged, has changed or can't be read, or the run was stopped. There are no more parts then.
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

    /// The files, in order: complete once [`next`](Self::next) has given `None`, empty before.
    pub fn files(&self) -> &[FileSummary] {
        &self.files
    }
}

impl Part {
    /// Gives every row to `f`, in order, and ends with `f`'s first error. It computes (parses, decompresses
    /// Parquet pages), so call it on a blocking thread.
    ///
    /// # Errors
    /// Those of `f`, and for Parquet a damaged page.
    pub fn rows(&self, spec: &Spec, f: &mut dyn FnMut(Row<'_>) -> Result<()>) -> Result<()> {
        for Piece { file, rows } in &self.pieces {
            let domain = spec.domain_of(file);
            let mut f = |line, outcome: Outcome<'_>| {
                stored::check(&self.stop)?;
                f(Row { file: &file.url, line, outcome })
            };
            match rows {
                Rows::Lines(lines) => lines.rows(spec, domain, &mut f)?,
                Rows::Text(text) => f(1, text.row(spec, domain))?,
                Rows::Table(range) => range.rows(file, spec, domain, &mut f)?,
            }
        }
        Ok(())
    }

    /// Its size after decompression, for progress; an estimate for Parquet.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Collects pieces, and sends a part whenever they are enough.
struct Cutter {
    send: mpsc::Sender<Part>,
    skip: Box<dyn Fn(u32) -> bool + Send>,
    stop: Arc<AtomicBool>,
    index: u32,
    pieces: Vec<Piece>,
    rows: u64,
    bytes: u64,
}

impl Cutter {
    /// Ends the part that is being collected, if there is anything in it.
    fn cut(&mut self) -> Result<()> {
        if self.pieces.is_empty() {
            return Ok(());
        }
        let index = self.index;
        let (pieces, bytes) = (std::mem::take(&mut self.pieces), std::mem::take(&mut self.bytes));
        self.rows = 0;
        self.index += 1;
        if (self.skip)(index) {
            return Ok(());
        }
        let part = Part { index, pieces, bytes, stop: self.stop.clone() };
        // nobody listens any more: the run is ending for another reason
        self.send.blocking_send(part).map_err(|_| Error::Stopped)
    }
}

/// Where a file's rows go.
pub(super) struct Pieces<'a> {
    pub file: &'a Arc<SourceFile>,
    cutter: &'a mut Cutter,
    count: u32,
}

impl Pieces<'_> {
    /// Whether the part is full once it has so many more rows, and bytes of them.
    pub fn is_full_with(&self, rows: u64, bytes: u64) -> bool {
        self.cutter.bytes + bytes >= PART_BYTES || self.cutter.rows + rows >= PART_ROWS
    }

    /// Adds rows of this file to the part, and ends it if it is full.
    pub fn push(&mut self, rows: Rows, count: u64, bytes: u64) -> Result<()> {
        self.cutter.pieces.push(Piece { file: self.file.clone(), rows });
        self.cutter.rows += count;
        self.cutter.bytes += bytes;
        self.count += 1;
        if self.is_full_with(0, 0) { self.cutter.cut() } else { Ok(()) }
    }

    /// [`Error::Stopped`] once a signal has come.
    pub fn check(&self) -> Result<()> {
        stored::check(&self.cutter.stop)
    }
}

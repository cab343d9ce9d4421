//! Parts of a unit, and how rows of files are collected into parts.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio::sync::mpsc;

use super::files::SourceFile;
use super::{Cell, Each, Outcome, Row, Spec};
use crate::stop::check_stop;
use crate::{Error, Result};

/// A part ends with the row that brings it to this many bytes, after decompression.
pub const PART_BYTES: u64 = 32 << 20;

/// A part also ends at this many rows. If rows have only a few bytes, there may be very many bad ones, and
/// all rejects of a part are held in memory with file, line and reason.
pub(super) const PART_ROWS: u64 = 1 << 20;

/// A piece of a unit: whole rows of one file, or of several small ones.
#[derive(Debug)]
pub struct Part {
    /// The part's number in its unit, from 0.
    pub index: u32,
    pieces: Vec<Piece>,
    bytes: u64,
    stop: Arc<AtomicBool>,
}

/// Rows of one file that lie in one part.
#[derive(Debug)]
pub(super) struct Piece {
    pub file: Arc<SourceFile>,
    pub rows: Box<dyn Rows>,
}

/// Rows of a file, in the form in which its format keeps them until a worker takes them.
pub(super) trait Rows: std::fmt::Debug + Send + Sync {
    /// Calls `f` with each row's number and outcome.
    fn each(&self, file: &SourceFile, spec: &Spec, domain: Cell<'_>, f: &mut Each<'_>) -> Result<()>;
}

impl Part {
    /// Calls `f` with every row, in order, until it returns an error. It computes (parses, decompresses
    /// Parquet pages), so call it on a blocking thread.
    ///
    /// # Errors
    /// Those of `f`; [`Error::Stopped`] after a signal; and for Parquet a damaged page, or a local file that
    /// has changed.
    pub fn rows(&self, spec: &Spec, f: &mut dyn FnMut(Row<'_>) -> Result<()>) -> Result<()> {
        for Piece { file, rows } in &self.pieces {
            let domain = spec.domain_of(file);
            let mut f = |line, outcome: Outcome<'_>| {
                check_stop(&self.stop)?;
                f(Row { file: &file.url, line, outcome })
            };
            rows.each(file, spec, domain, &mut f)?;
        }
        Ok(())
    }

    /// Its size in bytes after decompression, for progress; an estimate for Parquet.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Collects pieces, and sends a part whenever it is full.
pub(super) struct Cutter {
    send: mpsc::Sender<Part>,
    skip: Box<dyn Fn(u32) -> bool + Send>,
    stop: Arc<AtomicBool>,
    index: u32,
    pieces: Vec<Piece>,
    rows: u64,
    bytes: u64,
}

impl Cutter {
    pub fn new(
        send: mpsc::Sender<Part>,
        skip: impl Fn(u32) -> bool + Send + 'static,
        stop: Arc<AtomicBool>,
    ) -> Self {
        Self { send, skip: Box::new(skip), stop, index: 0, pieces: Vec::new(), rows: 0, bytes: 0 }
    }

    /// Ends the current part, if it has any rows, and sends it unless it is skipped.
    pub fn cut(&mut self) -> Result<()> {
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
        // the receiver was dropped: the run is ending for another reason
        self.send.blocking_send(part).map_err(|_| Error::Stopped)
    }
}

/// Adds the rows of one file to parts.
pub(super) struct Pieces<'a> {
    pub file: &'a Arc<SourceFile>,
    cutter: &'a mut Cutter,
    count: u32,
}

impl<'a> Pieces<'a> {
    pub fn new(file: &'a Arc<SourceFile>, cutter: &'a mut Cutter) -> Self {
        Self { file, cutter, count: 0 }
    }

    /// How many pieces the file's rows were added in: for JSONL one per part, for Parquet one per range of
    /// rows.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Whether the current part is full once it has `rows` more rows of `bytes` bytes.
    pub fn is_full_with(&self, rows: u64, bytes: u64) -> bool {
        self.cutter.bytes + bytes >= PART_BYTES || self.cutter.rows + rows >= PART_ROWS
    }

    /// Adds `count` rows of this file, of `bytes` bytes, to the current part, and ends it if it is full.
    pub fn push(&mut self, rows: impl Rows + 'static, count: u64, bytes: u64) -> Result<()> {
        self.cutter.pieces.push(Piece { file: self.file.clone(), rows: Box::new(rows) });
        self.cutter.rows += count;
        self.cutter.bytes += bytes;
        self.count += 1;
        if self.is_full_with(0, 0) { self.cutter.cut() } else { Ok(()) }
    }

    /// Returns [`Error::Stopped`] once a signal has come.
    pub fn check(&self) -> Result<()> {
        check_stop(&self.cutter.stop)
    }
}

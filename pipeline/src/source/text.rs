//! Folders of text: each file is a document.

use std::io::Read;

use super::files::SourceFile;
use super::part::{Pieces, Rows};
use super::stored::{Stored, own};
use super::{Cell, Each, Outcome, Reject, Spec};
use crate::{Error, Result};

/// The bytes of a text file. For one that is longer than the limit, only the size is kept.
#[derive(Debug)]
pub(super) struct Text {
    bytes: Vec<u8>,
    size: u64,
}

/// Reads a file as one row.
pub(super) fn read(stored: &mut Stored, spec: &Spec, pieces: &mut Pieces<'_>) -> Result<u64> {
    let size = stored.file.size;
    let mut bytes = Vec::new();
    if size <= spec.max_document_bytes {
        let doing = || format!("cannot read {}", pieces.file.url);
        stored
            .read_to_end(&mut bytes)
            .map_err(|error| own(error).unwrap_or_else(|source| Error::Io { doing: doing(), source }))?;
    }
    let held = bytes.len() as u64;
    pieces.push(Text { bytes, size }, 1, held)?;
    Ok(1)
}

impl Rows for Text {
    fn each(&self, _: &SourceFile, spec: &Spec, domain: Cell<'_>, f: &mut Each<'_>) -> Result<()> {
        f(1, self.row(spec, domain))
    }
}

impl Text {
    fn row<'a>(&'a self, spec: &Spec, domain: Cell<'a>) -> Outcome<'a> {
        if self.size > spec.max_document_bytes {
            return Err(Reject::too_long("the file", self.size, spec.max_document_bytes));
        }
        let text = std::str::from_utf8(&self.bytes).map_err(Reject::not_utf8)?;
        spec.outcome(Cell::Text(text.strip_prefix('\u{feff}').unwrap_or(text)), domain)
    }
}

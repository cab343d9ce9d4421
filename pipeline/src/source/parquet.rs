//! Parquet: reads two columns of a file, a range of a row group's rows at a time.
//!
//! This reads column chunks itself, below the level of Arrow. Texts are then checked for UTF-8 one by one,
//! while an Arrow reader ends at the first bad one; pages are decompressed one by one; and several workers
//! can read the ranges of a row group.

use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::{LogicalType, Type};
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::FOOTER_SIZE;
use parquet::file::metadata::FooterTail;
use parquet::file::reader::{ChunkReader, FileReader, Length};
use parquet::file::serialized_reader::SerializedFileReader;

use super::files::SourceFile;
use super::part::{PART_BYTES, PART_ROWS, Pieces, Rows};
use super::stored::{RandomAccess, own};
use super::{Cell, Column, Each, Reject, Spec, headers};
use crate::error::Doing;
use crate::{Error, Result};

/// About how many bytes are decoded at a time.
const BATCH_BYTES: u64 = 1 << 20;

/// An open Parquet file, shared by all its ranges.
struct Table {
    reader: SerializedFileReader<Access>,
    access: Access,
    text: Leaf,
    domain: Option<Leaf>,
}

/// Where a column's values are.
#[derive(Clone, Copy, Debug)]
enum Leaf {
    Of(usize),
    /// The column, or a struct that it is in, has Arrow's type Null, which writers give to a column without
    /// values.
    Null,
}

/// Rows of one row group.
#[derive(Debug)]
pub(super) struct Range {
    table: Arc<Table>,
    group: usize,
    /// The number of the group's first row in the file, from 0.
    before: u64,
    start: u64,
    stop: u64,
    /// How many rows to decode at a time.
    batch: u64,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table")
            .field("text", &self.text)
            .field("domain", &self.domain)
            .finish_non_exhaustive()
    }
}

/// Divides a file's row groups into ranges of about a part's size and passes them to `pieces`. Returns the
/// number of rows. Pages are read later, by [`Range::each`](Rows::each).
pub(super) fn read(bytes: RandomAccess, spec: &Spec, pieces: &mut Pieces<'_>) -> Result<u64> {
    let file = pieces.file.clone();
    let access = Access(Arc::new(bytes));
    let reader = guarded(&file, "its footer", || {
        let short = || ParquetError::EOF("it is too short for a Parquet file".into());
        let end = access.len().checked_sub(FOOTER_SIZE as u64).ok_or_else(short)?;
        let tail = FooterTail::try_from(access.get_bytes(end, FOOTER_SIZE)?.as_ref())?;
        let length = tail.metadata_length();
        let start = end.checked_sub(length as u64).ok_or_else(short)?;
        headers::check_footer(&access.get_bytes(start, length)?)?;
        SerializedFileReader::new(access.clone())
    })?;
    let text = find_column(&reader, &file, &spec.text, "text")?;
    let domain = spec.domain_column().map(|path| find_column(&reader, &file, path, "domain")).transpose()?;
    let table = Arc::new(Table { reader, access, text, domain });

    let mut before = 0;
    for (index, group) in table.reader.metadata().row_groups().iter().enumerate() {
        let place = format!("row group {index}");
        let count = |footer: i64| {
            u64::try_from(footer).map_err(|_| damaged(&file, &place, "its footer counts below zero"))
        };
        let rows = count(group.num_rows())?;
        let mut bytes = 0u64;
        for leaf in [Some(text), domain].into_iter().flatten() {
            let Leaf::Of(leaf) = leaf else { continue };
            let column = group.column(leaf);
            if count(column.num_values())? != rows {
                return Err(damaged(&file, &place, "its columns have different numbers of rows"));
            }
            bytes = bytes.saturating_add(count(column.uncompressed_size())?);
        }
        let ranges = (bytes / PART_BYTES).max(rows / PART_ROWS).clamp(1, rows.max(1));
        let batch = BATCH_BYTES.saturating_mul(rows).checked_div(bytes).unwrap_or(rows).clamp(1, 1024);
        for range in 0..ranges {
            let bound = |range| (u128::from(rows) * u128::from(range) / u128::from(ranges)) as u64;
            let (start, stop) = (bound(range), bound(range + 1));
            if start < stop {
                let range = Range { table: table.clone(), group: index, before, start, stop, batch };
                pieces.push(range, stop - start, bytes / ranges)?;
            }
        }
        before = rows.saturating_add(before);
    }
    if i64::try_from(before) != Ok(table.reader.metadata().file_metadata().num_rows()) {
        return Err(damaged(&file, "its footer", "the row groups do not add up to the file"));
    }
    Ok(before)
}

/// Finds a column's values. `what` is the column's key in the conf, for messages.
fn find_column(
    reader: &SerializedFileReader<Access>,
    file: &SourceFile,
    column: &Column,
    what: &str,
) -> Result<Leaf> {
    let path = column.names();
    let columns = reader.metadata().file_metadata().schema_descr().columns();
    let usable = |i: usize| columns[i].physical_type() == Type::BYTE_ARRAY && columns[i].max_rep_level() == 0;
    let is_null = |i: usize| {
        columns[i].logical_type_ref() == Some(&LogicalType::Unknown) && columns[i].max_rep_level() == 0
    };
    // if `meta` is of type Null, `meta.set` has no values either
    if (0..columns.len()).any(|i| path.starts_with(columns[i].path().parts()) && is_null(i)) {
        return Ok(Leaf::Null);
    }
    let problem = match columns.iter().position(|column| column.path().parts() == path) {
        Some(found) if usable(found) => return Ok(Leaf::Of(found)),
        Some(found) if columns[found].max_rep_level() > 0 => "is a list".to_owned(),
        Some(found) => format!("holds {}, not text", columns[found].physical_type()),
        None if columns.iter().any(|column| column.path().parts().starts_with(path)) => {
            "is a struct or a list: it takes one of its fields".to_owned()
        }
        None => "is not in the file".to_owned(),
    };
    let names = |wanted: bool| {
        let names: Vec<_> = (0..columns.len())
            .filter(|&i| usable(i) == wanted)
            .map(|i| format!("`{}`", Column::of(columns[i].path().parts())))
            .collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    };
    Err(Error::data(
        format!("the {what} column `{column}` of `{}` {problem}", file.url),
        format!(
            "set the source's `{what}` to a column that holds text: {} (others: {})",
            names(true),
            names(false)
        ),
    ))
}

impl Rows for Range {
    fn each(&self, file: &SourceFile, spec: &Spec, domain: Cell<'_>, f: &mut Each<'_>) -> Result<()> {
        let table = &*self.table;
        let place = format!("row group {}", self.group);
        let mut text = guarded(file, &place, || Values::open(table, self.group, table.text, self.start))?;
        let mut own_domain = table
            .domain
            .map(|leaf| guarded(file, &place, || Values::open(table, self.group, leaf, self.start)))
            .transpose()?;
        let mut row = self.start;
        while row < self.stop {
            let batch = self.batch.min(self.stop - row);
            guarded(file, &place, || {
                text.read(batch)?;
                own_domain.as_mut().map_or(Ok(()), |domain| domain.read(batch))
            })?;
            for _ in 0..batch {
                let text = text.next();
                let domain = own_domain.as_mut().map_or(Ok(domain), Values::next);
                row += 1;
                let outcome = text.and_then(|text| spec.outcome(text, domain?));
                f(self.before + row, outcome)?;
            }
        }
        table.access.check(file)
    }
}

/// The values of a column in a row group, read batch by batch.
enum Values {
    Of(Box<Texts>),
    Null,
}

impl Values {
    fn open(table: &Table, group: usize, leaf: Leaf, start: u64) -> parquet::errors::Result<Self> {
        match leaf {
            Leaf::Of(leaf) => Ok(Values::Of(Box::new(Texts::open(table, group, leaf, start)?))),
            Leaf::Null => Ok(Values::Null),
        }
    }

    fn read(&mut self, rows: u64) -> parquet::errors::Result<()> {
        match self {
            Values::Of(texts) => texts.read(rows),
            Values::Null => Ok(()),
        }
    }

    fn next(&mut self) -> Result<Cell<'_>, Reject> {
        match self {
            Values::Of(texts) => texts.next(),
            Values::Null => Ok(Cell::Null),
        }
    }
}

struct Texts {
    reader: ColumnReaderImpl<ByteArrayType>,
    /// The definition level of a value that isn't null.
    defined: i16,
    levels: std::vec::IntoIter<i16>,
    values: std::vec::IntoIter<ByteArray>,
    /// The value that was returned last.
    value: ByteArray,
}

impl Texts {
    fn open(table: &Table, group: usize, leaf: usize, start: u64) -> parquet::errors::Result<Self> {
        let defined = table.reader.metadata().file_metadata().schema_descr().column(leaf).max_def_level();
        let group = table.reader.get_row_group(group)?;
        let (begin, size) = group.metadata().column(leaf).byte_range();
        headers::check_page_headers(size, |range| {
            table.access.get_bytes(begin + range.start, (range.end - range.start) as usize)
        })?;
        let column = table.reader.metadata().file_metadata().schema_descr().column(leaf);
        let pages = Box::new(Pages(group.get_column_page_reader(leaf)?));
        let mut reader = ColumnReaderImpl::new(column, pages);
        let skipped = reader.skip_records(start as usize)?;
        expect(start, skipped)?;
        Ok(Self {
            reader,
            defined,
            levels: Vec::new().into_iter(),
            values: Vec::new().into_iter(),
            value: ByteArray::new(),
        })
    }

    fn read(&mut self, rows: u64) -> parquet::errors::Result<()> {
        let (mut levels, mut values) = (Vec::new(), Vec::new());
        let (read, _, _) = self.reader.read_records(rows as usize, Some(&mut levels), None, &mut values)?;
        if self.defined == 0 {
            levels = vec![0; read];
        }
        (self.levels, self.values) = (levels.into_iter(), values.into_iter());
        expect(rows, read)
    }

    fn next(&mut self) -> Result<Cell<'_>, Reject> {
        if self.levels.next() != Some(self.defined) {
            return Ok(Cell::Null);
        }
        self.value = self.values.next().unwrap_or_default();
        std::str::from_utf8(self.value.data()).map(Cell::Text).map_err(Reject::not_utf8)
    }
}

/// A column's pages, with a check of each dictionary before the library takes it.
struct Pages(Box<dyn PageReader>);

impl PageReader for Pages {
    fn get_next_page(&mut self) -> parquet::errors::Result<Option<Page>> {
        let page = self.0.get_next_page()?;
        page.as_ref().map_or(Ok(()), headers::check_dictionary)?;
        Ok(page)
    }

    fn peek_next_page(&mut self) -> parquet::errors::Result<Option<PageMetadata>> {
        self.0.peek_next_page()
    }

    fn skip_next_page(&mut self) -> parquet::errors::Result<()> {
        self.0.skip_next_page()
    }
}

impl Iterator for Pages {
    type Item = parquet::errors::Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

fn expect(rows: u64, got: usize) -> parquet::errors::Result<()> {
    if got as u64 == rows {
        return Ok(());
    }
    Err(ParquetError::EOF(format!("{rows} more rows expected, {got} found")))
}

/// Runs a step of the Parquet library. An error, or a panic, is reported as damage of the file at `place`.
fn guarded<T>(
    file: &SourceFile,
    place: &str,
    step: impl FnOnce() -> parquet::errors::Result<T>,
) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(step)) {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(ParquetError::External(error))) => {
            Err(match error.downcast::<io::Error>().map(|error| own(*error)) {
                Ok(Ok(own)) => own,
                Ok(Err(error)) => damaged(file, place, &error.to_string()),
                Err(error) => damaged(file, place, &error.to_string()),
            })
        }
        Ok(Err(error)) => Err(damaged(file, place, &error.to_string())),
        Err(_) => Err(damaged(file, place, "the Parquet library gave up on it")),
    }
}

fn damaged(file: &SourceFile, place: &str, problem: &str) -> Error {
    Error::data(
        format!("`{}` is no sound Parquet file: {place}: {problem}", file.url),
        "is the source's `format` right? If it is, fetch the file again, or leave it out of the source's url",
    )
}

/// A kept file, in the form that the Parquet library reads.
#[derive(Clone)]
struct Access(Arc<RandomAccess>);

impl Access {
    /// Checks that a local file has not changed.
    fn check(&self, file: &SourceFile) -> Result<()> {
        match &*self.0 {
            RandomAccess::Whole(_) => Ok(()),
            RandomAccess::File(local) => local.check(file),
        }
    }
}

impl Length for Access {
    fn len(&self) -> u64 {
        match &*self.0 {
            RandomAccess::Whole(bytes) => bytes.len() as u64,
            RandomAccess::File(local) => local.size,
        }
    }
}

impl ChunkReader for Access {
    type T = BufReader<At>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        // page headers are small
        Ok(BufReader::with_capacity(1 << 10, At { access: self.clone(), start }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        // a damaged file may claim more bytes than it has: do not allocate memory for them
        if start.checked_add(length as u64).is_none_or(|stop| stop > self.len()) {
            return Err(ParquetError::EOF(format!(
                "{length} bytes at byte {start} would end behind the file"
            )));
        }
        if let RandomAccess::Whole(bytes) = &*self.0 {
            return Ok(bytes.slice(start as usize..start as usize + length));
        }
        let mut bytes = vec![0; length];
        At { access: self.clone(), start }.read_exact(&mut bytes)?;
        Ok(bytes.into())
    }
}

/// Reads a file from a place on. It leaves the file's own cursor alone, which all ranges share.
struct At {
    access: Access,
    start: u64,
}

impl Read for At {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let bytes = match &*self.access.0 {
            RandomAccess::Whole(bytes) => bytes.get(self.start as usize..).unwrap_or_default().read(out)?,
            RandomAccess::File(local) => {
                let bytes = local.file.read_at(out, self.start).doing(|| "cannot read a Parquet file".into());
                bytes.map_err(io::Error::other)?
            }
        };
        self.start += bytes as u64;
        Ok(bytes)
    }
}

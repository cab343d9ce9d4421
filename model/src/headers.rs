//! A check of a Parquet file's headers, before the Parquet library reads them.
//!
//! The library skips unknown fields value by value, and some values have no bytes: seven bytes of a header can claim two
//! billion booleans, and a header of three kilobytes can keep the library busy for minutes. It also allocates as many
//! children of a column as the file claims, and recurses as deep as the file claims. So a header is accepted only if each of
//! its values has at least one byte, and its columns form a tree of limited depth.
//!
//! The library reads known fields with the type that they should have, whatever type the file declares. A check that follows
//! the declared types would read other bytes than the library does. So this module knows the types, too, and refuses fields
//! of another declared type.

use std::ops::Range;

use bytes::Bytes;
use parquet::column::page::Page;
use parquet::errors::ParquetError;

/// The type of a field.
#[derive(Clone, Copy)]
enum Type {
    Bool,
    Byte,
    I16,
    I32,
    I64,
    Double,
    Binary,
    List(&'static Type),
    Struct(Fields),
    /// A struct with the fields of [`COLUMN`].
    Column,
}

/// The fields of a struct: ids and types.
type Fields = &'static [(i16, Type)];

use Type::*;

/// The fields of a page header.
const PAGE: Fields = &[
    (1, I32),
    (2, I32),
    (3, I32),
    (4, I32),
    (5, Struct(&[(1, I32), (2, I32), (3, I32), (4, I32), (5, STATISTICS)])),
    (6, EMPTY),
    (7, Struct(&[(1, I32), (2, I32), (3, Bool)])),
    (8, Struct(&[(1, I32), (2, I32), (3, I32), (4, I32), (5, I32), (6, I32), (7, Bool), (8, STATISTICS)])),
];

/// The fields of [`PAGE`] with the kind of page, and with the number of bytes after its header.
const PAGE_KIND: usize = 1;
const PAGE_BYTES: usize = 3;

/// The kind of an index page. The library ignores its header and takes its contents for the next header.
const INDEX_PAGE: i64 = 1;

/// The fields of the file's footer.
const FILE: Fields = &[
    (1, I32),
    (2, List(&Column)),
    (3, I64),
    (4, List(&ROW_GROUP)),
    (5, List(&KEY_VALUE)),
    (6, Binary),
    (7, List(&Struct(&[(1, EMPTY), (2, EMPTY)]))),
    (8, Struct(&[(1, ALGORITHM), (2, ALGORITHM)])),
    (9, Binary),
];

/// The fields of a column's schema, or of a group of columns.
const COLUMN: Fields = &[
    (1, I32),
    (2, I32),
    (3, I32),
    (4, Binary),
    (5, I32),
    (6, I32),
    (7, I32),
    (8, I32),
    (9, I32),
    (10, LOGICAL_TYPE),
];

/// The field of [`COLUMN`] with the number of its children, which follow it.
const COLUMN_CHILDREN: usize = 5;

const LOGICAL_TYPE: Type = Struct(&[
    (1, EMPTY),
    (2, EMPTY),
    (3, EMPTY),
    (4, EMPTY),
    (5, Struct(&[(1, I32), (2, I32)])),
    (6, EMPTY),
    (7, Struct(&[(1, Bool), (2, TIME_UNIT)])),
    (8, Struct(&[(1, Bool), (2, TIME_UNIT)])),
    (10, Struct(&[(1, Byte), (2, Bool)])),
    (11, EMPTY),
    (12, EMPTY),
    (13, EMPTY),
    (14, EMPTY),
    (15, EMPTY),
    (16, Struct(&[(1, Byte)])),
    (17, Struct(&[(1, Binary)])),
    (18, Struct(&[(1, Binary), (2, I32)])),
]);

const TIME_UNIT: Type = Struct(&[(1, EMPTY), (2, EMPTY), (3, EMPTY)]);

const ROW_GROUP: Type = Struct(&[
    (1, List(&CHUNK)),
    (2, I64),
    (3, I64),
    (4, List(&Struct(&[(1, I32), (2, Bool), (3, Bool)]))),
    (5, I64),
    (6, I64),
    (7, I16),
]);

/// A column chunk of a row group.
const CHUNK: Type = Struct(&[
    (1, Binary),
    (2, I64),
    (3, CHUNK_METADATA),
    (4, I64),
    (5, I32),
    (6, I64),
    (7, I32),
    (8, Struct(&[(1, EMPTY), (2, Struct(&[(1, List(&Binary)), (2, Binary)]))])),
    (9, Binary),
]);

const CHUNK_METADATA: Type = Struct(&[
    (1, I32),
    (2, List(&I32)),
    (3, List(&Binary)),
    (4, I32),
    (5, I64),
    (6, I64),
    (7, I64),
    (8, List(&KEY_VALUE)),
    (9, I64),
    (10, I64),
    (11, I64),
    (12, STATISTICS),
    (13, List(&Struct(&[(1, I32), (2, I32), (3, I32)]))),
    (14, I64),
    (15, I32),
    (16, Struct(&[(1, I64), (2, List(&I64)), (3, List(&I64))])),
    (17, Struct(&[(1, BOX), (2, List(&I32))])),
]);

const STATISTICS: Type =
    Struct(&[(1, Binary), (2, Binary), (3, I64), (4, I64), (5, Binary), (6, Binary), (7, Bool), (8, Bool)]);

const KEY_VALUE: Type = Struct(&[(1, Binary), (2, Binary)]);

const ALGORITHM: Type = Struct(&[(1, Binary), (2, Binary), (3, Bool)]);

const BOX: Type = Struct(&[
    (1, Double),
    (2, Double),
    (3, Double),
    (4, Double),
    (5, Double),
    (6, Double),
    (7, Double),
    (8, Double),
]);

const EMPTY: Type = Struct(&[]);

/// How many bytes are read first for a page's header.
const HEADER_BYTES: u64 = 256;

/// The deepest nesting of values, which is the library's own limit for fields that it skips.
const MAX_DEPTH: usize = 64;

/// The deepest nesting of columns.
const MAX_COLUMN_DEPTH: usize = 64;

/// The types of Thrift's compact protocol.
pub(crate) mod wire {
    pub const TRUE: u8 = 1;
    pub const FALSE: u8 = 2;
    pub const BYTE: u8 = 3;
    pub const I16: u8 = 4;
    pub const I32: u8 = 5;
    pub const I64: u8 = 6;
    pub const DOUBLE: u8 = 7;
    pub const BINARY: u8 = 8;
    pub const LIST: u8 = 9;
    pub const SET: u8 = 10;
    pub const MAP: u8 = 11;
    pub const STRUCT: u8 = 12;
    pub const UUID: u8 = 13;
}

/// Checks a file's footer, without its last eight bytes.
///
/// # Errors
/// The library must not read the footer.
pub fn check_footer(bytes: &[u8]) -> Result<(), ParquetError> {
    let mut walk = Walker { rest: bytes, children: vec![] };
    walk.fields(Some(FILE), MAX_DEPTH)?;
    // How many children are left in each open group.
    let mut open: Vec<i64> = vec![];
    let mut claimed = 0;
    for children in walk.children {
        while open.pop_if(|left| *left == 0).is_some() {}
        if let Some(left) = open.last_mut() {
            *left -= 1;
        }
        if children > 0 {
            open.push(children);
        }
        claimed += children.max(0);
        if open.len() > MAX_COLUMN_DEPTH || claimed > bytes.len() as i64 {
            return Err(damaged("its columns are too many or nested too deeply"));
        }
    }
    Ok(())
}

/// Checks the page headers of a column chunk of `size` bytes. `read` returns a range of its bytes. Of the pages' contents,
/// only the few bytes that are read along with a header are needed.
///
/// # Errors
/// The library must not read the headers, or `read` fails.
pub fn check_page_headers(
    size: u64,
    mut read: impl FnMut(Range<u64>) -> Result<Bytes, ParquetError>,
) -> Result<(), ParquetError> {
    let mut start = 0;
    while start < size {
        let mut window = HEADER_BYTES;
        let (numbers, header) = loop {
            let stop = size.min(start + window);
            let bytes = read(start..stop)?;
            let mut walk = Walker { rest: &bytes, children: vec![] };
            match walk.fields(Some(PAGE), MAX_DEPTH) {
                Ok(numbers) => break (numbers, (bytes.len() - walk.rest.len()) as u64),
                // Some headers contain long values.
                Err(_) if stop < size => window *= 8,
                Err(error) => return Err(error),
            }
        };
        if numbers[PAGE_KIND] == INDEX_PAGE {
            return Err(damaged("an index page is among its pages"));
        }
        let bytes = u64::try_from(numbers[PAGE_BYTES] as i32).ok();
        start = bytes
            .map(|bytes| start + header + bytes)
            .filter(|next| *next <= size)
            .ok_or_else(|| damaged("a page ends before its header says"))?;
    }
    Ok(())
}

/// Checks that a dictionary has a byte for each of its values. The library allocates memory for all values that it claims,
/// up to 64 GiB, before it looks at the bytes. Other pages pass.
///
/// # Errors
/// If it has fewer bytes.
pub fn check_dictionary(page: &Page) -> Result<(), ParquetError> {
    match page {
        Page::DictionaryPage { buf, num_values, .. } if *num_values as usize > buf.len() => {
            Err(damaged(&format!("a dictionary of {num_values} values has {} bytes", buf.len())))
        }
        _ => Ok(()),
    }
}

fn damaged(what: &str) -> ParquetError {
    ParquetError::General(what.to_owned())
}

/// Reads a header as the library does, byte for byte.
struct Walker<'a> {
    rest: &'a [u8],
    /// The number of children of each column, in order.
    children: Vec<i64>,
}

impl Walker<'_> {
    fn skip(&mut self, bytes: u64) -> Result<(), ParquetError> {
        let rest = usize::try_from(bytes).ok().and_then(|bytes| self.rest.get(bytes..));
        self.rest = rest.ok_or_else(|| damaged("a header ends before its values do"))?;
        Ok(())
    }

    fn byte(&mut self) -> Result<u8, ParquetError> {
        let first = self.rest.first().copied().unwrap_or_default();
        self.skip(1)?;
        Ok(first)
    }

    /// A variable-length integer of seven bits per byte.
    fn number(&mut self) -> Result<u64, ParquetError> {
        let (mut number, mut shift) = (0, 0u32);
        loop {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7F).wrapping_shl(shift);
            if byte & 0x80 == 0 {
                return Ok(number);
            }
            shift = shift.wrapping_add(7);
        }
    }

    /// A zigzag-encoded signed integer.
    fn signed(&mut self) -> Result<i64, ParquetError> {
        let number = self.number()?;
        Ok((number >> 1) as i64 ^ -((number & 1) as i64))
    }

    /// The number of values of a list or a map.
    fn count(&mut self) -> Result<u64, ParquetError> {
        let count = self.number()?;
        if i32::try_from(count).is_err() {
            Err(damaged("a header has a list that is too long"))
        } else {
            Ok(count)
        }
    }

    /// Reads a struct's fields. Returns the numbers among them, indexed by field id.
    fn fields(&mut self, known: Option<Fields>, depth: usize) -> Result<[i64; 8], ParquetError> {
        let mut numbers = [0; 8];
        let mut last = 0i16;
        loop {
            let header = self.byte()?;
            let (delta, kind) = (header >> 4, header & 0x0F);
            if kind == 0 {
                break;
            }
            last = match delta {
                0 => self.signed()? as i16,
                // The ids of an unknown struct's fields do not matter.
                _ if known.is_none() => 0,
                delta => last
                    .checked_add(i16::from(delta))
                    .ok_or_else(|| damaged("a header has too many fields"))?,
            };
            let expected =
                known.and_then(|fields| fields.iter().find(|(id, _)| *id == last)).map(|(_, is)| *is);
            let number = self.value(kind, expected, depth)?;
            if let Some(slot) = usize::try_from(last).ok().and_then(|id| numbers.get_mut(id)) {
                *slot = number;
            }
        }
        Ok(numbers)
    }

    /// Reads a value of the declared `kind`. Returns it if it is a number.
    fn value(&mut self, kind: u8, is: Option<Type>, depth: usize) -> Result<i64, ParquetError> {
        let as_known = match is {
            None => true,
            Some(Bool) => matches!(kind, wire::TRUE | wire::FALSE),
            Some(Byte) => kind == wire::BYTE,
            Some(I16) => kind == wire::I16,
            Some(I32) => kind == wire::I32,
            Some(I64) => kind == wire::I64,
            Some(Double) => kind == wire::DOUBLE,
            Some(Binary) => kind == wire::BINARY,
            Some(List(_)) => kind == wire::LIST,
            Some(Struct(_) | Column) => kind == wire::STRUCT,
        };
        if !as_known {
            return Err(damaged("a header has a field of another type"));
        }
        let Some(depth) = depth.checked_sub(1) else {
            return Err(damaged("a header's values are nested too deeply"));
        };
        match kind {
            wire::TRUE | wire::FALSE => {}
            wire::BYTE => self.skip(1)?,
            wire::I16 | wire::I32 | wire::I64 => return self.signed(),
            wire::DOUBLE => self.skip(8)?,
            wire::UUID => self.skip(16)?,
            wire::BINARY => {
                let length = self.number()?;
                self.skip(length)?;
            }
            wire::LIST | wire::SET => {
                let header = self.byte()?;
                let count = if header >> 4 == 15 { self.count()? } else { u64::from(header >> 4) };
                let of = match is {
                    Some(List(of)) => Some(*of),
                    _ => None,
                };
                self.values(header & 0x0F, of, count, depth)?;
            }
            wire::MAP => {
                let count = self.count()?;
                if count > 0 {
                    let kinds = self.byte()?;
                    for _ in 0..count {
                        self.values(kinds >> 4, None, 1, depth)?;
                        self.values(kinds & 0x0F, None, 1, depth)?;
                    }
                }
            }
            wire::STRUCT => match is {
                Some(Column) => {
                    let numbers = self.fields(Some(COLUMN), depth)?;
                    self.children.push(i64::from(numbers[COLUMN_CHILDREN] as i32));
                }
                Some(Struct(fields)) => drop(self.fields(Some(fields), depth)?),
                _ => drop(self.fields(None, depth)?),
            },
            _ => return Err(damaged("a header has a field of an unknown type")),
        }
        Ok(0)
    }

    /// Reads the values of a list. The library reads no bytes for booleans in a list, so such lists are refused.
    fn values(&mut self, kind: u8, is: Option<Type>, count: u64, depth: usize) -> Result<(), ParquetError> {
        if count > 0 && matches!(kind, wire::TRUE | wire::FALSE) {
            return Err(damaged("a header has a list of booleans"));
        }
        for _ in 0..count {
            self.value(kind, is, depth)?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An id that no field has.
    pub(crate) const UNKNOWN: u8 = 0xF0;

    /// The header of a list of `count` values of a kind.
    pub(crate) fn list(kind: u8, mut count: u32) -> Vec<u8> {
        let mut bytes = vec![0xF0 | kind];
        while count >= 0x80 {
            bytes.push(count as u8 | 0x80);
            count >>= 7;
        }
        bytes.push(count as u8);
        bytes
    }

    /// A field with a list of lists of values without bytes; as many lists as fit into `room` bytes.
    pub(crate) fn endless(room: usize, kind: u8) -> Vec<u8> {
        let of = |count: usize| {
            let inner = list(kind, i32::MAX as u32).repeat(count);
            [vec![UNKNOWN | wire::LIST], list(wire::LIST, count as u32), inner].concat()
        };
        of((0..).take_while(|count| of(*count).len() <= room).last().unwrap_or_default())
    }

    #[test]
    fn columns_that_lie_too_deep_or_are_too_many_are_refused() {
        // A required group with this many children and no name.
        let group = |children: u32| {
            let mut bytes = vec![0x35, 0, 0x18, 0, 0x15];
            bytes.extend(&list(0, 2 * children)[1..]);
            bytes.push(0);
            bytes
        };
        let footer_of = |groups: Vec<Vec<u8>>| {
            [vec![0x29], list(wire::STRUCT, groups.len() as u32), groups.concat(), vec![0]].concat()
        };
        check_footer(&footer_of(vec![group(1), group(0)])).unwrap();
        check_footer(&footer_of([vec![group(1); 60], vec![group(0)]].concat())).unwrap();
        for groups in [[vec![group(1); 500], vec![group(0)]].concat(), vec![group(1 << 30)]] {
            let error = check_footer(&footer_of(groups)).unwrap_err().to_string();
            assert!(error.contains("its columns are too many"), "{error}");
        }
    }

    #[test]
    fn what_is_said_to_be_of_another_type_hides_nothing() {
        // The library takes the first field for a number and continues within the text.
        let text = endless(500, wire::TRUE);
        let hidden = [vec![0x18], list(0, text.len() as u32)[1..].to_vec(), text, vec![0]].concat();
        let walk = |bytes: &[u8]| {
            let bytes = Bytes::copy_from_slice(bytes);
            check_page_headers(bytes.len() as u64, |range| {
                Ok(bytes.slice(range.start as usize..range.end as usize))
            })
        };
        let error = walk(&hidden).unwrap_err().to_string();
        assert!(error.contains("of another type"), "{error}");
        // The fields of an ordinary page without values.
        walk(&[0x15, 0, 0x15, 0, 0x15, 0, 0x2C, 0x15, 0, 0x15, 0, 0x15, 6, 0x15, 6, 0, 0]).unwrap();
        assert!(walk(&[0x15, 2, 0x15, 0, 0x15, 0, 0]).unwrap_err().to_string().contains("index"));
    }
}

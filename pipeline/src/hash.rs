//! Hashes that name and check things: keys of stages, digests of files and of rows, and pseudo-random places
//! in an order.

use std::fmt;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Float64Type, Int32Type, Int64Type, UInt16Type, UInt32Type};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// The BLAKE3 hash of some bytes, displayed as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The first 32 hexadecimal digits (128 bits), which folders are named by.
    pub fn short(&self) -> String {
        self.to_string()[..32].to_owned()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A digest of a table's rows that does not depend on their order: the sum of the rows' 128-bit hashes modulo
/// 2¹²⁸.
///
/// A newer Parquet or zstd library changes a file's bytes, but not this digest. So it tells such a change
/// from a real difference.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct RowDigest(pub u128);

impl RowDigest {
    pub fn add(&mut self, other: RowDigest) {
        self.0 = self.0.wrapping_add(other.0);
    }

    /// The digest of a batch's rows over all of its columns, by position.
    pub fn of(batch: &RecordBatch) -> Self {
        let mut sum = 0u128;
        let mut row_bytes = Vec::new();
        for row in 0..batch.num_rows() {
            row_bytes.clear();
            for column in batch.columns() {
                write_value(column.as_ref(), row, &mut row_bytes);
            }
            sum = sum.wrapping_add(first_16(&blake3::hash(&row_bytes)));
        }
        Self(sum)
    }
}

fn first_16(hash: &blake3::Hash) -> u128 {
    u128::from_le_bytes(hash.as_bytes()[..16].try_into().expect("16 of 32 bytes"))
}

/// Appends one value in a form that depends only on the value: it uses no library's row format and no
/// offsets.
fn write_value(array: &dyn Array, row: usize, out: &mut Vec<u8>) {
    if array.is_null(row) {
        return out.push(0);
    }
    out.push(1);
    let bytes = |out: &mut Vec<u8>, value: &[u8]| {
        out.extend_from_slice(&(value.len() as u64).to_le_bytes());
        out.extend_from_slice(value);
    };
    match array.data_type() {
        DataType::Boolean => out.push(array.as_boolean().value(row) as u8),
        DataType::Int32 => {
            out.extend_from_slice(&(array.as_primitive::<Int32Type>().value(row) as i64).to_le_bytes())
        }
        DataType::Int64 => out.extend_from_slice(&array.as_primitive::<Int64Type>().value(row).to_le_bytes()),
        DataType::UInt16 => {
            out.extend_from_slice(&array.as_primitive::<UInt16Type>().value(row).to_le_bytes())
        }
        DataType::UInt32 => {
            out.extend_from_slice(&array.as_primitive::<UInt32Type>().value(row).to_le_bytes())
        }
        DataType::Float64 => {
            out.extend_from_slice(&array.as_primitive::<Float64Type>().value(row).to_bits().to_le_bytes())
        }
        DataType::FixedSizeBinary(_) => bytes(out, array.as_fixed_size_binary().value(row)),
        DataType::Utf8 => bytes(out, array.as_string::<i32>().value(row).as_bytes()),
        DataType::Utf8View => bytes(out, array.as_string_view().value(row).as_bytes()),
        DataType::List(_) => {
            let values = array.as_list::<i32>().value(row);
            out.extend_from_slice(&(values.len() as u64).to_le_bytes());
            match values.data_type() {
                // ids are the only long lists, so their values are written without a null mark each
                DataType::UInt16 => values
                    .as_primitive::<UInt16Type>()
                    .values()
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
                DataType::UInt32 => values
                    .as_primitive::<UInt32Type>()
                    .values()
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
                DataType::Int32 => values
                    .as_primitive::<Int32Type>()
                    .values()
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
                _ => (0..values.len()).for_each(|i| write_value(values.as_ref(), i, out)),
            }
        }
        DataType::Struct(_) => {
            array.as_struct().columns().iter().for_each(|c| write_value(c.as_ref(), row, out))
        }
        other => unreachable!("no table of lengthwise has a column of type {other}"),
    }
}

impl fmt::Display for RowDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for RowDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Serialises as the hexadecimal text that `Display` writes.
macro_rules! serde_as_hex {
    ($type:ty, $parse:expr) => {
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                let parse: fn(&str) -> Option<Self> = $parse;
                parse(&text).ok_or_else(|| serde::de::Error::custom(format!("`{text}` is not a digest")))
            }
        }
        impl JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "title": "digest" })
            }
        }
    };
}
serde_as_hex!(Digest, |text| blake3::Hash::from_hex(text).ok().map(|hash| Digest(*hash.as_bytes())));
serde_as_hex!(RowDigest, |text| u128::from_str_radix(text, 16).ok().map(RowDigest));

/// `doc_id`: the first 16 bytes of BLAKE3 over (length of domain as u64 ‖ domain ‖ text).
pub fn doc_id(domain: &str, text: &str) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(domain.len() as u64).to_le_bytes()).update(domain.as_bytes()).update(text.as_bytes());
    first_16(&hasher.finalize()).to_le_bytes()
}

/// `text_id`: the first 16 bytes of BLAKE3 over the text. Documents of different domains may have the same
/// text.
pub fn text_id(text: &str) -> [u8; 16] {
    first_16(&blake3::hash(text.as_bytes())).to_le_bytes()
}

/// 64 pseudo-random bits that depend only on the arguments. `tag` separates the uses, so that whether a span
/// is drawn is independent of where it is placed.
pub fn unit_hash(tag: &str, seed: u64, doc_id: &[u8; 16], start: u64, copy: u32) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(tag.len() as u64).to_le_bytes()).update(tag.as_bytes());
    hasher
        .update(&seed.to_le_bytes())
        .update(doc_id)
        .update(&start.to_le_bytes())
        .update(&copy.to_le_bytes());
    u64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().expect("8 of 32 bytes"))
}

/// Whether a text consists of exactly `digits` hexadecimal digits, as keys and digests in names do.
pub fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// A doc_id in hexadecimal, the form in which people and other software see it.
pub fn hex(doc_id: &[u8]) -> String {
    doc_id.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Int64Array, StringArray};
    use std::sync::Arc;

    fn batch(rows: &[(&str, i64)]) -> RecordBatch {
        let texts = StringArray::from_iter_values(rows.iter().map(|r| r.0));
        let numbers = Int64Array::from_iter_values(rows.iter().map(|r| r.1));
        RecordBatch::try_from_iter([("t", Arc::new(texts) as _), ("n", Arc::new(numbers) as _)]).unwrap()
    }

    #[test]
    fn the_digest_of_rows_does_not_depend_on_their_order_or_batches() {
        let whole = RowDigest::of(&batch(&[("a", 1), ("b", 2), ("b", 2)]));
        let mut parts = RowDigest::of(&batch(&[("b", 2)]));
        parts.add(RowDigest::of(&batch(&[("b", 2), ("a", 1)])));
        assert_eq!(whole, parts);
        assert_ne!(whole, RowDigest::of(&batch(&[("a", 1), ("b", 2)])));
        assert_ne!(RowDigest::of(&batch(&[("ab", 1)])), RowDigest::of(&batch(&[("a", 1)])));
    }

    #[test]
    fn a_doc_id_tells_domain_from_text() {
        assert_ne!(doc_id("ab", "c"), doc_id("a", "bc"));
        assert_eq!(hex(&doc_id("Book", "It was")), "d79aa78c4423ec19787a5a931af13c1c");
    }
}

//! safetensors files over object storage: read by ranges, written as a stream, so that no file is whole in memory.

use std::collections::BTreeMap;
use std::ops::Range;

use half::{bf16, f16};
use object_store::ObjectStoreExt;
use object_store::buffered::BufWriter;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::{Error, Location, Result, Written};

/// A file's own header may be so long, as in the reference implementation.
const LONGEST_HEADER: u64 = 100_000_000;

/// Where a tensor lies in its file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Entry {
    pub dtype: String,
    pub shape: Vec<usize>,
    /// In the bytes after the header.
    data_offsets: [u64; 2],
}

/// A file's header.
pub struct Reader {
    at: Location,
    pub entries: BTreeMap<String, Entry>,
    /// Where the bytes after the header begin.
    data: u64,
}

/// How many bytes a number takes, and how it becomes an f32.
fn numbers(dtype: &str) -> Option<(usize, fn(&[u8]) -> f32)> {
    Some(match dtype {
        "F32" => (4, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        "F16" => (2, |b| f16::from_le_bytes([b[0], b[1]]).to_f32()),
        "BF16" => (2, |b| bf16::from_le_bytes([b[0], b[1]]).to_f32()),
        _ => return None,
    })
}

impl Reader {
    /// # Errors
    /// There is no such file, or its header is not that of a safetensors file of its size.
    pub async fn open(at: Location) -> Result<Self> {
        let wrong = |message: String| Error::Checkpoint { at: at.url(), message };
        let failed = |source| Error::Storage { doing: "read", path: at.url(), source };
        let size = at.store.head(&at.path).await.map_err(failed)?.size;
        if size < 8 {
            return Err(wrong(format!("{size} bytes are no safetensors file")));
        }
        let length = at.store.get_range(&at.path, 0..8).await.map_err(failed)?;
        let length = u64::from_le_bytes(length[..].try_into().expect("8 bytes were asked for"));
        if length > LONGEST_HEADER || length > size - 8 {
            return Err(wrong(format!("its header would have {length} bytes")));
        }
        let header = at.store.get_range(&at.path, 8..8 + length).await.map_err(failed)?;
        let mut header: serde_json::Map<String, Value> =
            serde_json::from_slice(&header).map_err(|e| wrong(format!("its header: {e}")))?;
        header.remove("__metadata__");
        let mut entries = BTreeMap::new();
        for (name, value) in header {
            let entry: Entry =
                serde_json::from_value(value).map_err(|e| wrong(format!("{name} in its header: {e}")))?;
            let [start, stop] = entry.data_offsets;
            let bytes_of =
                |width| entry.shape.iter().try_fold(width, |product: usize, n| product.checked_mul(*n));
            // of other types only the place is known
            let lies = numbers(&entry.dtype)
                .is_some_and(|(width, _)| bytes_of(width).map(|b| b as u64) != stop.checked_sub(start));
            if stop < start || stop > size - 8 - length || lies {
                return Err(wrong(format!("{name} does not lie in the file as its header says")));
            }
            entries.insert(name, entry);
        }
        Ok(Self { at, entries, data: 8 + length })
    }

    /// Some of a tensor's numbers, counted row by row, as f32.
    pub async fn read(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>> {
        let wrong = |message: String| Error::Checkpoint { at: self.at.url(), message };
        let entry = self.entries.get(name).ok_or_else(|| wrong(format!("missing {name}")))?;
        let (width, number) = numbers(&entry.dtype)
            .ok_or_else(|| wrong(format!("{name} is of type {}; F32, F16 and BF16 are read", entry.dtype)))?;
        if range.is_empty() {
            return Ok(vec![]);
        }
        let length: usize = entry.shape.iter().product();
        if range.end > length {
            return Err(wrong(format!("{name} has {length} numbers, and not {}", range.end)));
        }
        let from = self.data + entry.data_offsets[0];
        let bytes = from + (range.start * width) as u64..from + (range.end * width) as u64;
        let read = self.at.store.get_range(&self.at.path, bytes).await;
        let path = || self.at.url();
        let read = read.map_err(|source| Error::Storage { doing: "read", path: path(), source })?;
        Ok(read.chunks_exact(width).map(number).collect())
    }
}

/// What numbers are written as.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    F32,
    BF16,
}

/// A file that is being written: its tensors come in the order in which they were announced.
pub struct Writer {
    at: Location,
    kind: Kind,
    writer: BufWriter,
    hash: blake3::Hasher,
    size: u64,
}

impl Writer {
    /// `tensors` are names and shapes.
    pub async fn create(at: Location, kind: Kind, tensors: &[(String, Vec<usize>)]) -> Result<Self> {
        let (dtype, width) = match kind {
            Kind::F32 => ("F32", 4),
            Kind::BF16 => ("BF16", 2),
        };
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), json!({ "format": "pt" }));
        let mut from = 0;
        for (name, shape) in tensors {
            let to = from + (shape.iter().product::<usize>() * width) as u64;
            header
                .insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [from, to] }));
            from = to;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        // numbers begin at a multiple of 8
        header.resize(header.len().next_multiple_of(8), b' ');
        let writer = BufWriter::new(at.store.clone(), at.path.clone());
        let mut new = Self { at, kind, writer, hash: blake3::Hasher::new(), size: 0 };
        new.put(&(header.len() as u64).to_le_bytes()).await?;
        new.put(&header).await?;
        Ok(new)
    }

    async fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        self.writer.write_all(bytes).await.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: std::io::Error) -> Error {
        let source = object_store::Error::Generic { store: "checkpoint", source: Box::new(source) };
        Error::Storage { doing: "write", path: self.at.url(), source }
    }

    /// The next numbers.
    pub async fn write(&mut self, numbers: &[f32]) -> Result<()> {
        for numbers in numbers.chunks(1 << 20) {
            let bytes: Vec<u8> = match self.kind {
                Kind::F32 => numbers.iter().flat_map(|n| n.to_le_bytes()).collect(),
                Kind::BF16 => numbers.iter().flat_map(|n| bf16::from_f32(*n).to_le_bytes()).collect(),
            };
            self.put(&bytes).await?;
        }
        Ok(())
    }

    pub async fn finish(mut self) -> Result<Written> {
        let shut = self.writer.shutdown().await;
        shut.map_err(|source| self.failed(source))?;
        let name = self.at.path.filename().unwrap_or_default().to_owned();
        Ok(Written { name, bytes: self.size, blake3: *self.hash.finalize().as_bytes() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::tests::folder;

    #[tokio::test]
    async fn what_is_written_is_read_back_and_the_reference_reads_it_too() {
        let at = folder(&[]).await.join("x.safetensors");
        let tensors = [("b".to_owned(), vec![2, 3]), ("a".to_owned(), vec![4])];
        let mut writer = Writer::create(at.clone(), Kind::F32, &tensors).await.unwrap();
        writer.write(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).await.unwrap();
        writer.write(&[7.0, 8.0, 9.0, 0.1]).await.unwrap();
        let written = writer.finish().await.unwrap();
        let bytes = at.get().await.unwrap().unwrap();
        assert_eq!((written.bytes, written.blake3), (bytes.len() as u64, *blake3::hash(&bytes).as_bytes()));
        let reader = Reader::open(at).await.unwrap();
        assert_eq!(reader.read("b", 1..5).await.unwrap(), [2.0, 3.0, 4.0, 5.0]);
        assert_eq!(reader.read("a", 3..4).await.unwrap(), [0.1]);
        let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(reference.tensor("b").unwrap().shape(), [2, 3]);
        assert_eq!(reference.tensor("a").unwrap().data()[12..], 0.1f32.to_le_bytes());
    }

    #[tokio::test]
    async fn a_header_that_lies_is_an_error_and_no_allocation() {
        let file = |header: &str, data: usize| {
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.resize(bytes.len() + data, 0);
            bytes
        };
        let entry = |shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        for (bytes, message) in [
            (vec![1, 2, 3], "3 bytes are no safetensors file"),
            (u64::MAX.to_le_bytes().to_vec(), "its header would have"),
            (file("[]", 0), "its header"),
            (file(&entry("[2]", "[0,8]"), 4), "a does not lie in the file"),
            (file(&entry("[3]", "[0,8]"), 8), "a does not lie in the file"),
            (file(&entry("[2]", "[8,0]"), 8), "a does not lie in the file"),
            (file(&entry("[4294967296,4294967296,4]", "[0,8]"), 8), "a does not lie in the file"),
        ] {
            let folder = folder(&[("x.safetensors", bytes)]).await;
            let error = Reader::open(folder.join("x.safetensors")).await.err().map(|e| e.to_string());
            assert!(error.as_ref().is_some_and(|e| e.contains(message)), "{message}: {error:?}");
        }
    }
}

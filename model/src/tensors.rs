//! safetensors files in object storage, read by ranges and written as a stream, so that no file is whole in memory.

use std::ops::Range;

use half::{bf16, f16};
use object_store::ObjectStoreExt;
use object_store::buffered::BufWriter;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use tokio::io::AsyncWriteExt;

use crate::conf::Precision;
use crate::{Error, Location, Result, Written};

/// The longest header that is read, as in the reference implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A file whose header was read.
pub struct Reader {
    at: Location,
    pub metadata: Metadata,
    /// Where the data begins, after the header.
    data_start: u64,
}

/// Converts one number of a type to f32; `None` for types that are not read.
fn to_f32(dtype: Dtype) -> Option<fn(&[u8]) -> f32> {
    Some(match dtype {
        Dtype::F32 => |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        Dtype::F16 => |b| f16::from_le_bytes([b[0], b[1]]).to_f32(),
        Dtype::BF16 => |b| bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        _ => return None,
    })
}

impl Reader {
    /// # Errors
    /// There is no such file, or its header does not describe a safetensors file of its size.
    pub async fn open(at: Location) -> Result<Self> {
        let wrong = |message: String| Error::Checkpoint { at: at.url(), message };
        let failed = |source| Error::Storage { doing: "read", path: at.url(), source };
        let size = at.store.head(&at.path).await.map_err(failed)?.size;
        if size < 8 {
            return Err(wrong(format!("{size} bytes are no safetensors file")));
        }
        let length = at.store.get_range(&at.path, 0..8).await.map_err(failed)?;
        let length = u64::from_le_bytes(length[..].try_into().expect("the range has 8 bytes"));
        // The length is checked before anything of that length is read.
        if length > MAX_HEADER_BYTES || length > size - 8 {
            return Err(wrong(format!("its header claims {length} bytes")));
        }
        let header = at.store.get_range(&at.path, 8..8 + length).await.map_err(failed)?;
        // Metadata checks that the tensors fill the data without gaps, each as its type and shape say.
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| wrong(format!("its header: {e}")))?;
        let (described, data) = (metadata.data_len() as u64, size - 8 - length);
        if described != data {
            return Err(wrong(format!(
                "its header describes {described} bytes of data, the file has {data}"
            )));
        }
        Ok(Self { at, metadata, data_start: 8 + length })
    }

    /// Reads a range of a tensor's numbers, in row-major order, as f32.
    pub async fn read(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>> {
        let wrong = |message: String| Error::Checkpoint { at: self.at.url(), message };
        let info = self.metadata.info(name).ok_or_else(|| wrong(format!("missing {name}")))?;
        let to_f32 = to_f32(info.dtype)
            .ok_or_else(|| wrong(format!("{name} is of type {}; F32, F16 and BF16 are read", info.dtype)))?;
        if range.is_empty() {
            return Ok(vec![]);
        }
        let length: usize = info.shape.iter().product();
        if range.end > length {
            return Err(wrong(format!("{name} has {length} numbers, and not {}", range.end)));
        }
        let width = info.dtype.bitsize() / 8;
        let start = self.data_start + info.data_offsets.0 as u64;
        let bytes = start + (range.start * width) as u64..start + (range.end * width) as u64;
        let failed = |source| Error::Storage { doing: "read", path: self.at.url(), source };
        let read = self.at.store.get_range(&self.at.path, bytes).await.map_err(failed)?;
        Ok(read.chunks_exact(width).map(to_f32).collect())
    }
}

/// A file that is being written. Its tensors are written in the order of its header.
pub struct Writer {
    at: Location,
    precision: Precision,
    writer: BufWriter,
    hash: blake3::Hasher,
    size: u64,
}

impl Writer {
    /// Writes the header. `tensors` are names and shapes.
    pub async fn create(
        at: Location,
        precision: Precision,
        tensors: &[(String, Vec<usize>)],
    ) -> Result<Self> {
        let dtype = match precision {
            Precision::F32 => Dtype::F32,
            Precision::Bf16 => Dtype::BF16,
        };
        let mut end = 0;
        let info = |(name, shape): &(String, Vec<usize>)| {
            let start = end;
            end += shape.iter().product::<usize>() * precision.bytes();
            (name.clone(), TensorInfo { dtype, shape: shape.clone(), data_offsets: (start, end) })
        };
        let infos = tensors.iter().map(info).collect();
        let format = [("format".to_owned(), "pt".to_owned())].into();
        let metadata = Metadata::new(Some(format), infos).expect("the tensors follow one another");
        let mut header = serde_json::to_vec(&metadata).expect("a header has only text keys");
        // The data begins at a multiple of 8 bytes.
        header.resize(header.len().next_multiple_of(8), b' ');
        let writer = BufWriter::new(at.store.clone(), at.path.clone());
        let mut new = Self { at, precision, writer, hash: blake3::Hasher::new(), size: 0 };
        new.write_bytes(&(header.len() as u64).to_le_bytes()).await?;
        new.write_bytes(&header).await?;
        Ok(new)
    }

    async fn write_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        self.writer.write_all(bytes).await.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: std::io::Error) -> Error {
        let source = object_store::Error::Generic { store: "checkpoint", source: Box::new(source) };
        Error::Storage { doing: "write", path: self.at.url(), source }
    }

    /// Writes the next numbers.
    pub async fn write(&mut self, numbers: &[f32]) -> Result<()> {
        for numbers in numbers.chunks(1 << 20) {
            let bytes: Vec<u8> = match self.precision {
                Precision::F32 => numbers.iter().flat_map(|n| n.to_le_bytes()).collect(),
                Precision::Bf16 => numbers.iter().flat_map(|n| bf16::from_f32(*n).to_le_bytes()).collect(),
            };
            self.write_bytes(&bytes).await?;
        }
        Ok(())
    }

    /// Completes the file.
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
        let mut writer = Writer::create(at.clone(), Precision::F32, &tensors).await.unwrap();
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
            (u64::MAX.to_le_bytes().to_vec(), "its header claims"),
            (file("[]", 0), "its header"),
            (file(&entry("[2]", "[0,8]"), 4), "its header describes 8 bytes of data, the file has 4"),
            (file(&entry("[2]", "[0,8]"), 12), "its header describes 8 bytes of data, the file has 12"),
            (file(&entry("[3]", "[0,8]"), 8), "its header: invalid shape"),
            (file(&entry("[2]", "[8,0]"), 8), "its header: invalid offset for tensor `a`"),
            (file(&entry("[4294967296,4294967296,4]", "[0,8]"), 8), "its header: overflow"),
            (file(&entry("[0]", "[18446744073709551615,18446744073709551615]"), 0), "invalid offset"),
        ] {
            let folder = folder(&[("x.safetensors", bytes)]).await;
            let error = Reader::open(folder.join("x.safetensors")).await.err().map(|e| e.to_string());
            assert!(error.as_ref().is_some_and(|e| e.contains(message)), "{message}: {error:?}");
        }
    }
}

//! The packed dataset as a trainer reads it: sequences in order, one file in memory at a time, round and round.

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Int32Type};
use futures::TryStreamExt;
use object_store::ObjectStore;
use object_store::path::Path;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use crate::backprop::NO_TARGET;
use crate::{Error, Location, Result};

/// A training example.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    pub ids: Vec<i32>,
    /// The id after each; [`NO_TARGET`] where there is none, or where it is padding.
    pub targets: Vec<i32>,
}

/// Sequences of a folder's `*.parquet`, in the order of their names.
pub struct Dataset {
    store: std::sync::Arc<dyn ObjectStore>,
    files: Vec<Path>,
    vocab_size: usize,
    next_file: usize,
    reader: Option<ParquetRecordBatchReader>,
    length: Option<usize>,
}

impl Dataset {
    /// `vocab_size` is the model's: no id may reach it.
    pub async fn open(folder: &Location, vocab_size: usize) -> Result<Self> {
        let listed: Vec<_> = folder
            .store
            .list(Some(&folder.path))
            .try_collect()
            .await
            .map_err(|source| Error::Storage { doing: "list", path: folder.path.to_string(), source })?;
        let mut files: Vec<Path> = listed.into_iter().map(|meta| meta.location).collect();
        files.retain(|path| {
            path.filename().is_some_and(|name| name.starts_with("train-") && name.ends_with(".parquet"))
        });
        files.sort();
        if files.is_empty() {
            let message = "there is no train-*.parquet".into();
            return Err(Error::Dataset { file: folder.path.to_string(), message });
        }
        Ok(Self { store: folder.store.clone(), files, vocab_size, next_file: 0, reader: None, length: None })
    }

    /// The next sequence; after the last one, the first.
    pub async fn next(&mut self) -> Result<Sequence> {
        // more empty files than files are no dataset
        for _ in 0..=self.files.len() {
            if let Some(reader) = &mut self.reader {
                let file = self.files[self.next_file].to_string();
                let wrong = |message: String| Error::Dataset { file: file.clone(), message };
                if let Some(batch) = reader.next() {
                    let batch = batch.map_err(|e| wrong(e.to_string()))?;
                    let sequence = sequence(&batch, self.vocab_size).map_err(wrong)?;
                    if self
                        .length
                        .replace(sequence.ids.len())
                        .is_some_and(|length| length != sequence.ids.len())
                    {
                        return Err(wrong("its sequences have different lengths".into()));
                    }
                    return Ok(sequence);
                }
                self.reader = None;
                self.next_file = (self.next_file + 1) % self.files.len();
            }
            let at = Location { store: self.store.clone(), path: self.files[self.next_file].clone() };
            let wrong = |message: String| Error::Dataset { file: at.path.to_string(), message };
            let bytes = at.get().await?.ok_or_else(|| wrong("it is gone".into()))?;
            let builder =
                ParquetRecordBatchReaderBuilder::try_new(bytes).map_err(|e| wrong(e.to_string()))?;
            check(builder.schema()).map_err(wrong)?;
            self.reader = Some(builder.with_batch_size(1).build().map_err(|e| wrong(e.to_string()))?);
        }
        Err(Error::Dataset { file: self.files[0].to_string(), message: "no file has a sequence".into() })
    }
}

/// The layout of the authors' published dataset, with doc_id.
fn check(schema: &arrow::datatypes::Schema) -> Result<(), String> {
    let list_of = |name: &str| match schema.field_with_name(name).map(|f| f.data_type()) {
        Ok(DataType::List(item)) => Ok(item.data_type().clone()),
        Ok(other) => Err(format!("column `{name}` is {other}, a list is wanted")),
        Err(_) => {
            Err(format!("there is no column `{name}`; a packed dataset has input_ids, labels and source"))
        }
    };
    if list_of("input_ids")? != DataType::Int32 {
        return Err("column `input_ids` has to be a list of int32".into());
    }
    match schema.field_with_name("labels").map(|f| f.data_type()) {
        Ok(DataType::Int32) => {}
        _ => return Err("column `labels` has to be int32".into()),
    }
    let DataType::Struct(fields) = list_of("source")? else {
        return Err("column `source` has to be a list of structs".into());
    };
    for (name, kind) in [("doc_id", DataType::Utf8), ("start", DataType::Int32), ("end", DataType::Int32)] {
        if fields.iter().find(|f| f.name() == name).map(|f| f.data_type()) != Some(&kind) {
            return Err(format!("column `source` has to have `{name}` of type {kind}"));
        }
    }
    Ok(())
}

/// The one row of a batch.
fn sequence(batch: &RecordBatch, vocab_size: usize) -> Result<Sequence, String> {
    let column =
        |name: &str| batch.column_by_name(name).ok_or_else(|| format!("there is no column `{name}`"));
    let lists = column("input_ids")?.as_list::<i32>();
    let ids = lists.value(0).as_primitive::<Int32Type>().values().to_vec();
    if let Some(id) = ids.iter().find(|id| **id < 0 || **id as usize >= vocab_size) {
        return Err(format!("id {id} is not in the model's vocabulary of {vocab_size}"));
    }
    let mut targets: Vec<i32> = ids.iter().skip(1).copied().collect();
    targets.push(column("labels")?.as_primitive::<Int32Type>().value(0));
    if targets.last().is_some_and(|id| *id != NO_TARGET && (*id < 0 || *id as usize >= vocab_size)) {
        return Err(format!(
            "label {} is not in the model's vocabulary of {vocab_size}",
            targets[targets.len() - 1]
        ));
    }
    let segments = column("source")?.as_list::<i32>().value(0);
    let segments = segments.as_struct();
    let field = |name: &str| segments.column_by_name(name).ok_or_else(|| format!("`source` has no `{name}`"));
    let (doc_ids, starts, ends) = (field("doc_id")?.as_string::<i32>(), field("start")?, field("end")?);
    let position =
        |column: &dyn Array, row: usize| column.as_primitive::<Int32Type>().value(row).max(0) as usize;
    for row in 0..segments.len() {
        if doc_ids.value(row).is_empty() {
            // nothing is predicted from padding, and padding isn't predicted
            let (start, end) = (position(starts.as_ref(), row), position(ends.as_ref(), row).min(ids.len()));
            targets[start.saturating_sub(1)..end].fill(NO_TARGET);
        }
    }
    Ok(Sequence { ids, targets })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use arrow::array::{Int32Array, Int32Builder, ListBuilder, StringBuilder, StructBuilder};
    use arrow::datatypes::{Field, Fields};
    use std::sync::Arc;

    /// A packed file: ids, label, and segments as (doc_id, start, end).
    pub(crate) fn packed(rows: &[(Vec<i32>, i32, Vec<(&str, i32, i32)>)]) -> Vec<u8> {
        let mut ids = ListBuilder::new(Int32Builder::new());
        let fields: Fields = vec![
            Field::new("source", DataType::Utf8, true),
            Field::new("doc_id", DataType::Utf8, true),
            Field::new("start", DataType::Int32, true),
            Field::new("end", DataType::Int32, true),
        ]
        .into();
        let mut source = ListBuilder::new(StructBuilder::from_fields(fields, 0));
        for (row, _, segments) in rows {
            ids.values().append_slice(row);
            ids.append(true);
            for (doc_id, start, end) in segments {
                let s = source.values();
                s.field_builder::<StringBuilder>(0).unwrap().append_value("d");
                s.field_builder::<StringBuilder>(1).unwrap().append_value(doc_id);
                s.field_builder::<Int32Builder>(2).unwrap().append_value(*start);
                s.field_builder::<Int32Builder>(3).unwrap().append_value(*end);
                s.append(true);
            }
            source.append(true);
        }
        let labels = Int32Array::from_iter_values(rows.iter().map(|row| row.1));
        let batch = RecordBatch::try_from_iter([
            ("input_ids", Arc::new(ids.finish()) as _),
            ("labels", Arc::new(labels) as _),
            ("source", Arc::new(source.finish()) as _),
        ])
        .unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.into_inner().unwrap()
    }

    pub(crate) async fn folder(files: &[(&str, Vec<u8>)]) -> Location {
        let folder =
            Location { store: Arc::new(object_store::memory::InMemory::new()), path: Path::from("data") };
        for (name, bytes) in files {
            folder.join(name).put(bytes.clone()).await.unwrap();
        }
        folder
    }

    #[tokio::test]
    async fn sequences_come_in_the_order_of_the_files_and_then_again() {
        let one = |id: i32| packed(&[(vec![id, 2], 3, vec![("a", 0, 2)])]);
        let folder = folder(&[
            ("train-00001-of-00002.parquet", one(7)),
            ("train-00000-of-00002.parquet", one(5)),
            ("other.txt", vec![1]),
        ])
        .await;
        let mut dataset = Dataset::open(&folder, 10).await.unwrap();
        for first in [5, 7, 5, 7] {
            assert_eq!(dataset.next().await.unwrap(), Sequence { ids: vec![first, 2], targets: vec![2, 3] });
        }
    }

    #[tokio::test]
    async fn padding_is_neither_predicted_nor_predicted_from() {
        let bytes = packed(&[(vec![1, 2, 3, 0, 0], -100, vec![("a", 0, 3), ("", 3, 5)])]);
        let folder = folder(&[("train-00000-of-00001.parquet", bytes)]).await;
        let sequence = Dataset::open(&folder, 10).await.unwrap().next().await.unwrap();
        assert_eq!(sequence.targets, [2, 3, NO_TARGET, NO_TARGET, NO_TARGET]);
    }

    #[tokio::test]
    async fn a_file_that_is_no_packed_dataset_is_named_with_what_is_wrong() {
        let good = packed(&[(vec![1, 12], 3, vec![("a", 0, 2)])]);
        let batch = RecordBatch::try_from_iter([("x", Arc::new(Int32Array::from(vec![1])) as _)]).unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        for (bytes, message) in [
            (good, "id 12 is not in the model's vocabulary of 10"),
            (writer.into_inner().unwrap(), "there is no column `input_ids`"),
            (b"no parquet".to_vec(), "train-00000-of-00001.parquet"),
        ] {
            let folder = folder(&[("train-00000-of-00001.parquet", bytes)]).await;
            let error = Dataset::open(&folder, 10).await.unwrap().next().await.unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        let error = Dataset::open(&folder(&[]).await, 10).await.err().unwrap().to_string();
        assert!(error.contains("there is no train-*.parquet"), "{error}");
    }
}

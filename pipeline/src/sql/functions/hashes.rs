//! Hashes that stages sort documents by. The order looks random, but depends only on the hashes' arguments.
//!
//! `heldout_hash(seed, doc_id)` and `place_hash(seed, doc_id, start, copy)` return non-negative 63-bit
//! integers.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Int64Type};
use datafusion::common::Result;
use datafusion::logical_expr::{ColumnarValue, Volatility, create_udf};
use datafusion::prelude::SessionContext;

use crate::hash::unit_hash;

/// Registers both functions in a session.
pub fn register(session: &SessionContext) {
    let id = DataType::FixedSizeBinary(16);
    for (name, tag, types) in [
        ("heldout_hash", "heldout", vec![DataType::Int64, id.clone()]),
        ("place_hash", "place", vec![DataType::Int64, id, DataType::Int64, DataType::Int32]),
    ] {
        let function = move |arguments: &[ColumnarValue]| places(tag, arguments);
        let udf = create_udf(name, types, DataType::Int64, Volatility::Immutable, Arc::new(function));
        session.register_udf(udf);
    }
}

fn places(tag: &str, arguments: &[ColumnarValue]) -> Result<ColumnarValue> {
    let arrays = ColumnarValue::values_to_arrays(arguments)?;
    let number = |i: usize| -> Result<Int64Array> {
        let array: ArrayRef = match arrays.get(i) {
            Some(array) => cast(array, &DataType::Int64)?,
            None => Arc::new(Int64Array::from(vec![0; arrays[1].len()])),
        };
        Ok(array.as_primitive::<Int64Type>().clone())
    };
    let (seeds, starts, copies) = (number(0)?, number(2)?, number(3)?);
    let ids = arrays[1].as_fixed_size_binary();
    let hashes = (0..ids.len()).map(|row| {
        let id: &[u8; 16] = ids.value(row).try_into().expect("16 bytes");
        let hash =
            unit_hash(tag, seeds.value(row) as u64, id, starts.value(row) as u64, copies.value(row) as u32);
        (hash >> 1) as i64
    });
    Ok(ColumnarValue::Array(Arc::new(Int64Array::from_iter_values(hashes))))
}

//! Functions of every session, which give the same results on every machine: pure-Rust `libm` replaces the
//! functions that DataFusion takes from the platform's math library, under the same names, and arithmetic is
//! [`exact`].

pub mod exact;
mod exact_sum;
pub mod hashes;

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, Int64Array};
use arrow::compute::{binary, unary};
use arrow::datatypes::DataType::{self, Binary, FixedSizeBinary, Float64, Int64};
use arrow::datatypes::{Float64Type, Int64Type};
use datafusion::common::{ScalarValue, exec_err};
use datafusion::error::Result;
use datafusion::functions_nested::range::{gen_series_udf, range_udf};
use datafusion::logical_expr::expr_fn::SimpleScalarUDF;
use datafusion::logical_expr::{
    ColumnarValue, ScalarFunctionArgs, ScalarFunctionImplementation, ScalarUDF, ScalarUDFImpl, Signature,
    TypeSignature, Volatility,
};
use datafusion::prelude::SessionContext;

use crate::hash::unit_hash;
use crate::tables;

/// The functions that are ours, as they are called, and what they give.
pub const OURS: [(&str, &str); 8] = [
    (
        "exact_sum(x)",
        "the sum, the same in any order: of integers and decimals a decimal(38, 0) or an error beyond, of doubles the double nearest to the true sum; also over a window",
    ),
    ("exp(x)", "e to the power of x, the same on every machine"),
    ("length_bucket(tokens)", "the number, from 0, of the paper's bucket of lengths (Figure 2)"),
    ("ln(x)", "the natural logarithm, the same on every machine"),
    ("log2(x)", "the logarithm to base 2, the same on every machine"),
    ("log10(x)", "the logarithm to base 10, the same on every machine"),
    ("power(x, y)", "x to the power of y, the same on every machine; also `pow`"),
    ("unit_hash(seed, doc_id, start)", "a number in [0, 1) that depends on nothing but its arguments"),
];

/// Registers the functions in a session; call it once per session. They replace DataFusion's functions of the
/// same names.
pub fn register(session: &SessionContext) {
    exact::install(session);
    let unary_functions: [(&str, fn(f64) -> f64); 5] = [
        ("exp", libm::exp),
        ("ln", libm::log),
        ("log2", libm::log2),
        ("log10", libm::log10),
        // the library's ends at a number below zero; here, as elsewhere, what is no number is null
        ("sqrt", f64::sqrt),
    ];
    for (name, function) in unary_functions {
        let on_arrays =
            on_arrays(move |args| Ok(Arc::new(unary::<_, _, Float64Type>(floats(&args[0]), function))));
        let signature = Signature::exact(vec![Float64], Volatility::Immutable);
        session.register_udf(SimpleScalarUDF::new_with_signature(name, signature, Float64, on_arrays).into());
    }
    session.register_udf(power());
    session.register_udf(sql_unit_hash());
    session.register_udf(length_bucket());
    session.register_udaf(exact_sum::exact_sum());
    for inner in [range_udf(), gen_series_udf()] {
        session.register_udf(ScalarUDF::new_from_impl(Counted { inner }));
    }
}

/// The most numbers that one call of `range` may produce for a batch of rows: 1 GiB of them.
const MAX_NUMBERS: u128 = 1 << 27;

/// `range` or `generate_series` with an upper limit, because the list holds all numbers in memory at once.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Counted {
    inner: Arc<ScalarUDF>,
}

impl ScalarUDFImpl for Counted {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn signature(&self) -> &Signature {
        self.inner.signature()
    }

    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        self.inner.return_type(arg_types)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let arrays = ColumnarValue::values_to_arrays(&args.args)?;
        let numbers: Vec<&Int64Array> = arrays.iter().filter_map(|array| array.as_primitive_opt()).collect();
        let rows = numbers.first().filter(|_| numbers.len() == arrays.len()).map_or(0, |array| array.len());
        let count = |row: usize| {
            let value = |i: usize| numbers.get(i).map(|array| array.value(row));
            let (start, stop) = if numbers.len() == 1 { (Some(0), value(0)) } else { (value(0), value(1)) };
            let step = value(2).unwrap_or(1);
            let length = stop.unwrap_or(0).abs_diff(start.unwrap_or(0)).checked_div(step.unsigned_abs());
            let forth = (stop >= start) == (step >= 0);
            if forth { length.unwrap_or(0) as u128 + 1 } else { 0 }
        };
        let whole = |row: &usize| numbers.iter().all(|array| array.is_valid(*row));
        if (0..rows).filter(whole).map(count).sum::<u128>() > MAX_NUMBERS {
            return Err(exact::NoNumber::beyond(
                format!("`{}` makes more than {MAX_NUMBERS} numbers at a time", self.name()),
                "take a larger step, as in range(0, tokens, $max_span)",
            ));
        }
        self.inner.invoke_with_args(args)
    }
}

/// `power(x, y)`, also `pow`.
fn power() -> ScalarUDF {
    let on_arrays = on_arrays(|args| {
        let values: Float64Array = binary(floats(&args[0]), floats(&args[1]), libm::pow)?;
        Ok(Arc::new(values))
    });
    let signature = Signature::exact(vec![Float64, Float64], Volatility::Immutable);
    let power: ScalarUDF = SimpleScalarUDF::new_with_signature("power", signature, Float64, on_arrays).into();
    power.with_aliases(["pow"])
}

/// `length_bucket(tokens)`: the number, from 0, of the paper's bucket (Figure 2) that a document of so many tokens is in.
fn length_bucket() -> ScalarUDF {
    let on_arrays = on_arrays(|args| {
        let tokens = args[0].as_primitive::<Int64Type>();
        let bucket = |tokens| tables::length_bucket(tokens) as i64;
        Ok(Arc::new(unary::<_, _, Int64Type>(tokens, bucket)))
    });
    let signature = Signature::exact(vec![Int64], Volatility::Immutable);
    SimpleScalarUDF::new_with_signature("length_bucket", signature, Int64, on_arrays).into()
}

/// `unit_hash(seed, doc_id, start)`: a pseudo-random number in [0, 1) that depends only on its arguments.
fn sql_unit_hash() -> ScalarUDF {
    let on_arrays = on_arrays(|args| {
        let (seeds, starts) = (args[0].as_primitive::<Int64Type>(), args[2].as_primitive::<Int64Type>());
        let id = |row: usize| match args[1].data_type() {
            FixedSizeBinary(_) => args[1].as_fixed_size_binary().value(row),
            _ => args[1].as_binary::<i32>().value(row),
        };
        let hashes = (0..args[1].len()).map(|row| {
            if args.iter().any(|arg| arg.is_null(row)) {
                return Ok(None);
            }
            let Ok(doc_id) = id(row).try_into() else {
                return exec_err!("unit_hash: a doc_id has 16 bytes, not {}", id(row).len());
            };
            let hash = unit_hash("recipe", seeds.value(row) as u64, doc_id, starts.value(row) as u64, 0);
            Ok(Some((hash >> 11) as f64 / (1u64 << 53) as f64))
        });
        Ok(Arc::new(hashes.collect::<Result<Float64Array>>()?))
    });
    let id_types = [FixedSizeBinary(16), Binary];
    let signatures = id_types.map(|id| TypeSignature::Exact(vec![Int64, id, Int64])).to_vec();
    let signature = Signature::one_of(signatures, Volatility::Immutable);
    SimpleScalarUDF::new_with_signature("unit_hash", signature, Float64, on_arrays).into()
}

/// Adapts a function of arrays of equal length to DataFusion. If all arguments are constants, the result is
/// one, too.
fn on_arrays(
    function: impl Fn(&[ArrayRef]) -> Result<ArrayRef> + Send + Sync + 'static,
) -> ScalarFunctionImplementation {
    Arc::new(move |args| {
        let constant = args.iter().all(|arg| matches!(arg, ColumnarValue::Scalar(_)));
        let result = function(&ColumnarValue::values_to_arrays(args)?)?;
        Ok(match constant {
            true => ColumnarValue::Scalar(ScalarValue::try_from_array(&result, 0)?),
            false => ColumnarValue::Array(result),
        })
    })
}

fn floats(array: &ArrayRef) -> &Float64Array {
    array.as_primitive()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The one number of a query.
    async fn number(sql: &str) -> Result<Option<f64>> {
        let session = SessionContext::new();
        register(&session);
        let batches = session.sql(sql).await?.collect().await?;
        let column = batches[0].column(0).as_primitive::<Float64Type>();
        Ok((!column.is_null(0)).then(|| column.value(0)))
    }

    #[tokio::test]
    async fn math_functions_are_those_of_pure_rust_libm() {
        for (call, expected) in [
            ("exp(x)", libm::exp(3.7)),
            ("ln(x)", libm::log(3.7)),
            ("log2(x)", libm::log2(3.7)),
            ("log10(x)", libm::log10(3.7)),
            ("power(x, 0.3)", libm::pow(3.7, 0.3)),
            ("pow(x, 2)", libm::pow(3.7, 2.0)),
        ] {
            let found = number(&format!("select {call} from (values (3.7)) as t(x)")).await.unwrap();
            assert_eq!(found.map(f64::to_bits), Some(expected.to_bits()), "{call}");
        }
        assert_eq!(number("select power(null, 2)").await.unwrap(), None);
        assert_eq!(number("select power(2, 10)").await.unwrap(), Some(1024.0));
        assert_eq!(number("select sqrt(x) from (values (-1.0)) as t(x)").await.unwrap(), None);
        assert_eq!(number("select sqrt(9)").await.unwrap(), Some(3.0));
    }

    #[tokio::test]
    async fn unit_hash_is_a_number_below_one_and_stays_what_it_is() {
        let hash = unit_hash("recipe", 7, &[3; 16], 5, 0);
        let expected = (hash >> 11) as f64 / (1u64 << 53) as f64;
        let id = format!("x'{}'", "03".repeat(16));
        assert_eq!(number(&format!("select unit_hash(7, {id}, 5)")).await.unwrap(), Some(expected));
        assert!((0.0..1.0).contains(&expected));
        assert_eq!(number("select unit_hash(7, null, 5)").await.unwrap(), None);
        assert!(
            number("select unit_hash(7, x'0303', 5)").await.unwrap_err().to_string().contains("16 bytes")
        );
        assert_ne!(hash, unit_hash("draw", 7, &[3; 16], 5, 0));
    }
}

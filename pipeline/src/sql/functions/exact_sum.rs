//! `exact_sum(x)`: a sum that does not depend on the order of its rows and does not overflow unseen.
//!
//! Integers and decimals sum to a decimal of 38 digits, or to an error beyond. Doubles sum to the double nearest to the
//! true sum: all of them are added as integers in units of 2⁻¹⁰⁷⁴, the smallest double, and rounded once, at the end.
//! What adding does, subtracting undoes, so that it serves as a window function, too.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BinaryArray};
use arrow::datatypes::{DataType, Decimal128Type, Field, FieldRef, Float64Type};
use datafusion::common::{ScalarValue, not_impl_err, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::utils::format_state_name;
use datafusion::logical_expr::{Accumulator, AggregateUDF, AggregateUDFImpl, Signature, Volatility};

use super::exact::NoNumber;

/// Digits of the largest decimal.
const DIGITS: u8 = 38;

/// The function.
pub fn exact_sum() -> AggregateUDF {
    AggregateUDF::new_from_impl(ExactSum { signature: Signature::user_defined(Volatility::Immutable) })
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct ExactSum {
    signature: Signature,
}

impl AggregateUDFImpl for ExactSum {
    fn name(&self) -> &str {
        "exact_sum"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> Result<Vec<DataType>> {
        let [of] = types else { return plan_err!("exact_sum takes one argument, not {}", types.len()) };
        Ok(vec![match of {
            DataType::Float16 | DataType::Float32 | DataType::Float64 => DataType::Float64,
            DataType::Decimal32(_, scale)
            | DataType::Decimal64(_, scale)
            | DataType::Decimal128(_, scale) => DataType::Decimal128(DIGITS, *scale),
            whole if whole.is_integer() || whole.is_null() => DataType::Decimal128(DIGITS, 0),
            other => return plan_err!("exact_sum adds up integers, decimals and doubles, not {other}"),
        }])
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        Ok(types[0].clone())
    }

    fn accumulator(&self, args: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        if args.is_distinct {
            return not_impl_err!("exact_sum(distinct …): select the distinct values in a step before");
        }
        let of = args.return_field.data_type().clone();
        Ok(Box::new(Sum { of, count: 0, specials: Specials::default(), total: Total::default() }))
    }

    fn state_fields(&self, args: StateFieldsArgs) -> Result<Vec<FieldRef>> {
        let name = format_state_name(args.name, "sum");
        Ok(vec![Arc::new(Field::new(name, DataType::Binary, false))])
    }
}

/// How often values came that are no number to add.
#[derive(Clone, Copy, Debug, Default)]
struct Specials {
    nan: i64,
    infinity: i64,
    minus_infinity: i64,
}

/// A sum under way.
#[derive(Debug)]
struct Sum {
    of: DataType,
    /// How many values are not null.
    count: i64,
    specials: Specials,
    total: Total,
}

impl Sum {
    fn each(&mut self, values: &ArrayRef, sign: i64) {
        self.count += sign * (values.len() - values.null_count()) as i64;
        if let Some(doubles) = values.as_primitive_opt::<Float64Type>() {
            for value in doubles.iter().flatten() {
                match value {
                    _ if value.is_nan() => self.specials.nan += sign,
                    f64::INFINITY => self.specials.infinity += sign,
                    f64::NEG_INFINITY => self.specials.minus_infinity += sign,
                    _ => self.total.add_double(value, sign),
                }
            }
        } else if let Some(decimals) = values.as_primitive_opt::<Decimal128Type>() {
            decimals.iter().flatten().for_each(|value| self.total.add_integer(value, sign));
        }
    }
}

impl Accumulator for Sum {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        self.each(&values[0], 1);
        Ok(())
    }

    fn retract_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        self.each(&values[0], -1);
        Ok(())
    }

    fn supports_retract_batch(&self) -> bool {
        true
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        if self.count == 0 {
            return ScalarValue::try_from(&self.of);
        }
        let DataType::Decimal128(_, scale) = self.of else {
            let Specials { nan, infinity, minus_infinity } = self.specials;
            return Ok(ScalarValue::Float64(Some(match () {
                () if nan > 0 || (infinity > 0 && minus_infinity > 0) => f64::NAN,
                () if infinity > 0 => f64::INFINITY,
                () if minus_infinity > 0 => f64::NEG_INFINITY,
                () => self.total.double(),
            })));
        };
        match self.total.integer().filter(|sum| sum.unsigned_abs() < 10u128.pow(u32::from(DIGITS))) {
            Some(sum) => Ok(ScalarValue::Decimal128(Some(sum), DIGITS, scale)),
            None => Err(NoNumber::beyond(
                format!("a sum is beyond the {DIGITS} digits of decimal"),
                "sum smaller numbers, or cast to double: exact_sum of doubles has no bound",
            )),
        }
    }

    fn size(&self) -> usize {
        size_of_val(self)
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        let Specials { nan, infinity, minus_infinity } = self.specials;
        let numbers = [self.count, nan, infinity, minus_infinity].into_iter().chain(self.total.carried());
        Ok(vec![ScalarValue::Binary(Some(numbers.flat_map(i64::to_le_bytes).collect()))])
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        let states: &BinaryArray = states[0].as_binary();
        for state in states.iter().flatten() {
            let mut numbers =
                state.chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().expect("8 bytes")));
            let mut next = || numbers.next().unwrap_or_default();
            self.count += next();
            self.specials.nan += next();
            self.specials.infinity += next();
            self.specials.minus_infinity += next();
            self.total.merge(numbers);
        }
        Ok(())
    }
}

/// Bits of a limb that count; the rest of an `i64` takes carries until [`Total::carry`].
const LIMB_BITS: u32 = 32;

/// Enough for 2⁶³ of the largest doubles: 2,098 bits, 63 more, and a sign.
const LIMBS: usize = 68;

/// So many additions fit between two carries.
const MAX_ADDITIONS: u32 = 1 << 30;

/// An integer of 2,176 bits, the sum of its limbs × 2³²ⁱ.
#[derive(Clone, Debug)]
struct Total {
    limbs: [i64; LIMBS],
    additions: u32,
}

impl Default for Total {
    fn default() -> Self {
        Self { limbs: [0; LIMBS], additions: 0 }
    }
}

impl Total {
    /// Adds `sign × magnitude × 2^shift`.
    fn add(&mut self, magnitude: u128, shift: u32, sign: i64) {
        if self.additions == MAX_ADDITIONS {
            self.carry();
        }
        self.additions += 1;
        let (limb, bits) = ((shift / LIMB_BITS) as usize, shift % LIMB_BITS);
        // two halves, as the magnitude moves by up to 31 bits
        for (half, first) in [(magnitude as u64, limb), ((magnitude >> 64) as u64, limb + 2)] {
            let mut rest = u128::from(half) << bits;
            for at in first..first + 3 {
                if rest == 0 {
                    break;
                }
                self.limbs[at] += sign * i64::from(rest as u32);
                rest >>= LIMB_BITS;
            }
        }
    }

    fn add_integer(&mut self, value: i128, sign: i64) {
        self.add(value.unsigned_abs(), 0, if value < 0 { -sign } else { sign });
    }

    /// Adds a finite double, in units of 2⁻¹⁰⁷⁴.
    fn add_double(&mut self, value: f64, sign: i64) {
        let bits = value.to_bits();
        let (exponent, fraction) = ((bits >> 52) as u32 & 0x7FF, bits & ((1 << 52) - 1));
        let (mantissa, shift) = match exponent {
            0 => (fraction, 0),
            _ => (fraction | 1 << 52, exponent - 1),
        };
        self.add(mantissa.into(), shift, if value < 0.0 { -sign } else { sign });
    }

    /// Leaves in each limb but the last a number of 32 bits.
    fn carry(&mut self) {
        let mut carry = 0;
        let last = LIMBS - 1;
        for limb in &mut self.limbs[..last] {
            let sum = *limb + carry;
            carry = sum >> LIMB_BITS;
            *limb = sum & i64::from(u32::MAX);
        }
        self.limbs[last] += carry;
        self.additions = 0;
    }

    /// The limbs, for another task's sum.
    fn carried(&mut self) -> [i64; LIMBS] {
        self.carry();
        self.limbs
    }

    /// Adds what [`Total::carried`] gave.
    fn merge(&mut self, limbs: impl Iterator<Item = i64>) {
        self.carry();
        for (limb, add) in self.limbs.iter_mut().zip(limbs) {
            *limb += add;
        }
        self.carry();
    }

    /// The sign, and the magnitude in limbs of 32 bits, the lowest first.
    fn magnitude(&self) -> (bool, [u32; LIMBS]) {
        let mut total = self.clone();
        total.carry();
        let negative = total.limbs[LIMBS - 1] < 0;
        if negative {
            total.limbs.iter_mut().for_each(|limb| *limb = -*limb);
            total.carry();
        }
        (negative, total.limbs.map(|limb| limb as u32))
    }

    /// As an integer, if it is one of 128 bits.
    fn integer(&self) -> Option<i128> {
        let (negative, limbs) = self.magnitude();
        if limbs[4..].iter().any(|limb| *limb != 0) {
            return None;
        }
        let magnitude = (0..4).fold(0u128, |sum, i| sum | u128::from(limbs[i]) << (32 * i));
        let magnitude = i128::try_from(magnitude).ok()?;
        Some(if negative { -magnitude } else { magnitude })
    }

    /// The double nearest to it in units of 2⁻¹⁰⁷⁴, of two that are as near the even one.
    fn double(&self) -> f64 {
        let (negative, limbs) = self.magnitude();
        let bit = |at: usize| limbs[at / 32] >> (at % 32) & 1 == 1;
        let Some(top) = (0..LIMBS * 32).rev().find(|at| bit(*at)) else { return 0.0 };
        // the mantissa's lowest bit; below it is what is rounded away
        let low = top.saturating_sub(52);
        let mantissa = (low..=top).rev().fold(0u64, |mantissa, at| mantissa << 1 | u64::from(bit(at)));
        let half = low > 0 && bit(low - 1);
        let more = low > 1 && (0..low - 1).any(bit);
        let up = half && (more || mantissa & 1 == 1);
        // the bits of a double count up from one to the next, across exponents, and end at infinity
        let bits = ((low as u64) << 52) + mantissa + u64::from(up);
        let magnitude = f64::from_bits(bits.min(f64::INFINITY.to_bits()));
        if negative { -magnitude } else { magnitude }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::Float64Array;
    use proptest::prelude::*;

    fn sum(values: &[f64]) -> f64 {
        let mut total = Total::default();
        values.iter().for_each(|value| total.add_double(*value, 1));
        total.double()
    }

    #[test]
    fn a_sum_of_doubles_is_the_double_nearest_to_the_true_sum() {
        assert_eq!(sum(&[1e308, 1e308, -1e308, -1e308, 5e-324]), 5e-324);
        assert_eq!(sum(&[1.0, 1e100, 1.0, -1e100]), 2.0);
        assert_eq!(sum(&[0.1; 10]), 1.0);
        assert_eq!(sum(&[f64::MAX, f64::MAX]), f64::INFINITY);
        assert_eq!(sum(&[f64::MAX, f64::MAX, -f64::MAX]), f64::MAX);
        // half way between two doubles: the even one; a little more: the one above
        let half = f64::EPSILON / 2.0;
        assert_eq!(sum(&[1.0, half]), 1.0);
        assert_eq!(sum(&[1.0, half, 5e-324]), 1.0 + f64::EPSILON);
        assert_eq!(sum(&[1.0 + f64::EPSILON, half]), 1.0 + 2.0 * f64::EPSILON);
        assert_eq!(sum(&[-1.0, -half, -5e-324]), -1.0 - f64::EPSILON);
        assert_eq!(sum(&[]).to_bits(), 0);
        assert_eq!(sum(&[-0.0]).to_bits(), 0);
        assert_eq!(sum(&[f64::MIN_POSITIVE, -5e-324]), f64::MIN_POSITIVE - 5e-324);
    }

    proptest! {
        #[test]
        fn one_double_comes_back_and_two_round_as_the_processor_rounds(bits: u64, other: u64) {
            let (a, b) = (f64::from_bits(bits), f64::from_bits(other));
            prop_assume!(a.is_finite() && b.is_finite() && a != 0.0 && a + b != 0.0);
            prop_assert_eq!(sum(&[a]).to_bits(), a.to_bits());
            prop_assert_eq!(sum(&[a, b]).to_bits(), (a + b).to_bits());
        }

        #[test]
        fn integers_sum_in_any_order_and_in_any_parts(
            values in prop::collection::vec(-(1i128 << 120)..(1i128 << 120), 0..40), cut in 0usize..40,
        ) {
            let cut = cut.min(values.len());
            let of = |values: &[i128]| {
                let mut total = Total::default();
                values.iter().for_each(|value| total.add_integer(*value, 1));
                total
            };
            let (mut first, mut second) = (of(&values[..cut]), of(&values[cut..]));
            first.merge(second.carried().into_iter());
            prop_assert_eq!(first.integer(), Some(values.iter().sum()));
            // what is taken away is as if it had never been there
            values.iter().for_each(|value| first.add_integer(*value, -1));
            prop_assert_eq!(first.integer(), Some(0));
        }
    }

    #[test]
    fn what_is_no_number_leaves_a_window_as_it_came() {
        let mut of =
            Sum { of: DataType::Float64, count: 0, specials: Specials::default(), total: Total::default() };
        let array = |values: &[f64]| -> ArrayRef { Arc::new(Float64Array::from(values.to_vec())) };
        let value = |of: &mut Sum| match of.evaluate().unwrap() {
            ScalarValue::Float64(value) => value,
            other => panic!("{other}"),
        };
        assert_eq!(value(&mut of), None);
        of.update_batch(&[array(&[1.0, f64::INFINITY])]).unwrap();
        assert_eq!(value(&mut of), Some(f64::INFINITY));
        of.update_batch(&[array(&[f64::NEG_INFINITY])]).unwrap();
        assert!(value(&mut of).unwrap().is_nan());
        of.retract_batch(&[array(&[f64::INFINITY, f64::NEG_INFINITY])]).unwrap();
        assert_eq!(value(&mut of), Some(1.0));
        of.retract_batch(&[array(&[1.0])]).unwrap();
        assert_eq!(value(&mut of), None);
    }
}

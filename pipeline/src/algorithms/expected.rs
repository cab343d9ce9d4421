//! Predicts what the draw takes from a stratum on average, by document length, from sums over its spans.
//!
//! The draw takes copies in ascending order of their keys (j + u) / c until the stratum's budget is met (see
//! [`crate::stages::draw`]). Up to a key k, it takes min(`max_copies`, k c) copies on average of a span with
//! c expected copies. If `max_copies` limits no span, k is 1. If it limits some, the other spans fill the
//! rest of the budget: k is the key at which all spans together meet it.
//!
//! A corpus has too many spans to keep them all. Spans are therefore summed if they have the same length
//! bucket and nearly the same copies. Copies are distinguished as finely as [`MAX_SUMS`] allows, which is
//! exactly if a recipe has few different values.

use hashbrown::HashMap;

use crate::tables::{LENGTH_BUCKET_NAMES, ONE};

/// How many sums are kept for all strata together. With many strata, each has [`MAX_SUMS_OF_A_STRATUM`]
/// instead.
const MAX_SUMS: usize = if cfg!(test) { 64 } else { 1 << 18 };
const MAX_SUMS_OF_A_STRATUM: usize = 16;

/// What distinguishes the spans of a stratum: spans of equal kind are summed.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    bucket: u8,
    long: bool,
    /// Expected copies in units of 2⁻³², with their last bits cleared.
    copies: u64,
}

/// The sum over the spans of one [`Kind`].
#[derive(Clone, Copy, Default)]
struct Sum {
    /// Tokens, each span counted once.
    tokens: u128,
    /// Σ copies × length, in units of 2⁻³² tokens.
    asked: u128,
}

impl Sum {
    fn add(&mut self, other: Sum) {
        self.tokens += other.tokens;
        self.asked += other.asked;
    }

    fn copies(&self) -> f64 {
        self.asked as f64 / ONE as f64 / self.tokens as f64
    }
}

/// The spans of a mixture, summed.
pub struct Spans {
    /// How many significant bits of `copies` are distinguished. It shrinks when there are too many sums.
    bits: u32,
    strata: usize,
    sums: HashMap<(usize, Kind), Sum>,
}

impl Default for Spans {
    fn default() -> Self {
        Self { bits: u64::BITS, strata: 0, sums: HashMap::new() }
    }
}

impl Spans {
    /// Adds a span of `length` tokens to a stratum. `copies` are expected copies in units of 2⁻³². `bucket`
    /// is the length bucket of its document, and `long` whether the document is long.
    pub fn add(&mut self, stratum: usize, bucket: usize, long: bool, copies: u64, length: u64) {
        let kind = Kind { bucket: bucket as u8, long, copies: rounded(copies, self.bits) };
        let tokens = u128::from(length);
        let sum = Sum { tokens, asked: tokens * u128::from(copies) };
        self.sums.entry((stratum, kind)).or_default().add(sum);
        self.strata = self.strata.max(stratum + 1);
        while self.sums.len() > MAX_SUMS.max(MAX_SUMS_OF_A_STRATUM * self.strata) && self.bits > 1 {
            self.bits = self.bits * 3 / 4;
            for ((stratum, kind), sum) in std::mem::take(&mut self.sums) {
                let kind = Kind { copies: rounded(kind.copies, self.bits), ..kind };
                self.sums.entry((stratum, kind)).or_default().add(sum);
            }
        }
    }

    /// The number of strata, which is also the number that the next new stratum gets.
    pub fn strata(&self) -> usize {
        self.strata
    }

    /// The spans of each stratum, by its number.
    pub fn by_stratum(self) -> Vec<StratumSpans> {
        let mut strata: Vec<StratumSpans> = vec![];
        strata.resize_with(self.strata, Default::default);
        for ((stratum, kind), sum) in self.sums {
            strata[stratum].0.push((kind, sum));
        }
        strata
    }
}

fn rounded(copies: u64, bits: u32) -> u64 {
    let last = (u64::BITS - copies.leading_zeros()).saturating_sub(bits);
    copies >> last << last
}

/// The spans of a stratum, summed.
#[derive(Default)]
pub struct StratumSpans(Vec<(Kind, Sum)>);

/// What the draw takes from a stratum on average.
pub struct Expected {
    /// The key at which the budget is met: a span with c expected copies is drawn c × `key` times, at most
    /// `max_copies` times.
    pub key: f64,
    /// Tokens by length bucket of the document. Their sum is the budget.
    pub by_length: Vec<u64>,
    /// Tokens of long documents.
    pub long: u64,
}

impl StratumSpans {
    /// How `budget` tokens are spent. The spans must have at least that many tokens if each is repeated
    /// `max_copies` times.
    pub fn expected(mut self, budget: u64, max_copies: u32) -> Expected {
        // spans with the most copies come first, because they are the first to reach `max_copies`
        let order = |(a, x): &(Kind, Sum), (b, y): &(Kind, Sum)| {
            y.copies().total_cmp(&x.copies()).then_with(|| (a.bucket, a.long).cmp(&(b.bucket, b.long)))
        };
        self.0.sort_unstable_by(order);
        let mut left = u128::from(budget) * u128::from(ONE);
        let mut asked: u128 = self.0.iter().map(|(_, sum)| sum.asked).sum();
        let key = |left: u128, asked: u128| if asked == 0 { 1.0 } else { left as f64 / asked as f64 };
        let full = |sum: &Sum, key: f64| sum.copies() * key >= f64::from(max_copies);
        let mut by_length = vec![0.0; LENGTH_BUCKET_NAMES.len()];
        let mut long = 0.0;
        for (kind, sum) in &self.0 {
            let all = sum.tokens * u128::from(max_copies);
            let tokens = if full(sum, key(left, asked)) {
                (left, asked) = (left.saturating_sub(all * u128::from(ONE)), asked - sum.asked);
                all as f64
            } else {
                sum.asked as f64 / ONE as f64 * key(left, asked)
            };
            by_length[usize::from(kind.bucket)] += tokens;
            long += if kind.long { tokens } else { 0.0 };
        }
        // round the running sums instead of the numbers, so that the rounded numbers add up to the budget
        let sum: f64 = by_length.iter().sum();
        let scale = if sum > 0.0 { budget as f64 / sum } else { 0.0 };
        let (mut so_far, mut before) = (0.0, 0);
        let by_length = by_length.into_iter().map(|tokens| {
            so_far += tokens * scale;
            let upto = (so_far.round() as u64).clamp(before, budget);
            upto - std::mem::replace(&mut before, upto)
        });
        let mut by_length: Vec<u64> = by_length.collect();
        let rest = budget - by_length.iter().sum::<u64>();
        if let Some(last) = by_length.iter_mut().rev().find(|tokens| **tokens > 0) {
            *last += rest;
        }
        Expected { key: key(left, asked), by_length, long: ((long * scale).round() as u64).min(budget) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The same, computed span by span; the key is found by bisection.
    fn by_definition(spans: &[(usize, u64, u64)], budget: f64, max_copies: f64) -> Vec<f64> {
        let drawn = |key: f64, copies: u64, length: u64| {
            max_copies.min(key * copies as f64 / ONE as f64) * length as f64
        };
        let (mut low, mut high) = (0.0, 1e18);
        for _ in 0..200 {
            let key: f64 = (low + high) / 2.0;
            let all: f64 = spans.iter().map(|(_, copies, length)| drawn(key, *copies, *length)).sum();
            if all < budget { low = key } else { high = key }
        }
        let mut by_length = vec![0.0; LENGTH_BUCKET_NAMES.len()];
        spans.iter().for_each(|(bucket, copies, length)| by_length[*bucket] += drawn(high, *copies, *length));
        by_length
    }

    proptest! {
        #[test]
        fn a_budget_is_spent_to_the_token_on_what_has_room(
            spans in prop::collection::vec((0usize..9, 1u64..(40 << 32), 1u64..5000), 1..300),
            share in 0.01..1.2f64,
            max_copies in 1u32..6,
            few in any::<bool>(),
        ) {
            // a few different values are kept exactly, many are rounded to their leading bits
            let few_copies = |copies: u64| if few { (copies >> 35).max(1) << 35 } else { copies };
            let spans: Vec<_> = spans.into_iter().map(|(b, c, l)| (b, few_copies(c), l)).collect();
            let mut sums = Spans::default();
            for (bucket, copies, length) in &spans {
                sums.add(0, *bucket, *bucket > 3, *copies, *length);
            }
            let room: u64 = spans.iter().map(|span| span.2).sum::<u64>() * u64::from(max_copies);
            let budget = ((room as f64 * share) as u64).clamp(1, room);
            let got = sums.by_stratum().remove(0).expected(budget, max_copies);
            prop_assert_eq!(got.by_length.iter().sum::<u64>(), budget);
            let long: u64 = got.by_length[4..].iter().sum();
            prop_assert!(got.long.abs_diff(long) <= 1, "{} {}", got.long, long);
            let want = by_definition(&spans, budget as f64, f64::from(max_copies));
            let near = if few { 1.5 } else { 1.5 + budget as f64 * 0.02 };
            for (got, want) in got.by_length.iter().zip(&want) {
                prop_assert!((*got as f64 - want).abs() <= near, "{:?} {:?}", got, want);
            }
        }
    }
}

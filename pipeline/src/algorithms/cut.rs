//! cut: finds where a stratum's budget ends among the keys of its copies, without sorting them all. See
//! [`crate::stages::draw`] for what the keys mean.

use serde::{Deserialize, Serialize};

use super::strata::Stratum;

/// A fixed-point key: (j + u) / c in units of 2⁻⁶⁴, for copy number j of a span with c expected copies; u is
/// a hash of the span in `[0, 1)`.
pub type Key = u128;

/// A copy's place in the order of its stratum: by key, and among equal keys by document, start and copy
/// number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Rank {
    #[serde(with = "text")]
    pub key: Key,
    pub doc_id: [u8; 16],
    pub start: i64,
    pub copy: u32,
}

/// How many ranges of keys a pass distinguishes, over all strata together. The limit keeps a task's answer
/// small.
pub const RANGES: usize = if cfg!(test) { 1 << 6 } else { 1 << 18 };

/// A pass distinguishes at most 2^`MAX_BITS` ranges in one stratum. More would be finer than its copies lie
/// apart.
pub const MAX_BITS: u32 = 14;

/// How many copies are sorted in memory, over all strata together. Tests use a small number, so that they go
/// through more passes.
pub const SORTED: u64 = if cfg!(test) { 4 } else { 1 << 15 };
/// With many strata, this many copies of each are sorted, even if they are more than [`SORTED`] together.
pub const SORTED_OF_A_STRATUM: u64 = if cfg!(test) { 2 } else { 16 };

/// How many copies of each stratum are sorted in memory, if there are `strata` of them.
pub fn sorted_of_each(strata: usize) -> u64 {
    (SORTED / strata.max(1) as u64).max(SORTED_OF_A_STRATUM)
}

/// The key of copy number `copy` of a span with `copies` expected copies, in units of 2⁻³². `u` is the span's
/// hash.
pub fn key(u: u64, copy: u32, copies: u64) -> Key {
    (((copy as u128) << 64 | u as u128) << 32) / copies as u128
}

/// The search for the place where a stratum's budget ends, and its result.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cut {
    pub domain: String,
    pub stratum: String,
    /// Tokens to draw.
    pub budget: u64,
    /// The budget ends at this key or a larger one. Copies with smaller keys have `below` tokens together.
    #[serde(with = "text")]
    pub from: Key,
    pub below: u64,
    /// A pass counts copies in 2^`bits` ranges of keys, each 2^`shift` keys wide.
    pub bits: u32,
    pub shift: u32,
    /// The first range has few enough copies to sort them.
    pub few: bool,
    pub end: Option<End>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum End {
    /// All copies of smaller rank are drawn, and the first `tokens` tokens of the copy `last`.
    At { last: Rank, tokens: i64 },
    /// All copies together do not meet the budget.
    Everything,
}

/// What a pass finds out about a stratum.
#[derive(Debug, Serialize, Deserialize)]
pub enum Tally {
    /// Tokens and copies of each range, and tokens beyond the last.
    Counted { ranges: Vec<(u64, u64)>, beyond: u64 },
    /// The copies of the first range, with their lengths.
    Ranked(Vec<(Rank, i64)>),
    /// The end is found already.
    Done,
}

impl Cut {
    /// `few` says that all copies of the stratum can be sorted. `many` is the number of strata for which this
    /// is not so; they share the [`RANGES`].
    pub fn new(asked: &Stratum, few: bool, many: usize) -> Self {
        let nothing = End::At { last: Rank { key: 0, doc_id: [0; 16], start: 0, copy: 0 }, tokens: 0 };
        let bits = (RANGES / many.max(1)).max(2).ilog2().min(MAX_BITS);
        Self {
            domain: asked.domain.clone(),
            stratum: asked.stratum.clone(),
            budget: asked.budget,
            from: 0,
            below: 0,
            bits,
            // the first pass covers keys from 0 to 4, or all keys if the stratum's copies can be sorted
            shift: if few { Key::BITS - 1 } else { 66 - bits },
            few,
            end: (asked.budget == 0).then_some(nothing),
        }
    }

    /// An empty tally for the next pass.
    pub fn tally(&self) -> Tally {
        match self.end {
            Some(_) => Tally::Done,
            None if self.few => Tally::Ranked(vec![]),
            None => Tally::Counted { ranges: vec![(0, 0); 1 << self.bits], beyond: 0 },
        }
    }

    /// Narrows the search by the tally of a pass. A range of at most `sorted` copies is small enough to sort.
    pub fn conclude(&mut self, tally: Tally, sorted: u64) {
        match tally {
            Tally::Done => {}
            Tally::Counted { ranges, beyond } => {
                let mut sum = self.below;
                for (range, (tokens, copies)) in ranges.into_iter().enumerate() {
                    if sum + tokens >= self.budget {
                        self.from += (range as Key) << self.shift;
                        self.below = sum;
                        self.few = copies <= sorted || self.shift == 0;
                        if !self.few {
                            self.shift = self.shift.saturating_sub(self.bits);
                        }
                        return;
                    }
                    sum += tokens;
                }
                if sum + beyond < self.budget {
                    self.end = Some(End::Everything);
                    return;
                }
                self.from += (1 as Key) << (self.shift + self.bits);
                self.below = sum;
                self.shift += (self.bits / 2).max(1);
            }
            Tally::Ranked(mut ranked) => {
                ranked.sort_unstable();
                let mut sum = self.below;
                for (last, length) in ranked {
                    let missing = self.budget - sum;
                    if length as u64 >= missing {
                        self.end = Some(End::At { last, tokens: missing as i64 });
                        return;
                    }
                    sum += length as u64;
                }
                self.end = Some(End::Everything);
            }
        }
    }

    /// How many tokens of a copy are drawn, from its start.
    ///
    /// # Panics
    /// The end is not found yet.
    pub fn drawn(&self, rank: Rank, length: i64) -> i64 {
        match self.end.expect("the draw begins when every end is found") {
            End::Everything => length,
            End::At { last, tokens } => match rank.cmp(&last) {
                std::cmp::Ordering::Less => length,
                std::cmp::Ordering::Equal => tokens,
                std::cmp::Ordering::Greater => 0,
            },
        }
    }
}

impl Tally {
    /// Adds a copy of `length` tokens.
    pub fn add(&mut self, cut: &Cut, rank: Rank, length: i64) {
        let Some(above) = rank.key.checked_sub(cut.from) else { return };
        let range = above >> cut.shift;
        match self {
            Tally::Counted { ranges, beyond } => {
                let range = usize::try_from(range).ok().and_then(|range| ranges.get_mut(range));
                match range {
                    Some((tokens, copies)) => (*tokens, *copies) = (*tokens + length as u64, *copies + 1),
                    None => *beyond += length as u64,
                }
            }
            Tally::Ranked(ranked) if range == 0 => ranked.push((rank, length)),
            _ => {}
        }
    }

    /// Adds what another task of the same pass found.
    pub fn merge(&mut self, other: Tally) {
        match (self, other) {
            (Tally::Counted { ranges, beyond }, Tally::Counted { ranges: others, beyond: further }) => {
                for (range, (tokens, copies)) in ranges.iter_mut().zip(others) {
                    (range.0, range.1) = (range.0 + tokens, range.1 + copies);
                }
                *beyond += further;
            }
            (Tally::Ranked(ranked), Tally::Ranked(others)) => ranked.extend(others),
            _ => {}
        }
    }
}

/// Writes keys as strings, because JSON readers do not expect numbers of 128 bits.
mod text {
    use super::Key;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(key: &Key, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(key)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Key, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

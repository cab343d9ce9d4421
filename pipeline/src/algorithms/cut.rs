//! cut: where a stratum's budget ends among the keys of its copies.

use serde::{Deserialize, Serialize};

use super::strata::Stratum;

/// A fixed-point key: (j + u) / c in units of 2⁻⁶⁴.
pub type Key = u128;

/// A copy's place among all copies of its stratum: ties of keys go by document, start and copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Rank {
    #[serde(with = "text")]
    pub key: Key,
    pub doc_id: [u8; 16],
    pub start: i64,
    pub copy: u32,
}

/// Ranges of keys that a pass tells apart, in all strata together: what a task answers stays small.
pub const RANGES: usize = if cfg!(test) { 1 << 6 } else { 1 << 18 };

/// More of them in one stratum would be finer than its copies.
pub const MAX_BITS: u32 = 14;

/// Copies that are sorted in memory, in all strata together, or else in each. Tests go through more passes.
pub const SORTED: u64 = if cfg!(test) { 4 } else { 1 << 15 };
pub const SORTED_OF_A_STRATUM: u64 = if cfg!(test) { 2 } else { 16 };

/// How many copies of each of so many strata are sorted.
pub fn sorted_of_each(strata: usize) -> u64 {
    (SORTED / strata.max(1) as u64).max(SORTED_OF_A_STRATUM)
}

pub fn key(u: u64, copy: u32, copies: u64) -> Key {
    (((copy as u128) << 64 | u as u128) << 32) / copies as u128
}

/// Where a stratum's budget ends.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cut {
    pub domain: String,
    pub stratum: String,
    pub budget: u64,
    /// Keys from here on are in question; `below` tokens have smaller keys.
    #[serde(with = "text")]
    pub from: Key,
    pub below: u64,
    /// A pass tells 2^`bits` ranges apart, each 2^`shift` keys wide.
    pub bits: u32,
    pub shift: u32,
    /// The first range has so few copies that they can be sorted.
    pub few: bool,
    pub end: Option<End>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum End {
    /// Everything of smaller rank is taken, of this one so many tokens.
    At { last: Rank, tokens: i64 },
    /// All there is does not meet the budget.
    Everything,
}

/// What a pass finds out about a stratum.
#[derive(Debug, Serialize, Deserialize)]
pub enum Tally {
    /// Tokens and copies of each range, and tokens beyond the last.
    Counted { ranges: Vec<(u64, u64)>, beyond: u64 },
    /// The copies of the first range, with their lengths.
    Ranked(Vec<(Rank, i64)>),
    /// Nothing is left to be found.
    Done,
}

impl Cut {
    /// `few`: all copies of the stratum can be sorted; of the others, there are `many` strata.
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
            // the first pass looks at keys from 0 to 4, or at all there are
            shift: if few { Key::BITS - 1 } else { 66 - bits },
            few,
            end: (asked.budget == 0).then_some(nothing),
        }
    }

    /// An empty tally of what is to be found next.
    pub fn tally(&self) -> Tally {
        match self.end {
            Some(_) => Tally::Done,
            None if self.few => Tally::Ranked(vec![]),
            None => Tally::Counted { ranges: vec![(0, 0); 1 << self.bits], beyond: 0 },
        }
    }

    /// Draws the conclusion of a pass. `sorted` copies may be sorted.
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
    /// Adds a copy.
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

/// Numbers that JSON readers don't expect to be so large.
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

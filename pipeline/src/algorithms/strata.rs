//! strata: what a recipe asks of each stratum, as sums over its spans.

use std::collections::BTreeMap;

use hashbrown::HashMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::expected::Spans;
use crate::hash::hex;
use crate::tables;
use crate::tables::ONE;

/// One row of a recipe's result, with the domain and length of its document from the catalog.
pub struct Span<'a> {
    pub doc_id: &'a [u8; 16],
    pub start: i64,
    pub stop: i64,
    /// Expected copies, in units of 2⁻³².
    pub copies: u64,
    pub stratum: &'a str,
    pub domain: &'a str,
    /// Length of the whole document in tokens.
    pub tokens: i64,
}

/// What a recipe asks for, by domain and stratum and by length: the preview, and the accounts of the draw.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, JsonSchema)]
pub struct Asked {
    /// One entry for each stratum of each domain.
    pub strata: Vec<Stratum>,
    /// The documents with the most expected copies of one span, in descending order.
    pub most_copies: Vec<Repeated>,
}

/// What a recipe asks of one stratum of a domain.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, JsonSchema)]
pub struct Stratum {
    /// The domain.
    pub domain: String,
    /// The name that the recipe gives the stratum; empty if it gives none.
    pub stratum: String,
    /// How many spans it has.
    pub spans: u64,
    /// Tokens of the stratum's spans, each span counted once.
    pub available: u64,
    /// Tokens to draw: Σ copies × length, rounded so that the sum over all strata is the rounded total of the
    /// mixture.
    pub budget: u64,
    /// Expected tokens drawn, by document length, in the buckets of the paper's Figure 2 (Fu et al. 2024).
    /// Their sum is what is drawn: the budget, or what `max_copies` leaves of it.
    pub by_length: Vec<u64>,
    /// How many of these tokens are in long documents.
    pub long: u64,
}

impl Stratum {
    /// Adds the numbers of another part of the same stratum.
    pub fn add(&mut self, other: &Stratum) {
        self.spans += other.spans;
        self.available += other.available;
        self.budget += other.budget;
        self.long += other.long;
        self.by_length.iter_mut().zip(&other.by_length).for_each(|(sum, n)| *sum += n);
    }

    /// Tokens of the budget that cannot be drawn, because every span is drawn at most `max_copies` times.
    pub fn shortfall(&self, max_copies: u32) -> u64 {
        self.budget.saturating_sub(self.available * max_copies as u64)
    }
}

/// How many of the most repeated documents are kept.
const MAX_NAMED: usize = 5;

/// A document that a recipe repeats.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, JsonSchema)]
pub struct Repeated {
    /// The document.
    pub doc_id: String,
    /// Its domain.
    pub domain: String,
    /// How many tokens it has.
    pub tokens: i64,
    /// How often it is drawn.
    pub copies: f64,
}

/// Adds up what a recipe asks for.
pub struct Sums {
    long_tokens: i64,
    max_copies: u32,
    /// By domain, then by stratum.
    strata: HashMap<String, HashMap<String, Sum>>,
    spans: Spans,
    most: Vec<Most>,
}

#[derive(Default)]
struct Sum {
    /// The stratum's number, in order of first appearance.
    number: usize,
    spans: u64,
    available: u64,
    budget: u128,
}

/// A document with a span of many copies.
struct Most {
    copies: u64,
    doc_id: [u8; 16],
    tokens: i64,
    domain: String,
    stratum: usize,
}

impl Sums {
    /// A document of more than `long_tokens` tokens is long. A span is drawn at most `max_copies` times.
    pub fn new(long_tokens: u64, max_copies: u32) -> Self {
        Self {
            long_tokens: long_tokens as i64,
            max_copies,
            strata: HashMap::new(),
            spans: Spans::default(),
            most: vec![],
        }
    }

    /// Adds a row of the recipe.
    pub fn add(&mut self, span: &Span<'_>) {
        let length = (span.stop - span.start) as u64;
        let new = Sum { number: self.spans.strata(), ..Sum::default() };
        let domain = self.strata.entry_ref(span.domain).or_default();
        let sum = domain.entry_ref(span.stratum).or_insert(new);
        sum.spans += 1;
        sum.available += length;
        sum.budget += span.copies as u128 * length as u128;
        let (bucket, long) = (tables::length_bucket(span.tokens), span.tokens > self.long_tokens);
        self.spans.add(sum.number, bucket, long, span.copies, length);
        if self.most.len() < MAX_NAMED || span.copies > self.most[MAX_NAMED - 1].copies {
            self.most.retain(|m| m.doc_id != *span.doc_id || m.copies > span.copies);
            if !self.most.iter().any(|m| m.doc_id == *span.doc_id) {
                let (domain, stratum) = (span.domain.to_owned(), sum.number);
                let (copies, doc_id, tokens) = (span.copies, *span.doc_id, span.tokens);
                self.most.push(Most { copies, doc_id, tokens, domain, stratum });
            }
            self.most.sort_by(|a, b| b.copies.cmp(&a.copies).then(a.doc_id.cmp(&b.doc_id)));
            self.most.truncate(MAX_NAMED);
        }
    }

    /// The sums over all rows.
    pub fn asked(self) -> Asked {
        let round = |fixed: u128| ((fixed + ONE as u128 / 2) / ONE as u128) as u64;
        let flat = self.strata.into_iter().flat_map(|(domain, strata)| {
            strata.into_iter().map(move |(stratum, sum)| ((domain.clone(), stratum), sum))
        });
        let sorted: BTreeMap<_, _> = flat.collect();
        // round the running sums instead of the budgets, so that the budgets add up to the rounded total
        let mut so_far = 0;
        let mut budget = |sum: u128| {
            let before = round(so_far);
            so_far += sum;
            round(so_far) - before
        };
        let mut spans = self.spans.by_stratum();
        let mut keys = vec![1.0; spans.len()];
        let strata = sorted.into_iter().map(|((domain, stratum), sum)| {
            let Sum { number, spans: count, available, budget: asked } = sum;
            let mut stratum = Stratum {
                domain,
                stratum,
                spans: count,
                available,
                budget: budget(asked),
                ..Stratum::default()
            };
            let drawn = stratum.budget - stratum.shortfall(self.max_copies);
            let expected = std::mem::take(&mut spans[number]).expected(drawn, self.max_copies);
            (stratum.by_length, stratum.long) = (expected.by_length, expected.long);
            keys[number] = expected.key;
            stratum
        });
        let strata = strata.collect();
        let most_copies = self.most.into_iter().map(|most| Repeated {
            doc_id: hex(&most.doc_id),
            domain: most.domain,
            tokens: most.tokens,
            copies: (most.copies as f64 / ONE as f64 * keys[most.stratum]).min(f64::from(self.max_copies)),
        });
        Asked { strata, most_copies: most_copies.collect() }
    }
}

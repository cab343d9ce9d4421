//! The loss of held-out documents by domain and position (paper §5.3: Table 5, Figure 3). Each document is read alone from
//! its start, so that a position is the number of preceding tokens of the same document.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::EvalModel;
use crate::dataset::Dataset;
use crate::{Error, Result};

/// The most positions that are read of a document: 128K, as in the paper.
pub const MAX_POSITIONS: usize = 1 << 17;

/// A range of positions, `[from, until)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PositionRange {
    pub from: usize,
    pub until: usize,
}

/// The ranges of the paper's Table 5 and Figure 3 (Loss@nK: the 1,024 positions before nK), and those between, for a curve.
pub fn ranges() -> Vec<PositionRange> {
    let table = [(0, 4), (4, 128)];
    let at = [1, 16, 32, 64, 128].map(|n| (n - 1, n));
    let curve = [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 128)];
    let all = table.into_iter().chain(at).chain(curve);
    let mut all: Vec<_> =
        all.map(|(from, until)| PositionRange { from: from << 10, until: until << 10 }).collect();
    all.sort();
    all
}

impl std::fmt::Display for PositionRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kilo = |n: usize| if n.is_multiple_of(1024) { format!("{}K", n >> 10) } else { n.to_string() };
        let from = if self.from == 0 { "0".to_owned() } else { kilo(self.from) };
        write!(f, "{from}-{}", kilo(self.until))
    }
}

/// A document of the packed sequences.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    pub domain: String,
    pub doc_id: String,
    /// As they are packed, with BOS and EOS.
    pub ids: Vec<i32>,
}

/// Reads the documents of packed sequences, and rejoins those that a sequence's end splits.
pub struct Documents {
    dataset: Dataset,
    /// The index of the next sequence.
    next: u64,
    /// Documents read so far. The last one may continue in the next sequence.
    waiting: std::collections::VecDeque<Document>,
}

impl Documents {
    pub fn new(dataset: Dataset) -> Self {
        Self { dataset, next: 0, waiting: Default::default() }
    }

    /// The next document.
    pub async fn next(&mut self) -> Result<Option<Document>> {
        while self.waiting.len() < 2 && self.next < self.dataset.sequences {
            let sequence = self.dataset.sequence(self.next).await?;
            self.next += 1;
            for segment in sequence.segments {
                let ids = &sequence.ids[segment.range];
                match self.waiting.back_mut() {
                    // Padding is no document.
                    _ if segment.doc_id.is_empty() => {}
                    Some(last) if last.doc_id == segment.doc_id => last.ids.extend(ids),
                    _ => self.waiting.push_back(Document {
                        domain: segment.domain,
                        doc_id: segment.doc_id,
                        ids: ids.to_vec(),
                    }),
                }
            }
        }
        Ok(self.waiting.pop_front())
    }
}

/// A document's losses, summed by range of positions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    pub domain: String,
    pub doc_id: String,
    /// The number of positions that were read.
    pub positions: usize,
    /// The sum and count of losses in each range.
    pub sums: Vec<(f64, u64)>,
    #[serde(default)]
    pub seconds: f64,
}

/// Computes a document's losses; `None` if it has nothing to predict.
pub fn document_losses(
    subject: &EvalModel,
    document: &Document,
    ranges: &[PositionRange],
) -> Result<Option<Case>> {
    let started = std::time::Instant::now();
    let ids = &document.ids[..document.ids.len().min(MAX_POSITIONS + 1)];
    if ids.len() < 2 {
        return Ok(None);
    }
    let losses = subject.losses(ids)?;
    if losses.iter().any(|loss| !loss.is_finite()) {
        let name = &document.doc_id;
        return Err(Error::Conf(format!(
            "losses of document {name} are not finite; are the model's weights?"
        )));
    }
    let sum = |range: &PositionRange| {
        let some = &losses[range.from.min(losses.len())..range.until.min(losses.len())];
        (some.iter().map(|loss| f64::from(*loss)).sum(), some.len() as u64)
    };
    Ok(Some(Case {
        domain: document.domain.clone(),
        doc_id: document.doc_id.clone(),
        positions: losses.len(),
        sums: ranges.iter().map(sum).collect(),
        seconds: started.elapsed().as_secs_f64(),
    }))
}

/// The loss in a range of positions, over the documents of a domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// `None` for all domains together.
    pub domain: Option<String>,
    pub positions: PositionRange,
    /// The number of documents that reach into the range.
    pub documents: u64,
    /// The number of losses.
    pub count: u64,
    /// The mean over all losses.
    pub loss: f64,
    /// Its standard error over documents; `None` for a single document.
    pub error: Option<f64>,
}

/// The loss by domain and range of positions, without empty cells.
pub fn table(cases: &[Case], ranges: &[PositionRange]) -> Vec<Cell> {
    let mut by_domain: BTreeMap<Option<&str>, Vec<&Case>> = BTreeMap::new();
    for case in cases {
        by_domain.entry(None).or_default().push(case);
        by_domain.entry(Some(&case.domain)).or_default().push(case);
    }
    let mut cells = vec![];
    for (domain, cases) in by_domain {
        for (i, positions) in ranges.iter().enumerate() {
            let sums = cases.iter().filter_map(|case| case.sums.get(i).copied()).filter(|(_, n)| *n > 0);
            if let Some((loss, error)) = ratio_of_sums(sums.clone()) {
                cells.push(Cell {
                    domain: domain.map(str::to_owned),
                    positions: *positions,
                    documents: sums.clone().count() as u64,
                    count: sums.map(|(_, n)| n).sum(),
                    loss,
                    error,
                });
            }
        }
    }
    cells
}

/// The mean loss from each document's sum and count, and its standard error. The error is that of a ratio of two sums over
/// documents, because losses within a document are not independent.
fn ratio_of_sums(sums: impl Iterator<Item = (f64, u64)> + Clone) -> Option<(f64, Option<f64>)> {
    let documents = sums.clone().count() as f64;
    let (sum, count) = sums.clone().fold((0.0, 0.0), |(s, c), (sum, count)| (s + sum, c + count as f64));
    if count == 0.0 {
        return None;
    }
    let mean = sum / count;
    let squares: f64 = sums.map(|(sum, n)| (sum - mean * n as f64).powi(2)).sum();
    let error = (documents > 1.0).then(|| (squares * documents / (documents - 1.0)).sqrt() / count);
    Some((mean, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::tests::{folder, packed};

    #[tokio::test]
    async fn documents_are_whole_again_where_sequences_cut_them() {
        let file = packed(&[
            (vec![1, 2, 3, 4], 5, vec![("a", 0, 3), ("b", 3, 4)]),
            (vec![5, 6, 7, 8], 9, vec![("b", 0, 4)]),
            (vec![9, 10, 11, 12], 13, vec![("b", 0, 1), ("c", 1, 2), ("", 2, 4)]),
        ]);
        let folder = folder(&[("heldout-00000-of-00001.parquet", file)]).await;
        let mut documents = Documents::new(Dataset::open(&folder, 20).await.unwrap());
        let mut all = vec![];
        while let Some(document) = documents.next().await.unwrap() {
            all.push((document.doc_id, document.ids));
        }
        let want = [("a", vec![1, 2, 3]), ("b", vec![4, 5, 6, 7, 8, 9]), ("c", vec![10])];
        assert_eq!(all, want.map(|(id, ids)| (id.to_owned(), ids)));
    }

    fn case(domain: &str, sums: &[(f64, u64)]) -> Case {
        let doc_id = String::new();
        Case { domain: domain.into(), doc_id, positions: 0, sums: sums.to_vec(), seconds: 0.0 }
    }

    #[test]
    fn a_mean_is_over_losses_and_its_error_over_documents() {
        let ranges = [PositionRange { from: 0, until: 4096 }, PositionRange { from: 4096, until: 131_072 }];
        let cases = [
            case("Book", &[(20.0, 10), (0.0, 0)]),
            case("Book", &[(40.0, 10), (5.0, 5)]),
            case("ArXiv", &[(10.0, 10), (0.0, 0)]),
        ];
        let table = table(&cases, &ranges);
        let cell = |domain: Option<&str>, i: usize| {
            let found = |c: &&Cell| c.domain.as_deref() == domain && c.positions == ranges[i];
            table.iter().find(found).map(|c| (c.documents, c.count, c.loss, c.error))
        };
        // Residuals −10 and 10: sqrt(200 · 2 / 1) / 20 = 1.
        assert_eq!(cell(Some("Book"), 0), Some((2, 20, 3.0, Some(1.0))));
        assert_eq!(cell(Some("Book"), 1), Some((1, 5, 1.0, None)));
        assert_eq!(cell(Some("ArXiv"), 0), Some((1, 10, 1.0, None)));
        assert_eq!(cell(Some("ArXiv"), 1), None);
        let (documents, count, loss, error) = cell(None, 0).unwrap();
        assert_eq!((documents, count), (3, 30));
        assert!((loss - 70.0 / 30.0).abs() < 1e-12 && error.unwrap() > 0.0);
        assert_eq!(ranges.map(|range| range.to_string()), ["0-4K", "4K-128K"]);
    }
}

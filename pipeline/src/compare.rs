//! compare: what differs between runs, in what was asked of them and in what came of it. The first is what the others are
//! compared with.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use similar::TextDiff;

use crate::preview::Preview;
use crate::publish::{self, RunManifest};
use crate::store::{Location, json_lines};
use crate::tables::LENGTH_BUCKET_NAMES;
use crate::{Error, Result};

/// A difference of the loss beyond this counts (paper, Table 5).
pub const COUNTS: f64 = 0.01;

/// One of the runs.
pub struct Side {
    /// What it is called among the others.
    pub name: String,
    pub manifest: RunManifest,
    losses: Vec<Losses>,
    pub metrics: Vec<Value>,
}

/// A held-out document's losses, as the evaluation wrote them.
#[derive(Deserialize)]
struct Losses {
    domain: String,
    doc_id: String,
    sums: Vec<(f64, u64)>,
}

/// What differs.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    pub names: Vec<String>,
    pub runs: Vec<String>,
    pub commits: Vec<Option<String>>,
    /// Keys of the conf that differ, with the value of each side; empty where it has none.
    pub conf: Vec<(String, Vec<String>)>,
    /// Diffs of SQL files, each side's to the first one's.
    pub sql: Vec<SqlDiff>,
    /// Shares of the drawn tokens, by domain, and by length of their document; the corpus's own of the first side before.
    pub domains: Vec<Shares>,
    pub lengths: Vec<Shares>,
    /// Shares of a domain's drawn tokens that are in long documents.
    pub long: Vec<Shares>,
    pub loss: Vec<LossRow>,
    /// Scores of the other evaluations.
    pub scores: Vec<(String, Vec<Option<f64>>)>,
    /// Loss of the last step of training.
    pub training: Vec<Option<f64>>,
}

/// A file of SQL that is not the first side's.
#[derive(Clone, Debug, Serialize)]
pub struct SqlDiff {
    pub name: String,
    pub file: String,
    pub diff: String,
}

/// Shares of something, in the corpus and by side.
#[derive(Clone, Debug, Serialize)]
pub struct Shares {
    pub name: String,
    pub corpus: f64,
    pub sides: Vec<f64>,
}

/// Loss of a domain over a range of positions.
#[derive(Clone, Debug, Serialize)]
pub struct LossRow {
    /// `None` of all together.
    pub domain: Option<String>,
    pub positions: Value,
    /// Documents that reach there.
    pub documents: usize,
    /// The first side's.
    pub loss: f64,
    /// The others', less the first's; `None` where they have no document in common.
    pub differences: Vec<Option<Difference>>,
}

/// A difference of two means over the same documents.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Difference {
    pub mean: f64,
    /// Its standard error over documents, each compared with itself; `None` of one document.
    pub error: Option<f64>,
}

impl Difference {
    /// Whether it is beyond what counts, and beyond twice its error.
    pub fn counts(&self) -> bool {
        self.mean.abs() > COUNTS && self.error.is_none_or(|error| self.mean.abs() > 2.0 * error)
    }
}

impl Side {
    /// Reads the directory of a run.
    pub async fn read(name: String, folder: &Location) -> Result<Self> {
        let manifest = publish::read(folder).await?;
        let lines = async |file: &str| -> Result<Vec<Value>> {
            let at = folder.join(file);
            let lines = json_lines(&at.get().await?.unwrap_or_default()).collect::<Result<_, _>>();
            lines.map_err(|e| Error::Corrupt { url: at.url(), message: e.to_string() })
        };
        let metrics = lines("checkpoint/metrics.jsonl").await?;
        let losses = lines("eval/loss/cases.jsonl").await?;
        let losses = losses.into_iter().filter_map(|case| serde_json::from_value(case).ok()).collect();
        Ok(Self { name, manifest, losses, metrics })
    }

    fn preview(&self) -> Preview {
        let mixture = &self.manifest.conf.mixture;
        let (domains, drawn) = (&self.manifest.summary.domains, &self.manifest.summary.drawn);
        let long = mixture.long_tokens.0;
        Preview::new(&mixture.recipe, mixture.budget.0, long, mixture.max_copies, domains, drawn)
    }
}

/// Compares the first with the others.
pub fn compare(sides: &[Side]) -> Comparison {
    let previews: Vec<Preview> = sides.iter().map(Side::preview).collect();
    let scores = sides.iter().flat_map(|side| side.manifest.summary.evaluations.keys());
    let scores: BTreeSet<&String> = scores.collect();
    Comparison {
        names: sides.iter().map(|side| side.name.clone()).collect(),
        runs: sides.iter().map(|side| side.manifest.run.clone()).collect(),
        commits: sides.iter().map(|side| side.manifest.commit.clone()).collect(),
        conf: confs(sides),
        sql: sql(sides),
        domains: by_domain(&previews, |mixed| mixed.share, |mixed| mixed.mixture_share),
        lengths: LENGTH_BUCKET_NAMES
            .iter()
            .enumerate()
            .map(|(i, bucket)| Shares {
                name: (*bucket).to_owned(),
                corpus: previews.first().map_or(0.0, |preview| preview.lengths_before[i]),
                sides: previews.iter().map(|preview| preview.lengths_after[i]).collect(),
            })
            .collect(),
        long: by_domain(&previews, |mixed| mixed.long_before, |mixed| mixed.long_after),
        loss: losses(sides),
        scores: scores
            .into_iter()
            .filter(|name| *name != "loss")
            .map(|name| (name.clone(), sides.iter().map(|side| side.manifest.summary.score(name)).collect()))
            .collect(),
        training: sides.iter().map(|side| side.metrics.last()?["loss"].as_f64()).collect(),
    }
}

fn by_domain(
    previews: &[Preview],
    before: fn(&crate::preview::Mixed) -> f64,
    after: fn(&crate::preview::Mixed) -> f64,
) -> Vec<Shares> {
    let names: BTreeSet<&str> =
        previews.iter().flat_map(|p| p.domains.iter().map(|d| d.domain.as_str())).collect();
    let of = |preview: &Preview, name: &str, value: fn(&crate::preview::Mixed) -> f64| {
        preview.domains.iter().find(|domain| domain.domain == name).map_or(0.0, value)
    };
    let shares = |name: &str| Shares {
        name: name.to_owned(),
        corpus: previews.first().map_or(0.0, |preview| of(preview, name, before)),
        sides: previews.iter().map(|preview| of(preview, name, after)).collect(),
    };
    names.into_iter().map(shares).collect()
}

/// A conf's keys and values, tables opened: `train.shape.layers`.
fn flat(prefix: &str, value: &toml::Value, into: &mut BTreeMap<String, String>) {
    let key = |name: &str| if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") };
    match value {
        toml::Value::Table(table) => table.iter().for_each(|(name, value)| flat(&key(name), value, into)),
        toml::Value::Array(list) if list.iter().any(toml::Value::is_table) => {
            list.iter().enumerate().for_each(|(i, value)| flat(&key(&i.to_string()), value, into));
        }
        value => drop(into.insert(prefix.to_owned(), value.to_string())),
    }
}

fn confs(sides: &[Side]) -> Vec<(String, Vec<String>)> {
    let flats: Vec<BTreeMap<String, String>> = sides
        .iter()
        .map(|side| {
            let mut keys = BTreeMap::new();
            if let Ok(conf) = toml::from_str::<toml::Value>(&side.manifest.conf.to_toml()) {
                flat("", &conf, &mut keys);
            }
            keys
        })
        .collect();
    let keys: BTreeSet<&String> = flats.iter().flat_map(BTreeMap::keys).collect();
    let values = |key: &String| {
        flats.iter().map(|flat| flat.get(key).cloned().unwrap_or_default()).collect::<Vec<_>>()
    };
    keys.into_iter()
        // where it is stored is no difference
        .filter(|key| *key != "run.output")
        .map(|key| (key.clone(), values(key)))
        .filter(|(_, values)| values.iter().any(|value| *value != values[0]))
        .collect()
}

fn sql(sides: &[Side]) -> Vec<SqlDiff> {
    let Some((first, others)) = sides.split_first() else { return vec![] };
    let mut all = vec![];
    for side in others {
        let recipe = |side: &Side| side.manifest.conf.mixture.recipe.clone();
        // recipes are compared with each other, whatever their names
        let mut pairs = vec![(recipe(first), recipe(side))];
        let files = first.manifest.sql.keys().chain(side.manifest.sql.keys()).collect::<BTreeSet<_>>();
        let others = files.into_iter().filter(|file| **file != recipe(first) && **file != recipe(side));
        pairs.extend(others.map(|file| (file.clone(), file.clone())));
        for (before, after) in pairs {
            let text = |side: &Side, file: &str| side.manifest.sql.get(file).cloned().unwrap_or_default();
            let (old, new) = (text(first, &before), text(side, &after));
            if old != new {
                let diff = TextDiff::from_lines(&old, &new);
                let diff = diff.unified_diff().context_radius(2).header(&before, &after).to_string();
                all.push(SqlDiff { name: side.name.clone(), file: after, diff });
            }
        }
    }
    all
}

impl Side {
    /// Sum and count of the losses in a range of each document of a domain that reaches there, by domain and id.
    fn sums(&self, domain: Option<&str>, range: usize) -> BTreeMap<(&str, &str), (f64, u64)> {
        let of = self.losses.iter().filter(|losses| domain.is_none_or(|domain| losses.domain == domain));
        of.filter_map(|losses| {
            let (sum, count) = *losses.sums.get(range).filter(|(_, count)| *count > 0)?;
            Some(((losses.domain.as_str(), losses.doc_id.as_str()), (sum, count)))
        })
        .collect()
    }
}

fn losses(sides: &[Side]) -> Vec<LossRow> {
    let Some((first, others)) = sides.split_first() else { return vec![] };
    let Some(notes) = first.manifest.summary.evaluations.get("loss") else { return vec![] };
    let ranges = notes["ranges"].as_array().map(Vec::as_slice).unwrap_or_default();
    let domains: BTreeSet<Option<&str>> =
        first.losses.iter().map(|losses| Some(losses.domain.as_str())).chain([None]).collect();
    let mut rows = vec![];
    for domain in domains {
        for (range, positions) in ranges.iter().enumerate() {
            let own = first.sums(domain, range);
            if own.is_empty() {
                continue;
            }
            let difference = |side: &Side| {
                let theirs = side.sums(domain, range);
                let pair = |(document, (sum, n)): (_, &(f64, u64))| {
                    let (before, _) = own.get(document).filter(|(_, m)| m == n)?;
                    Some((sum - before, *n as f64))
                };
                paired(&theirs.iter().filter_map(pair).collect::<Vec<_>>())
            };
            let (sum, count) = own.values().fold((0.0, 0), |(s, c), (sum, count)| (s + sum, c + count));
            rows.push(LossRow {
                domain: domain.map(str::to_owned),
                positions: positions.clone(),
                documents: own.len(),
                loss: sum / count as f64,
                differences: others.iter().map(difference).collect(),
            });
        }
    }
    rows
}

/// The mean difference a loss, from differences summed over documents and counts, and its error as that of a ratio.
fn paired(pairs: &[(f64, f64)]) -> Option<Difference> {
    let (sum, count) = pairs.iter().fold((0.0, 0.0), |(s, c), (difference, n)| (s + difference, c + n));
    if count == 0.0 {
        return None;
    }
    let (mean, documents) = (sum / count, pairs.len() as f64);
    let squares: f64 = pairs.iter().map(|(difference, n)| (difference - mean * n).powi(2)).sum();
    let error = (documents > 1.0).then(|| (squares * documents / (documents - 1.0)).sqrt() / count);
    Some(Difference { mean, error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_of_the_same_documents_and_counts_beyond_its_error() {
        // each document a tenth better a loss: no error at all
        let same = paired(&[(-1.0, 10.0), (-2.0, 20.0)]).unwrap();
        assert!((same.mean + 0.1).abs() < 1e-12 && same.error.unwrap() < 1e-12 && same.counts());
        // one better, one worse
        let noise = paired(&[(-4.0, 10.0), (3.0, 10.0)]).unwrap();
        assert!((noise.mean + 0.05).abs() < 1e-12 && !noise.counts(), "{noise:?}");
        assert!((noise.error.unwrap() - (2.0 * (3.5f64 * 3.5 * 2.0)).sqrt() / 20.0).abs() < 1e-12);
        let small = paired(&[(-0.01, 10.0), (-0.01, 10.0)]).unwrap();
        assert!(!small.counts());
        assert!(paired(&[]).is_none());
    }

    #[test]
    fn keys_of_a_conf_are_named_by_their_path() {
        let conf = "[run]\nname = \"a\"\n[[source]]\nurl = \"x\"\n[train.shape]\nlayers = 2\n[eval]\nlengths = [1, 2]\n";
        let mut keys = BTreeMap::new();
        flat("", &toml::from_str(conf).unwrap(), &mut keys);
        let keys: Vec<(&str, &str)> = keys.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(
            keys,
            [
                ("eval.lengths", "[1, 2]"),
                ("run.name", "\"a\""),
                ("source.0.url", "\"x\""),
                ("train.shape.layers", "2")
            ]
        );
    }
}

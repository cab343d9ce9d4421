//! compare: differences between runs, both in their confs and SQL and in their results. The other runs are
//! compared with the first.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use similar::TextDiff;

use crate::directory::{self, RunManifest};
use crate::preview::Preview;
use crate::storage::{Location, json_lines};
use crate::tables::LENGTH_BUCKET_NAMES;
use crate::{Error, Result};

/// Differences of the loss of at most this many nats per token do not count (paper, Table 5).
pub const COUNTS: f64 = 0.01;

/// One of the compared runs.
pub struct Side {
    /// The name of the run in the comparison. Runs of the same name are repetitions with other seeds.
    pub name: String,
    pub manifest: RunManifest,
    losses: Vec<Losses>,
    metrics: Vec<Value>,
}

/// A held-out document's losses as the evaluation wrote them: the sum (nats) and the count of each range of
/// positions.
#[derive(Deserialize)]
pub struct Losses {
    domain: String,
    doc_id: String,
    sums: Vec<(f64, u64)>,
}

/// The result of a comparison. Lists by side have one entry per name, in the order of `names`.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    pub names: Vec<String>,
    /// The runs of each name: one per seed.
    pub runs: Vec<Vec<String>>,
    pub commits: Vec<Option<String>>,
    /// Keys of the conf that differ, with the value of each side; an empty text if the side has no such key.
    pub conf: Vec<(String, Vec<String>)>,
    /// Diffs of SQL files, from the first side to each other side.
    pub sql: Vec<SqlDiff>,
    /// Shares of the drawn tokens by domain, and by the length of their document; before them the share in
    /// the first side's corpus.
    pub domains: Vec<Shares>,
    pub lengths: Vec<Shares>,
    /// The share of each domain's drawn tokens that lie in long documents.
    pub long: Vec<Shares>,
    pub loss: Vec<LossRow>,
    /// Scores of the other evaluations.
    pub scores: Vec<(String, Vec<Option<f64>>)>,
    /// The training loss of the last step, in nats per token.
    pub training: Vec<Option<f64>>,
}

/// An SQL file that differs from the first side's.
#[derive(Clone, Debug, Serialize)]
pub struct SqlDiff {
    pub name: String,
    pub file: String,
    pub diff: String,
}

/// The shares of one domain or length bucket: in the corpus, and by side.
#[derive(Clone, Debug, Serialize)]
pub struct Shares {
    pub name: String,
    pub corpus: f64,
    pub sides: Vec<f64>,
}

/// The loss of a domain over a range of positions, in nats per token.
#[derive(Clone, Debug, Serialize)]
pub struct LossRow {
    /// `None` for all domains together.
    pub domain: Option<String>,
    pub positions: Value,
    /// How many documents have tokens in the range.
    pub documents: usize,
    /// The first side's loss.
    pub loss: f64,
    /// The other sides' losses minus the first side's; `None` if they have no document in common.
    pub differences: Vec<Option<Difference>>,
}

/// The difference of two mean losses over the same documents, in nats per token.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Difference {
    pub mean: f64,
    /// The standard error: over documents, each compared with itself, and over seeds if there are several.
    /// `None` for a single document.
    pub error: Option<f64>,
    pub documents: usize,
}

/// A standard error over fewer documents than this is itself too uncertain.
pub const ENOUGH: usize = 5;

impl Difference {
    /// Whether the difference counts: it is larger than [`COUNTS`], larger than twice its error, and over at
    /// least [`ENOUGH`] documents.
    pub fn counts(&self) -> bool {
        self.documents >= ENOUGH
            && self.mean.abs() > COUNTS
            && self.error.is_some_and(|error| self.mean.abs() > 2.0 * error)
    }

    /// Whether the loss is lower than the first side's; `None` if the difference does not count.
    pub fn better(&self) -> Option<bool> {
        self.counts().then_some(self.mean < 0.0)
    }
}

impl LossRow {
    /// The domain's name, or "all".
    pub fn domain(&self) -> &str {
        self.domain.as_deref().unwrap_or("all")
    }
}

impl Side {
    /// Reads the directory of a run.
    pub async fn read(name: String, folder: &Location) -> Result<Self> {
        let manifest = directory::read(folder).await?;
        let metrics = lines(&folder.join("checkpoint/metrics.jsonl")).await?;
        let losses = losses_of(&folder.join("eval/loss/cases.jsonl")).await?;
        Ok(Self { name, manifest, losses, metrics })
    }

    /// The training loss as points of (tokens trained, nats per token).
    pub fn training(&self) -> Vec<(f64, f64)> {
        let point = |line: &Value| Some((line["tokens"].as_f64()?, line["loss"].as_f64()?));
        self.metrics.iter().filter_map(point).collect()
    }

    fn preview(&self) -> Preview {
        let summary = &self.manifest.summary;
        Preview::new(&self.manifest.conf.mixture, &summary.domains, &summary.drawn)
    }
}

/// The runs grouped by name, in the order in which the names first occur.
fn groups(sides: &[Side]) -> Vec<Vec<&Side>> {
    let mut groups: Vec<Vec<&Side>> = vec![];
    for side in sides {
        match groups.iter_mut().find(|group| group[0].name == side.name) {
            Some(group) => group.push(side),
            None => groups.push(vec![side]),
        }
    }
    groups
}

/// The first run of each name.
pub fn firsts(sides: &[Side]) -> Vec<&Side> {
    groups(sides).into_iter().map(|group| group[0]).collect()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    sum / count
}

/// Compares the other runs with the first. `sides` has at least one run.
pub fn compare(sides: &[Side]) -> Comparison {
    let groups = groups(sides);
    let firsts: Vec<&Side> = groups.iter().map(|group| group[0]).collect();
    let previews: Vec<Vec<Preview>> =
        groups.iter().map(|group| group.iter().map(|side| side.preview()).collect()).collect();
    let named: BTreeSet<String> = previews.iter().flatten().flat_map(Preview::largest).collect();
    let previews: Vec<Vec<Preview>> =
        previews.iter().map(|group| group.iter().map(|preview| preview.only(&named)).collect()).collect();
    let scores = sides.iter().flat_map(|side| side.manifest.summary.evaluations.keys());
    let scores: BTreeSet<&String> = scores.collect();
    // losses over tokens of different tokenizers are not comparable
    let mut losses_by_group: Vec<Vec<&[Losses]>> = vec![];
    for group in &groups {
        let alike = |side: &Side| side.manifest.tokenizer == sides[0].manifest.tokenizer;
        let own = group.iter().map(|side| if alike(side) { side.losses.as_slice() } else { &[] });
        losses_by_group.push(own.collect());
    }
    // the mean over all seeds, if every seed has a value
    let of_all = |group: &Vec<&Side>, value: &dyn Fn(&Side) -> Option<f64>| {
        let values: Option<Vec<f64>> = group.iter().map(|side| value(side)).collect();
        values.map(|values| mean(values.into_iter()))
    };
    Comparison {
        names: firsts.iter().map(|side| side.name.clone()).collect(),
        runs: groups.iter().map(|group| group.iter().map(|s| s.manifest.run.clone()).collect()).collect(),
        commits: firsts.iter().map(|side| side.manifest.commit.clone()).collect(),
        conf: confs(&firsts),
        sql: sql(&firsts),
        domains: by_domain(&previews, |mixed| mixed.share, |mixed| mixed.mixture_share),
        lengths: LENGTH_BUCKET_NAMES
            .iter()
            .enumerate()
            .map(|(i, bucket)| Shares {
                name: (*bucket).to_owned(),
                corpus: previews.first().map_or(0.0, |of| mean(of.iter().map(|p| p.lengths_before[i]))),
                sides: previews.iter().map(|of| mean(of.iter().map(|p| p.lengths_after[i]))).collect(),
            })
            .collect(),
        long: by_domain(&previews, |mixed| mixed.long_before, |mixed| mixed.long_after),
        loss: loss_rows(&ranges(&firsts), &losses_by_group),
        scores: scores
            .into_iter()
            .filter(|name| *name != "loss")
            .map(|name| {
                let score = |side: &Side| side.manifest.summary.score(name);
                (name.clone(), groups.iter().map(|group| of_all(group, &score)).collect())
            })
            .collect(),
        training: groups
            .iter()
            .map(|group| of_all(group, &|side| side.metrics.last()?["loss"].as_f64()))
            .collect(),
    }
}

fn by_domain(
    previews: &[Vec<Preview>],
    before: fn(&crate::preview::Mixed) -> f64,
    after: fn(&crate::preview::Mixed) -> f64,
) -> Vec<Shares> {
    let names: BTreeSet<&str> =
        previews.iter().flatten().flat_map(|p| p.domains.iter().map(|d| d.domain.as_str())).collect();
    let of =
        |seeds: &Vec<Preview>, name: &str, value: fn(&crate::preview::Mixed) -> f64| {
            mean(seeds.iter().map(|preview| {
                preview.domains.iter().find(|domain| domain.domain == name).map_or(0.0, value)
            }))
        };
    let shares = |name: &str| Shares {
        name: name.to_owned(),
        corpus: previews.first().map_or(0.0, |seeds| of(seeds, name, before)),
        sides: previews.iter().map(|seeds| of(seeds, name, after)).collect(),
    };
    names.into_iter().map(shares).collect()
}

/// Adds a conf's keys and values to `into`; nested tables become paths such as `train.shape.layers`.
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

fn confs(sides: &[&Side]) -> Vec<(String, Vec<String>)> {
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
        // where the output is stored makes no difference
        .filter(|key| *key != "run.output")
        .map(|key| (key.clone(), values(key)))
        .filter(|(_, values)| values.iter().any(|value| *value != values[0]))
        .collect()
}

fn sql(sides: &[&Side]) -> Vec<SqlDiff> {
    let Some((first, others)) = sides.split_first() else { return vec![] };
    let mut all = vec![];
    for side in others {
        let recipe = |side: &Side| side.manifest.conf.mixture.recipe.clone();
        // the recipes are compared even if their files have different names
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

/// The values of a file of JSON lines; empty if there is no such file.
async fn lines(at: &Location) -> Result<Vec<Value>> {
    let lines = json_lines(&at.get().await?.unwrap_or_default()).collect::<Result<_, _>>();
    lines.map_err(|e| Error::Corrupt { url: at.url(), message: e.to_string() })
}

/// The losses in an evaluation's file of cases.
pub async fn losses_of(cases: &Location) -> Result<Vec<Losses>> {
    Ok(lines(cases).await?.into_iter().filter_map(|case| serde_json::from_value(case).ok()).collect())
}

/// The sum and the count of the losses in a range of positions, by (domain, doc_id), for each document that
/// reaches the range. With a `domain`, only its documents.
fn sums<'a>(
    losses: &'a [Losses],
    domain: Option<&str>,
    range: usize,
) -> BTreeMap<(&'a str, &'a str), (f64, u64)> {
    let mut all: BTreeMap<_, (f64, u64)> = BTreeMap::new();
    for losses in losses.iter().filter(|losses| domain.is_none_or(|domain| losses.domain == domain)) {
        if let Some((sum, count)) = losses.sums.get(range).filter(|(_, count)| *count > 0) {
            // a document that was packed several times has as many entries
            let of = all.entry((losses.domain.as_str(), losses.doc_id.as_str())).or_default();
            *of = (of.0 + sum, of.1 + count);
        }
    }
    all
}

/// The ranges of positions that the first run's losses are summed over.
fn ranges(sides: &[&Side]) -> Vec<Value> {
    let notes = sides.first().and_then(|side| side.manifest.summary.evaluations.get("loss"));
    notes.and_then(|notes| notes["ranges"].as_array().cloned()).unwrap_or_default()
}

/// The first group's loss by domain and range of positions, and the other groups' differences from it. A
/// group holds one list of losses per seed.
pub fn loss_rows(ranges: &[Value], groups: &[Vec<&[Losses]>]) -> Vec<LossRow> {
    let Some((firsts, others)) = groups.split_first() else { return vec![] };
    let domains: BTreeSet<Option<&str>> = firsts
        .iter()
        .flat_map(|losses| losses.iter())
        .map(|losses| Some(losses.domain.as_str()))
        .chain([None])
        .collect();
    let mut rows = vec![];
    for domain in domains {
        for (range, positions) in ranges.iter().enumerate() {
            let own: Vec<_> = firsts.iter().map(|losses| sums(losses, domain, range)).collect();
            if own.iter().any(BTreeMap::is_empty) {
                continue;
            }
            // each seed is compared with the first group's run in the same place
            let difference = |group: &Vec<&[Losses]>| {
                let seeds = own.iter().zip(group).map(|(own, losses)| {
                    let theirs = sums(losses, domain, range);
                    let pair = |(document, (sum, n)): (&(&str, &str), &(f64, u64))| {
                        let (before, _) = own.get(document).filter(|(_, m)| m == n)?;
                        let document = (document.0.to_owned(), document.1.to_owned());
                        Some((document, (sum - before, *n as f64)))
                    };
                    theirs.iter().filter_map(pair).collect()
                });
                over_seeds(&seeds.collect::<Vec<_>>())
            };
            let loss = |own: &BTreeMap<_, (f64, u64)>| {
                let (sum, count) = own.values().fold((0.0, 0), |(s, c), (sum, count)| (s + sum, c + count));
                sum / count as f64
            };
            rows.push(LossRow {
                domain: domain.map(str::to_owned),
                positions: positions.clone(),
                documents: own.iter().flat_map(BTreeMap::keys).collect::<BTreeSet<_>>().len(),
                loss: mean(own.iter().map(loss)),
                differences: others.iter().map(difference).collect(),
            });
        }
    }
    rows
}

/// The mean difference per token and its standard error, from pairs of (difference summed over a document,
/// number of tokens). The mean is a ratio of sums, and the error is the one of a ratio estimator.
fn paired(pairs: &[(f64, f64)]) -> Option<Difference> {
    let (sum, count) = pairs.iter().fold((0.0, 0.0), |(s, c), (difference, n)| (s + difference, c + n));
    if count == 0.0 {
        return None;
    }
    let (mean, documents) = (sum / count, pairs.len() as f64);
    let squares: f64 = pairs.iter().map(|(difference, n)| (difference - mean * n).powi(2)).sum();
    let error = (documents > 1.0).then(|| (squares * documents / (documents - 1.0)).sqrt() / count);
    Some(Difference { mean, error, documents: pairs.len() })
}

/// A seed's differences by (domain, doc_id): the difference summed over the document, and the number of
/// tokens.
type Pairs = BTreeMap<(String, String), (f64, f64)>;

/// The mean of the differences over several seeds. Its error combines the error over documents, some of which
/// several seeds may share, with the error over seeds.
fn over_seeds(seeds: &[Pairs]) -> Option<Difference> {
    let (mut all, count) = (Pairs::new(), seeds.len() as f64);
    for (document, (difference, n)) in seeds.iter().flatten() {
        let of = all.entry(document.clone()).or_default();
        (of.0, of.1) = (of.0 + difference, of.1 + n);
    }
    let values = |pairs: &Pairs| pairs.values().copied().collect::<Vec<_>>();
    let means = seeds.iter().map(|pairs| Some(paired(&values(pairs))?.mean)).collect::<Option<Vec<f64>>>()?;
    let average = mean(means.iter().copied());
    let chance: f64 = means.iter().map(|mean| (mean - average).powi(2)).sum();
    let chance = if count > 1.0 { chance / (count - 1.0) / count } else { 0.0 };
    let pooled = paired(&values(&all))?;
    let error = pooled.error.map(|documents| (documents * documents + chance).sqrt());
    Some(Difference { mean: average, error, ..pooled })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_of_the_same_documents_and_counts_beyond_its_error() {
        // each document is better by a tenth per token, so that the error is 0
        let five = [(-1.0, 10.0), (-2.0, 20.0), (-1.0, 10.0), (-3.0, 30.0), (-1.0, 10.0)];
        let same = paired(&five).unwrap();
        assert!((same.mean + 0.1).abs() < 1e-12 && same.error.unwrap() < 1e-12 && same.counts());
        assert!(!paired(&five[1..]).unwrap().counts(), "four documents are too few");
        // one better, one worse
        let noise = paired(&[(-4.0, 10.0), (3.0, 10.0)]).unwrap();
        assert!((noise.mean + 0.05).abs() < 1e-12 && !noise.counts(), "{noise:?}");
        assert!((noise.error.unwrap() - (2.0 * (3.5f64 * 3.5 * 2.0)).sqrt() / 20.0).abs() < 1e-12);
        let small = paired(&[(-0.01, 10.0); 5]).unwrap();
        assert!(!small.counts());
        assert!(paired(&[]).is_none());
        let alone = paired(&[(-5.0, 10.0)]).unwrap();
        assert!(alone.error.is_none() && !alone.counts() && alone.better().is_none());
    }

    #[test]
    fn what_seeds_do_not_agree_on_is_in_the_error() {
        // documents of ten tokens each, with their names and the difference per token
        let seed = |documents: &[(&str, f64)]| -> Pairs {
            let pair =
                |(name, mean): &(&str, f64)| (("d".to_owned(), (*name).to_owned()), (mean * 10.0, 10.0));
            documents.iter().map(pair).collect()
        };
        let error = |seeds: &[Pairs]| over_seeds(seeds).unwrap().error.unwrap();
        let one = [seed(&[("a", 0.1), ("b", 0.3)])];
        let (mean, alone) = (over_seeds(&one).unwrap().mean, error(&one));
        assert!((mean - 0.2).abs() < 1e-12 && (alone - 0.1).abs() < 1e-12, "{alone}");
        // 0.1 and 0.3: a deviation of √0.02 over two seeds is an error of 0.1
        let flat = [seed(&[("a", 0.1), ("b", 0.1)]), seed(&[("a", 0.3), ("b", 0.3)])];
        assert!((error(&flat) - 0.1).abs() < 1e-12, "{}", error(&flat));
        // the same documents in two seeds add no evidence, other documents do
        let again = [one[0].clone(), one[0].clone()];
        assert!((error(&again) - alone).abs() < 1e-12, "{}", error(&again));
        let others = [one[0].clone(), seed(&[("c", 0.1), ("d", 0.3)])];
        assert!((error(&others) - (0.01f64 / 3.0).sqrt()).abs() < 1e-12, "{}", error(&others));
        let apart = [seed(&[("a", 0.1), ("b", 0.1)]), seed(&[("a", 0.4), ("b", 0.4)])];
        assert!(over_seeds(&[]).is_none() && !over_seeds(&apart).unwrap().counts());
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

//! Checks of the packed dataset, read back from its files alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use arrow::array::{Array, AsArray};
use arrow::datatypes::Int32Type;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use proptest::prelude::*;

use crate::project::{Project, Row, corpus, recipe, tree};

struct Sequence {
    ids: Vec<i32>,
    label: i32,
    /// (domain, doc_id, start, end)
    segments: Vec<(String, String, usize, usize)>,
}

fn read(folder: &Path) -> Vec<Sequence> {
    let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    let mut sequences = vec![];
    for name in names {
        let file = std::fs::File::open(name).unwrap();
        for batch in ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap() {
            let batch = batch.unwrap();
            for row in 0..batch.num_rows() {
                let segments = batch.column(2).as_list::<i32>().value(row);
                let segments = segments.as_struct();
                let text = |i: usize, s: usize| segments.column(i).as_string::<i32>().value(s).to_owned();
                let number =
                    |i: usize, s: usize| segments.column(i).as_primitive::<Int32Type>().value(s) as usize;
                sequences.push(Sequence {
                    ids: batch
                        .column(0)
                        .as_list::<i32>()
                        .value(row)
                        .as_primitive::<Int32Type>()
                        .values()
                        .to_vec(),
                    label: batch.column(1).as_primitive::<Int32Type>().value(row),
                    segments: (0..segments.len())
                        .map(|s| (text(0, s), text(1, s), number(2, s), number(3, s)))
                        .collect(),
                });
            }
        }
    }
    sequences
}

/// The number of ids per domain, without BOS (0, the trained tokenizer's `<s>`).
fn by_domain(sequences: &[Sequence]) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for s in sequences {
        for (domain, _, start, end) in &s.segments {
            *sums.entry(domain.clone()).or_default() +=
                s.ids[*start..*end].iter().filter(|id| **id != 0).count() as u64;
        }
    }
    sums
}

/// A document as other software sees it: its ids are computed by Hugging Face's `tokenizers`, without BOS.
struct Known {
    domain: String,
    text: String,
    ids: Vec<i32>,
}

/// The documents of a corpus by `doc_id`, computed without this project's code, and the tokenizer that the
/// run trained on them.
fn known(project: &Project, rows: &[Row]) -> (BTreeMap<String, Known>, tokenizers::Tokenizer) {
    let file =
        tree(&project.path("out/stages/tokenizer")).into_iter().find(|p| p.ends_with("tokenizer.json"));
    let tokenizer = tokenizers::Tokenizer::from_file(file.unwrap()).unwrap();
    let documents = rows.iter().map(|(domain, text)| {
        let named = [&(domain.len() as u64).to_le_bytes(), domain.as_bytes(), text.as_bytes()].concat();
        let doc_id = blake3::hash(&named).to_hex()[..32].to_owned();
        let ids = tokenizer.encode(text.as_str(), false).unwrap();
        let ids = ids.get_ids().iter().map(|id| *id as i32).collect();
        (doc_id, Known { domain: domain.clone(), text: text.clone(), ids })
    });
    (documents.collect(), tokenizer)
}

impl Known {
    /// Where spans of at most `longest` tokens begin.
    fn begins(&self, longest: usize) -> impl Iterator<Item = usize> {
        (0..self.ids.len()).step_by(longest)
    }

    fn is_whole_span(&self, ids: &[i32], longest: usize) -> bool {
        self.begins(longest).any(|at| self.ids[at..self.ids.len().min(at + longest)] == *ids)
    }
}

/// A span as it was packed. The first span of a document begins with BOS, which is not among the ids.
struct Packed {
    doc_id: String,
    first: bool,
    ids: Vec<i32>,
}

/// The spans that were packed. With `concat`, a span that is cut at the end of a sequence continues at the
/// start of the next.
fn spans(
    sequences: &[Sequence],
    known: &BTreeMap<String, Known>,
    longest: usize,
    concat: bool,
) -> Vec<Packed> {
    let mut spans: Vec<Packed> = vec![];
    for s in sequences {
        for (_, doc_id, start, end) in &s.segments {
            let ids = &s.ids[*start..*end];
            if doc_id.is_empty() {
                assert!(ids.iter().all(|id| *id == 0), "padding");
                continue;
            }
            let goes_on = |open: &&mut Packed| {
                concat
                    && *start == 0
                    && open.doc_id == *doc_id
                    && !known[doc_id].is_whole_span(&open.ids, longest)
            };
            if ids[0] == 0 {
                spans.push(Packed { doc_id: doc_id.clone(), first: true, ids: ids[1..].to_vec() });
            } else if let Some(open) = spans.last_mut().filter(goes_on) {
                open.ids.extend(ids);
            } else {
                spans.push(Packed { doc_id: doc_id.clone(), first: false, ids: ids.to_vec() });
            }
        }
    }
    spans
}

/// Compares a run's packed files with its documents.
fn check(project: &Project, rows: &[Row], run: &Path, sequence: usize, longest: usize, concat: bool) {
    let (known, tokenizer) = known(project, rows);
    let sequences = read(&run.join("data"));
    for pair in sequences.windows(2).filter(|_| concat) {
        assert_eq!(pair[0].label, pair[1].ids[0], "the label is the next id");
    }
    for s in &sequences {
        assert_eq!(s.ids.len(), sequence);
        let mut at = 0;
        for (domain, doc_id, start, end) in &s.segments {
            assert!(*start == at && end > start, "segments tile");
            assert!(doc_id.is_empty() || known[doc_id].domain == *domain);
            at = *end;
        }
        assert_eq!(at, sequence, "segments tile");
    }
    let mut whole = 0;
    let mut copies = BTreeMap::<(String, usize), usize>::new();
    for Packed { doc_id, first, ids } in spans(&sequences, &known, longest, concat) {
        let document = &known[&doc_id];
        if !first && !concat {
            assert!(document.ids.windows(ids.len()).any(|window| window == ids), "the document's own ids");
            continue;
        }
        let begin = document.begins(longest).find(|at| document.ids[*at..].starts_with(&ids));
        let begin = begin.expect("the document's own ids");
        assert_eq!(begin == 0, first, "BOS stands at a document's beginning, and nowhere else");
        *copies.entry((doc_id, begin)).or_default() += 1;
        if ids.len() == document.ids.len() {
            whole += 1;
            let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), document.text);
        }
    }
    assert!(whole > 0, "documents are packed whole");
    assert!(copies.values().all(|copies| *copies <= 4), "max_copies: {copies:?}");
    let verdict = project.say(&["verify", run.to_str().unwrap()]);
    assert_eq!(verdict.code, 0, "{verdict:?}");
}

/// Compares what was drawn and packed with the budget.
fn check_budget(
    project: &Project,
    rows: &[Row],
    run: &Path,
    budget: u64,
    sequence: u64,
    keeps_shares: bool,
    set: &[&str],
) {
    let packed = by_domain(&read(&run.join("data")));
    let drawn = project.sql("select domain, sum(stop - start) as tokens from drawn group by domain", set);
    let drawn: BTreeMap<String, u64> = drawn
        .iter()
        .map(|row| (row["domain"].as_str().unwrap().into(), row["tokens"].as_u64().unwrap()))
        .collect();
    let all: u64 = drawn.values().sum();
    assert!(all <= budget, "{all} of {budget}: {drawn:?}");
    let dropped: u64 =
        drawn.iter().map(|(domain, tokens)| tokens - packed.get(domain).copied().unwrap_or(0)).sum();
    assert!(dropped < sequence, "{dropped} tokens are missing, more than the last sequence's");
    if keeps_shares {
        let (known, _) = known(project, rows);
        let mut tokens = BTreeMap::<&str, u64>::new();
        known.values().for_each(|d| *tokens.entry(&d.domain).or_default() += d.ids.len() as u64);
        let total: u64 = tokens.values().sum();
        for (domain, tokens) in tokens {
            let want = budget as f64 * tokens as f64 / total as f64;
            let reach = want.min(4.0 * tokens as f64);
            assert!(
                (drawn[domain] as f64 - reach).abs() <= 1.0,
                "{domain}: {} instead of {want}",
                drawn[domain]
            );
        }
    }
}

/// Arguments with `--set` before each setting.
fn sets(sets: &[String]) -> Vec<&str> {
    sets.iter().flat_map(|set| ["--set", set.as_str()]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 0, ..ProptestConfig::default() })]
    /// Random corpora, recipes and budgets.
    #[test]
    fn packed_sequences_hold_the_documents_own_ids_and_domains_meet_their_budgets(
        seed in 0..1000u64,
        documents in 60..400usize,
        name in prop::sample::select(vec!["per_source", "cut_128k", "cut_4k", "global", "length_power"]),
        kilo_tokens in 6..60u64,
        sequence in prop::sample::select(vec![64usize, 256, 1000]),
        longest in prop::sample::select(vec![300usize, 2048]),
        holdout in prop::sample::select(vec![0.0, 0.1]),
        partitions in 1..5usize,
        best_fit in any::<bool>(),
    ) {
        let project = Project::empty();
        let rows = corpus(seed, documents);
        project.jsonl("in/a.jsonl", &rows);
        project.conf("in/*", "jsonl", "shortfall = \"allow\"");
        let set = [
            format!("mixture.recipe={}", recipe(name)),
            format!("mixture.budget={kilo_tokens}K"),
            format!("mixture.holdout={holdout}"),
            format!("mixture.max_span={longest}"),
            format!("pack.sequence_tokens={sequence}"),
            format!("pack.mode={}", if best_fit { "best_fit" } else { "concat" }),
            format!("engine.partitions={partitions}"),
        ];
        let set = sets(&set);
        let run = project.run(&set);
        check(&project, &rows, &run, sequence, longest, !best_fit);
        if !best_fit {
            let keeps_shares = holdout == 0.0 && ["per_source", "cut_128k", "cut_4k"].contains(&name);
            check_budget(&project, &rows, &run, kilo_tokens * 1000, sequence as u64, keeps_shares, &set);
        }
    }
}

#[test]
fn held_out_documents_are_packed_by_themselves() {
    let project = Project::new(5);
    let run = project.run(&["--set", "mixture.holdout=0.2"]);
    let ids = |folder: &str| -> BTreeSet<String> {
        read(&run.join(folder))
            .iter()
            .flat_map(|s| s.segments.iter().map(|segment| segment.1.clone()))
            .collect()
    };
    let (train, heldout) = (ids("data"), ids("heldout"));
    assert!(!heldout.is_empty() && train.is_disjoint(&heldout));
    for row in project.sql("select c.domain, sum(c.tokens) as tokens, coalesce(sum(h.tokens), 0) as held from catalog c left join heldout h on c.doc_id = h.doc_id group by c.domain", &["--set", "mixture.holdout=0.2"]) {
        let (tokens, held) = (row["tokens"].as_f64().unwrap(), row["held"].as_f64().unwrap());
        assert!(held > 0.0 && held <= 0.2 * tokens, "{row}");
    }
}

/// The loss by position needs whole documents, or their pieces one after the other.
#[test]
fn held_out_documents_are_packed_alike_in_either_mode() {
    let project = Project::new(5);
    let heldout = |mode: &str| {
        let run = project.run(&["--set", "mixture.holdout=0.2", "--set", &format!("pack.mode={mode}")]);
        let files = crate::project::packed(&run).into_iter();
        files.filter(|(name, _)| name.starts_with("heldout/")).collect::<Vec<_>>()
    };
    assert!(heldout("concat") == heldout("best_fit"));
}

#[test]
fn best_fit_cuts_no_document_that_fits() {
    let project = Project::new(6);
    let run = project.run(&["--set", "pack.mode=best_fit"]);
    let lengths: BTreeMap<String, u64> = project
        .sql("select encode(doc_id, 'hex') as id, tokens from catalog", &[])
        .iter()
        .map(|row| (row["id"].as_str().unwrap().to_owned(), row["tokens"].as_u64().unwrap()))
        .collect();
    let cut = project.sql("select count(*) as n from drawn where stop < tokens", &[]);
    let mut short = 0;
    for s in read(&run.join("data")) {
        for (domain, doc_id, start, end) in &s.segments {
            if doc_id.is_empty() {
                assert!(domain.is_empty() && *end == 256, "padding is at the end");
            } else if lengths[doc_id] < 256 && ((end - start) as u64) < lengths[doc_id] {
                short += 1;
            }
        }
    }
    // only the draw cuts a span: the last one of a stratum, so that the budget is met to the token
    assert!(short <= cut[0]["n"].as_u64().unwrap(), "{short} documents were cut");
}

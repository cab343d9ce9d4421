//! The packed dataset, read back from its files alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use arrow::array::{Array, AsArray};
use arrow::datatypes::Int32Type;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::bench::{Bench, recipe};

struct Sequence {
    ids: Vec<i32>,
    label: i32,
    /// domain, doc_id, start, end
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

/// Ids a domain, without BOS (0, the trained tokenizer's `<s>`).
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

#[test]
fn segments_tile_every_sequence_and_domains_meet_their_budgets() {
    for (seed, name) in [(1, "per_source"), (2, "cut_128k"), (3, "cut_4k"), (4, "length_power")] {
        let bench = Bench::new(seed);
        let set = format!("mixture.recipe={}", recipe(name));
        let run = bench.run(&["--set", &set]);
        let sequences = read(&run.join("data"));
        for pair in sequences.windows(2) {
            assert_eq!(pair[0].label, pair[1].ids[0], "{name}: the label is the next id");
        }
        for s in &sequences {
            assert_eq!(s.ids.len(), 256);
            let ends: Vec<usize> = s.segments.iter().map(|segment| segment.3).collect();
            let starts: Vec<usize> = s.segments.iter().map(|segment| segment.2).collect();
            assert_eq!(starts[0], 0);
            assert_eq!(starts[1..], ends[..ends.len() - 1]);
            assert_eq!(ends[ends.len() - 1], 256);
        }
        let drawn = bench
            .sql("select domain, sum(stop - start) as tokens from drawn group by domain", &["--set", &set]);
        let packed = by_domain(&sequences);
        let mut dropped = 0;
        for row in drawn {
            dropped += row["tokens"].as_u64().unwrap() - packed[row["domain"].as_str().unwrap()];
        }
        assert!(dropped < 256, "{name}: {dropped} tokens are missing, more than the last sequence's");
        let verdict = bench.say(&["verify", run.to_str().unwrap()]);
        assert_eq!(verdict.code, 0, "{verdict:?}");
    }
}

#[test]
fn held_out_documents_are_packed_by_themselves() {
    let bench = Bench::new(5);
    let run = bench.run(&["--set", "mixture.holdout=0.2"]);
    let ids = |folder: &str| -> BTreeSet<String> {
        read(&run.join(folder))
            .iter()
            .flat_map(|s| s.segments.iter().map(|segment| segment.1.clone()))
            .collect()
    };
    let (train, heldout) = (ids("data"), ids("heldout"));
    assert!(!heldout.is_empty() && train.is_disjoint(&heldout));
    for row in bench.sql("select c.domain, sum(c.tokens) as tokens, coalesce(sum(h.tokens), 0) as held from catalog c left join heldout h on c.doc_id = h.doc_id group by c.domain", &["--set", "mixture.holdout=0.2"]) {
        let (tokens, held) = (row["tokens"].as_f64().unwrap(), row["held"].as_f64().unwrap());
        assert!(held > 0.0 && held <= 0.2 * tokens, "{row}");
    }
}

#[test]
fn best_fit_cuts_no_document_that_fits() {
    let bench = Bench::new(6);
    let run = bench.run(&["--set", "pack.mode=best_fit"]);
    let lengths: BTreeMap<String, u64> = bench
        .sql("select encode(doc_id, 'hex') as id, tokens from catalog", &[])
        .iter()
        .map(|row| (row["id"].as_str().unwrap().to_owned(), row["tokens"].as_u64().unwrap()))
        .collect();
    let cut = bench.sql("select count(*) as n from drawn where stop < tokens", &[]);
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
    // only the draw itself cuts: the last span of a stratum, to meet the budget to the token
    assert!(short <= cut[0]["n"].as_u64().unwrap(), "{short} documents were cut");
}

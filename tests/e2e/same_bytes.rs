//! Promise 2: the same documents, conf and commit give the same bytes.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray, StructArray};
use arrow::datatypes::{DataType, Field};

use serde_json::Value;

use crate::project::{Project, Row, corpus, packed, tree};

fn parquet(rows: &[Row]) -> Vec<u8> {
    let sets: ArrayRef = Arc::new(StringArray::from_iter_values(rows.iter().map(|row| &row.0)));
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(rows.iter().map(|row| &row.1)));
    let meta = StructArray::from(vec![(Arc::new(Field::new("set", DataType::Utf8, false)), sets)]);
    let batch = RecordBatch::try_from_iter([("text", texts), ("meta", Arc::new(meta) as _)]).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(vec![], batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

#[test]
fn the_same_documents_in_other_files_give_the_same_bytes() {
    let rows = corpus(1, 240);
    let project = Project::new(1);
    let want = packed(&project.run(&[]));

    // other files, another order, other compression, and a third of the documents duplicated
    let other = Project::empty();
    let mut reversed: Vec<Row> = rows.iter().rev().cloned().collect();
    reversed.rotate_left(31);
    other.jsonl("in/z.jsonl.zst", &reversed[..100]);
    other.jsonl("in/m/y.jsonl.gz", &reversed[100..170]);
    other.jsonl("in/b.json", &reversed[170..]);
    other.jsonl("in/again.NDJSON", &reversed[40..120]);
    other.conf("in", "jsonl", "");
    assert!(packed(&other.run(&[])) == want, "other files");

    let table = Project::empty();
    table.write("in/a.parquet", parquet(&reversed[..50]));
    table.write("in/b.parquet", parquet(&reversed[50..]));
    table.conf("in", "parquet", "");
    assert!(packed(&table.run(&[])) == want, "Parquet");
}

#[test]
fn cores_and_memory_change_no_byte() {
    let project = Project::new(2);
    let want = packed(&project.run(&[]));
    for set in ["engine.partitions=1", "engine.partitions=2", "engine.partitions=7", "engine.memory=64MB"] {
        std::fs::remove_dir_all(project.path("out")).unwrap();
        assert!(packed(&project.run(&["--set", set])) == want, "{set}");
    }
}

#[test]
fn another_seed_gives_other_bytes() {
    let project = Project::new(3);
    assert!(packed(&project.run(&[])) != packed(&project.run(&["--set", "run.seed=8"])));
}

#[test]
fn a_run_is_reproduced_from_its_manifest_and_a_changed_input_is_named() {
    let project = Project::new(4);
    let run = project.run(&[]);
    let run = run.to_str().unwrap();
    std::fs::remove_file(project.path("conf.toml")).unwrap();
    let said = project.say(&["reproduce", run, "--into", "again"]);
    assert!(said.code == 0 && said.out.contains("the same bytes"), "{said:?}");

    project.jsonl("in/a.jsonl", &corpus(5, 240));
    let said = project.say(&["reproduce", run, "--into", "changed"]);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.out.contains("inputs differ") && said.out.contains("in/a.jsonl"), "{said:?}");
}

#[test]
fn a_conf_of_a_commit_is_run_as_it_was() {
    let project = Project::new(6);
    // the recipe has to be in the commit, too
    project.own_recipe();
    project.git(&["init", "-q"]);
    project.commit("conf");
    let want = packed(&project.run(&[]));
    project.change("conf.toml", "seed = 7", "seed = 9");
    assert!(packed(&project.run(&[])) != want);
    assert!(packed(&project.run(&["--at", "HEAD"])) == want);
    let manifest = std::fs::read_to_string(project.run(&["--at", "HEAD"]).join("manifest.json")).unwrap();
    assert!(manifest.contains("\"dirty\": false"));
}

#[test]
fn a_stage_s_rows_change_only_with_its_version() {
    let project = Project::new(1);
    project.run(&[]);
    let mut lines = vec![];
    for path in tree(&project.path("out/stages")).iter().filter(|path| path.ends_with("manifest.json")) {
        let manifest: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for (name, table) in manifest["tables"].as_object().unwrap() {
            let digest = &table["digest"].as_str().unwrap()[..8];
            let stage = manifest["stage"].as_str().unwrap();
            let version = manifest["ingredients"]["version"].as_u64();
            let version =
                version.map_or("as its SQL says".to_owned(), |version| format!("version {version}"));
            lines.push(format!("{stage}, {version}: {name}, {} rows, {digest}", table["rows"]));
        }
    }
    lines.sort();
    // if a digest changed without its stage's VERSION, caches of the old rows would be taken for the new ones
    insta::assert_snapshot!(lines.join("\n"), @r"
    catalog, version 3: catalog, 240 rows, 9c351684
    catalog, version 3: heldout, 10 rows, 93c37e31
    domains, version 1: domains, 3 rows, f57bce48
    domains, version 1: shares, 3 rows, 81c3d1e2
    draw, version 2: drawn, 228 rows, 7f2e189e
    mixture, version 3: mixture, 230 rows, e9236fde
    pack, version 2: heldout, 4 rows, fbc0b097
    pack, version 2: train, 157 rows, ae49cd2b
    shuffle, version 1: ids, 1020 rows, b7cbbfc2
    shuffle, version 1: ids, 40120 rows, f65d0ceb
    shuffle, version 1: plan, 15 rows, 01a4bab8
    shuffle, version 1: plan, 540 rows, ba73433f
    shuffle, version 1: ranges, 1 rows, 96225232
    shuffle, version 1: ranges, 4 rows, 4f1cd7da
    tokenizer, version 1: tokenizer, 1 rows, f7bebc41
    tokens, version 3: documents, 240 rows, 9c351684
    tokens, version 3: rejects, 0 rows, 00000000
    tokens, version 3: tokens, 240 rows, fa8a725d
    ");
}

#[test]
fn what_runs_wrote_is_no_source_of_the_next_one() {
    let project = Project::empty();
    for (i, (_, text)) in corpus(3, 60).into_iter().enumerate() {
        project.write(&format!("data/{i}.txt"), text);
    }
    project.conf("data", "text", "shortfall = \"allow\"");
    let sets = ["--set", "source.0.domain={ const = \"T\" }", "--set", "run.output=data/out"];
    let run = project.run(&sets);
    let again = project.say(&["reproduce", run.to_str().unwrap()]);
    assert_eq!(again.code, 0, "{again:?}");
    assert_eq!(project.run(&sets), run);
    // but if the conf names the folder, it is read
    let own = format!("source.0.url={}/*.md", run.display());
    let named =
        project.say(&["run", "conf.toml", "--json", "--until", "tokens", "--set", &own, "--set", sets[1]]);
    assert!(named.code == 0 && named.out.contains("\"documents\": 1"), "{named:?}");
}

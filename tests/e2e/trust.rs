//! Which files are trusted, and how far: leftovers of killed attempts, published files, manifests, and a run
//! that is reproduced.

use std::path::{Path, PathBuf};

use arrow::array::{Array, ArrayRef, AsArray, Int32Array, ListArray, RecordBatch, StructArray};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};

use crate::project::{Project, corpus, flip, packed, recipe, rewrite, tree};

/// Files of an output whose paths have all of these parts.
fn files(project: &Project, parts: &[&str]) -> Vec<PathBuf> {
    let all = tree(&project.path("out"));
    let has = |path: &PathBuf| parts.iter().all(|part| path.to_string_lossy().contains(part));
    all.into_iter().filter(has).collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Changes a sealed JSON file, and seals it again.
fn reseal(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = json(path);
    value.as_object_mut().unwrap().shift_remove("blake3");
    change(&mut value);
    let text = serde_json::to_string_pretty(&value).unwrap();
    let digest = blake3::hash(text.as_bytes()).to_hex();
    let sealed = format!("{},\n  \"blake3\": \"{digest}\"\n}}", text.strip_suffix("\n}").unwrap());
    std::fs::write(path, sealed).unwrap();
}

#[test]
fn what_a_killed_attempt_left_is_used_only_with_its_digest() {
    let project = Project::new(6);
    let want = packed(&project.run(&[]));
    for (stage, file) in [
        ("shuffle", "ids-"),
        ("pack", "train-00000"),
        ("tokens", "tokens-"),
        ("catalog", "catalog-00000"),
        ("draw", "drawn-00000"),
    ] {
        // as if the run had been killed after the stage's jobs were done, and a bit on the disk had flipped
        // since
        std::fs::remove_dir_all(project.path("out/runs")).unwrap();
        for after in ["shuffle", "pack"] {
            for manifest in files(&project, &["/stages/", &format!("/{after}/"), "/manifest.json"]) {
                std::fs::remove_file(manifest).unwrap();
            }
        }
        for manifest in files(&project, &["/stages/", &format!("/{stage}/"), "/manifest.json"]) {
            std::fs::remove_file(manifest).unwrap();
        }
        if stage == "shuffle" {
            // as if nothing of it had been packed yet
            std::fs::remove_dir_all(project.path("out/stages/pack")).unwrap();
        }
        let mut broken = files(&project, &[&format!("/{stage}/"), &format!("/{file}")]);
        broken.retain(|path| !path.to_string_lossy().contains("/jobs/"));
        assert!(!broken.is_empty(), "{stage}");
        broken.iter().for_each(|path| rewrite(path, |bytes| flip(bytes)));
        let run = project.run(&[]);
        assert!(packed(&run) == want, "{stage}");
        let verdict = project.say(&["verify", run.to_str().unwrap()]);
        assert_eq!(verdict.code, 0, "{stage}: {verdict:?}");
    }
}

#[test]
fn what_is_broken_in_a_run_s_directory_is_mended_by_the_next_run() {
    let project = Project::new(7);
    let run = project.run(&[]);
    let want = packed(&run);
    let harm = || rewrite(&run.join("data/train-00000-of-00004.parquet"), |bytes| flip(bytes));
    for more in [&["--from", "pack"][..], &[]] {
        harm();
        assert!(packed(&run) != want);
        assert!(packed(&project.run(more)) == want, "{more:?}");
        let verdict = project.say(&["verify", run.to_str().unwrap()]);
        assert_eq!(verdict.code, 0, "{more:?}: {verdict:?}");
    }
    // the stage's own file is checked, too, if the run's directory has to be written again
    std::fs::remove_dir_all(&run).unwrap();
    for file in files(&project, &["/pack/", "/train-00000"]) {
        rewrite(&file, |bytes| flip(bytes));
    }
    assert!(packed(&project.run(&[])) == want);
}

#[test]
fn a_manifest_says_what_the_last_run_read_and_attempts_what_it_said_before() {
    let project = Project::new(8);
    project.keep_tokenizer();
    let run = project.run(&[]);
    let before = json(&run.join("manifest.json"));
    // the same documents in another file, a third of them twice
    let rows = corpus(8, 240);
    std::fs::remove_file(project.path("in/a.jsonl")).unwrap();
    project.jsonl("in/b.jsonl", &[rows.as_slice(), &rows[..80]].concat());
    assert_eq!(project.run(&[]), run);
    let after = json(&run.join("manifest.json"));
    let inputs = |manifest: &Value| manifest["inputs"][0]["url"].as_str().unwrap().to_owned();
    assert!(inputs(&before).ends_with("in/a.jsonl") && inputs(&after).ends_with("in/b.jsonl"));
    assert_eq!(after["summary"]["counts"]["rows"], 320);
    let kept = tree(&run.join("attempts"));
    let kept: Vec<Value> =
        kept.iter().filter(|path| path.to_string_lossy().contains("before")).map(|path| json(path)).collect();
    assert_eq!(kept, [before]);
    // a manifest that did not change is not kept a second time
    project.run(&[]);
    let olds = tree(&run.join("attempts"));
    assert_eq!(olds.iter().filter(|path| path.to_string_lossy().contains("before")).count(), 1);
    assert_eq!(project.say(&["verify", run.to_str().unwrap()]).code, 0);
}

#[test]
fn verify_sees_strays_and_what_else_was_changed_in_a_run_s_directory() {
    let project = Project::new(9);
    let run = project.run(&[]);
    let url = run.to_str().unwrap();
    for name in ["README.md", "report.html"] {
        let text = std::fs::read_to_string(run.join(name)).unwrap();
        std::fs::write(run.join(name), text.replace("tokens", "apples")).unwrap();
        let verdict = project.say(&["verify", url]);
        assert!(verdict.code == 5 && verdict.out.contains(name), "{name}: {verdict:?}");
        project.run(&[]);
        assert_eq!(project.say(&["verify", url]).code, 0, "{name}");
    }
    let stray = run.join("data/train-00009-of-00010.parquet");
    std::fs::copy(run.join("data/train-00000-of-00004.parquet"), &stray).unwrap();
    for _ in 0..2 {
        let verdict = project.say(&["verify", url]);
        assert!(verdict.code == 5 && verdict.out.contains("train-00009-of-00010.parquet"), "{verdict:?}");
        assert!(!verdict.out.contains("withdrawn"), "another run does not mend it: {verdict:?}");
    }
    std::fs::remove_file(stray).unwrap();
    // other files in the run's directory are ignored
    std::fs::write(run.join("notes.txt"), "mine").unwrap();
    assert_eq!(project.say(&["verify", url]).code, 0);
}

/// Rewrites a packed file with other segments, and updates the run's manifest to match.
fn repack(
    run: &Path,
    name: &str,
    change: impl Fn(&mut Vec<i32>, &mut Vec<i32>, &StructArray) -> StructArray,
) {
    let path = run.join(name);
    let reader = ParquetRecordBatchReaderBuilder::try_new(std::fs::File::open(&path).unwrap()).unwrap();
    let schema = reader.schema().clone();
    let batches = reader.build().unwrap().map(|batch| {
        let batch = batch.unwrap();
        let source = batch.column(2).as_list::<i32>();
        let segments = source.values().as_struct();
        let number =
            |i: usize| segments.column(i).as_primitive::<arrow::datatypes::Int32Type>().values().to_vec();
        let (mut starts, mut ends) = (number(2), number(3));
        let segments = change(&mut starts, &mut ends, segments);
        let (fields, offsets) = (segments.fields().clone(), source.offsets().clone());
        let mut columns: Vec<ArrayRef> = segments.columns()[..2].to_vec();
        columns.extend([starts, ends].map(|n| std::sync::Arc::new(Int32Array::from(n)) as ArrayRef));
        let segments = StructArray::new(fields, columns, None);
        let arrow::datatypes::DataType::List(item) = source.data_type().clone() else { panic!() };
        let source = ListArray::new(item, offsets, std::sync::Arc::new(segments), None);
        let columns = vec![batch.column(0).clone(), batch.column(1).clone(), std::sync::Arc::new(source)];
        RecordBatch::try_new(schema.clone(), columns).unwrap()
    });
    let batches: Vec<RecordBatch> = batches.collect();
    let mut writer = ArrowWriter::try_new(vec![], schema.clone(), None).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    let bytes = writer.into_inner().unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    reseal(&run.join("manifest.json"), |manifest| {
        let files = manifest["files"].as_array_mut().unwrap();
        let file = files.iter_mut().find(|file| file["name"] == name).unwrap();
        file["bytes"] = json!(bytes.len());
        file["blake3"] = json!(blake3::hash(&bytes).to_hex().as_str());
    });
}

#[test]
fn verify_asks_packed_files_whether_they_are_what_the_recipe_asked_for() {
    let project = Project::new(9);
    let run = project.run(&[]);
    let url = run.to_str().unwrap().to_owned();
    let want = packed(&run);

    repack(&run, "heldout/heldout-00000-of-00001.parquet", |starts, _, segments| {
        starts[1] += 1;
        segments.clone()
    });
    let verdict = project.say(&["verify", &url]);
    assert!(verdict.code == 5 && verdict.out.contains("do not tile"), "{verdict:?}");
    assert!(packed(&project.run(&[])) == want);

    // attributes a whole sequence to one document, which was never drawn so often
    repack(&run, "data/train-00000-of-00004.parquet", |_, _, segments| {
        let ids = segments.column(1).as_string::<i32>();
        let first: ArrayRef = std::sync::Arc::new(arrow::array::StringArray::from_iter_values(
            (0..ids.len()).map(|_| ids.value(0)),
        ));
        StructArray::new(
            segments.fields().clone(),
            vec![segments.column(0).clone(), first, segments.column(2).clone(), segments.column(3).clone()],
            None,
        )
    });
    let verdict = project.say(&["verify", &url]);
    assert!(verdict.code == 5 && verdict.out.contains("were drawn of it"), "{verdict:?}");
    assert!(packed(&project.run(&[])) == want);
    assert_eq!(project.say(&["verify", &url]).code, 0);
}

#[test]
fn a_run_is_reproduced_anew_each_time_and_compared_as_it_lies_there() {
    let project = Project::new(4);
    let run = project.run(&[]);
    let url = run.to_str().unwrap();
    let reproduce = || project.say(&["reproduce", url, "--into", "again"]);
    let said = reproduce();
    assert!(said.code == 0 && said.out.contains("the same bytes"), "{said:?}");
    let name = "data/train-00000-of-00004.parquet";
    let again = tree(&project.path("again/runs"));
    let twin = again.iter().find(|path| path.ends_with(name)).unwrap();
    let sound = std::fs::read(run.join(name)).unwrap();

    // breaks both copies alike; they are links to files of stages
    for path in [&run.join(name), twin] {
        rewrite(path, |bytes| flip(bytes));
    }
    let said = reproduce();
    assert!(said.code == 5 && said.out.contains(name), "{said:?}");
    assert!(std::fs::read(twin).unwrap() == sound, "it was computed again");
    std::fs::write(run.join(name), &sound).unwrap();
    let said = reproduce();
    assert!(said.code == 0 && said.out.contains("the same bytes"), "{said:?}");

    // nor is a run compared with itself, by any name of its output
    std::os::unix::fs::symlink("out", project.path("link")).unwrap();
    for into in ["out", "link", "link/runs", &format!("{url}/data")] {
        let said = project.say(&["reproduce", url, "--into", into]);
        assert!(said.code == 2 && said.err.contains("the output that the run itself is in"), "{said:?}");
    }

    // the same rows from another library are the same run, and the differences of the build are reported
    reseal(&run.join("manifest.json"), |manifest| {
        manifest["build"]["libraries"]["parquet"] = json!("1.2.3");
        manifest["build"]["sources"] = json!("0");
    });
    let said = reproduce();
    assert_eq!(said.code, 0, "{said:?}");
    assert!(
        said.out.contains("parquet: 1.2.3 then") && said.out.contains("lengthwise's sources"),
        "{said:?}"
    );
}

#[test]
fn keys_of_ids_name_the_encoder_that_made_them() {
    let project = Project::new(3);
    project.run(&[]);
    for stage in ["tokens", "pack", "tokenizer"] {
        let manifests = files(&project, &["/stages/", &format!("/{stage}/"), "/manifest.json"]);
        let ingredients = json(&manifests[0])["ingredients"].to_string();
        assert!(
            ingredients.contains("tokenizers 0.") && ingredients.contains("onig"),
            "{stage}: {ingredients}"
        );
    }
}

#[test]
fn a_text_that_is_held_out_in_one_domain_is_drawn_in_no_other() {
    let project = Project::empty();
    let mut rows = vec![];
    for (i, (domain, text)) in corpus(5, 120).into_iter().enumerate() {
        rows.push((domain, text.clone()));
        // every text also occurs in another domain
        rows.push((["copies", "more"][i % 2].to_owned(), text));
    }
    project.jsonl("in/a.jsonl", &rows);
    project.conf("in/*", "jsonl", "");
    let sets = ["--set", "mixture.holdout=0.3"];
    project.run(&sets);
    let one = |sql: &str| project.sql(sql, &sets)[0]["n"].as_u64().unwrap();
    let texts = "(select catalog.text_id from catalog inner join heldout on catalog.doc_id = heldout.doc_id)";
    let drawn = format!(
        "select count(*) as n from drawn inner join catalog on drawn.doc_id = catalog.doc_id
         where catalog.text_id in {texts}"
    );
    assert_eq!(one(&drawn), 0);
    // both documents of a text are held out
    let (documents, texts) = (
        one("select count(*) as n from heldout"),
        one(&format!("select count(distinct text_id) as n from {texts}")),
    );
    assert!(texts > 10 && documents == 2 * texts, "{documents} {texts}");
    let beyond = "select count(*) as n from (
        select catalog.domain, sum(catalog.tokens) as all_tokens, sum(heldout.tokens) as heldout_tokens
        from catalog left join heldout on catalog.doc_id = heldout.doc_id group by catalog.domain
    ) where heldout_tokens > 0.3 * all_tokens";
    assert_eq!(one(beyond), 0);
}

#[test]
fn a_preview_s_figures_are_the_draw_s_where_copies_are_bounded() {
    let project = Project::empty();
    project.jsonl("in/a.jsonl", &corpus(11, 3000));
    project.conf("in/*", "jsonl", "");
    let recipe = format!("mixture.recipe={}", recipe("length_power"));
    let sets = [
        "--set",
        &recipe,
        "--set",
        "mixture.params.exponent=2.0",
        "--set",
        "mixture.max_span=131072",
        "--set",
        "mixture.budget=1M",
    ];
    let said = project.say(&[&["preview", "conf.toml", "--json"][..], &sets].concat());
    assert_eq!(said.code, 0, "{}", said.err);
    let preview: Value = serde_json::from_str(&said.out).unwrap();
    let domains = preview["domains"].as_array().unwrap();
    let total: u64 = domains.iter().map(|domain| domain["drawn"].as_u64().unwrap()).sum();
    assert_eq!(total, 1_000_000);
    project.run(&sets);
    let query =
        "select domain, sum(stop - start) as drawn, sum(stop - start) filter (where tokens > 512) as long,
        max(copy) as copy from drawn group by domain";
    let mut bounded = 0;
    for row in project.sql(query, &sets) {
        let domain = domains.iter().find(|domain| domain["domain"] == row["domain"]).unwrap();
        let drawn = domain["drawn"].as_f64().unwrap();
        assert!((drawn - row["drawn"].as_f64().unwrap()).abs() <= 1.0, "{row} {domain}");
        let long = domain["long_after"].as_f64().unwrap() * drawn;
        // which documents are drawn is random, so that some difference remains
        assert!((long - row["long"].as_f64().unwrap_or(0.0)).abs() <= 0.03 * drawn, "{long} {row}");
        bounded += u64::from(row["copy"] == 3);
    }
    assert!(bounded > 0, "no span reached max_copies");
}

#[test]
fn a_domain_that_the_conf_s_shares_leave_out_is_said() {
    let project = Project::new(2);
    let sets = ["--set", "mixture.shares={ book = 1, code = 1 }", "--set", "mixture.budget=10K"];
    let said = project.say(&[&["preview", "conf.toml"][..], &sets].concat());
    assert!(said.code == 0 && said.out.contains("gives no share to web"), "{said:?}");
    let said = project.say(&[&["run", "conf.toml", "--until", "mixture"][..], &sets].concat());
    assert!(said.code == 0 && said.err.contains("gives no share to web"), "{said:?}");
    // a share of 0 is deliberate
    let sets = ["--set", "mixture.shares={ book = 1, code = 1, web = 0 }", "--set", "mixture.budget=10K"];
    let said = project.say(&[&["preview", "conf.toml"][..], &sets].concat());
    assert!(said.code == 0 && !said.out.contains("gives no share"), "{said:?}");
}

#[test]
fn until_shuffle_ends_before_anything_is_packed() {
    let project = Project::new(2);
    let said = project.say(&["run", "conf.toml", "--until", "shuffle", "--json"]);
    assert_eq!(said.code, 0, "{said:?}");
    let value: Value = serde_json::from_str(&said.out).unwrap();
    let stages = value["stages"].as_array().unwrap().iter();
    let stages: Vec<&str> = stages.map(|stage| stage["stage"].as_str().unwrap()).collect();
    assert_eq!(stages.last(), Some(&"shuffle"), "{stages:?}");
    assert!(!project.path("out/stages/pack").exists());
}

#[test]
fn seven_hundred_domains_are_an_ordinary_corpus() {
    let project = Project::empty();
    let rows: Vec<_> = corpus(1, 1400)
        .into_iter()
        .enumerate()
        .map(|(i, (_, text))| (format!("host-{:03}.org", i % 700), text))
        .collect();
    project.jsonl("in/a.jsonl", &rows);
    project.conf("in/*", "jsonl", "shortfall = \"allow\"");
    let run = project.run(&["--set", "mixture.holdout=0"]);
    let report = std::fs::read_to_string(run.join("report.html")).unwrap();
    assert!(report.len() < 2_000_000, "{}", report.len());
    assert!(report.contains("(all others)"));
    let card = std::fs::read_to_string(run.join("README.md")).unwrap();
    assert!(card.contains("| 600 others |"), "{card}");
    assert_eq!(project.say(&["verify", run.to_str().unwrap()]).code, 0);
}

#[test]
fn a_check_that_asks_for_a_number_is_asked_again_with_another_one() {
    let project = Project::new(2);
    project.write("sql/checks/catalog_has_enough.sql", "select doc_id from catalog where $budget < 30000\n");
    assert_eq!(project.say(&["run", "conf.toml", "--until", "catalog"]).code, 0);
    let said = project.say(&["run", "conf.toml", "--until", "catalog", "--set", "mixture.budget=20K"]);
    assert!(said.code == 3 && said.err.contains("catalog_has_enough.sql found rows"), "{said:?}");
}

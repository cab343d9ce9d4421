//! Promise 1: what is there is found, and nothing is computed twice.

use serde_json::Value;

use crate::bench::{Bench, corpus, packed, recipe, tree};

/// Which stages a run computed.
fn computed(bench: &Bench, more: &[&str]) -> Vec<String> {
    let mut arguments = vec!["run", "conf.toml", "--json"];
    arguments.extend(more);
    let said = bench.say(&arguments);
    assert_eq!(said.code, 0, "{}", said.err);
    let value: Value = serde_json::from_str(&said.out).unwrap();
    let stages = value["stages"].as_array().unwrap().iter().filter(|stage| stage["cached"] == false);
    stages.map(|stage| stage["stage"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn an_unchanged_run_computes_nothing_and_another_recipe_does_not_tokenise() {
    let bench = Bench::new(1);
    let first = computed(&bench, &[]);
    assert!(first.contains(&"tokens".to_owned()) && first.contains(&"pack".to_owned()), "{first:?}");
    assert!(computed(&bench, &[]).is_empty());
    let global = format!("mixture.recipe={}", recipe("global"));
    let again = computed(&bench, &["--set", &global]);
    assert!(again.starts_with(&["mixture".to_owned(), "draw".to_owned()]), "{again:?}");

    let said = bench.say(&["plan", "conf.toml", "--set", "mixture.budget=30K"]);
    assert!(said.out.contains("catalog    cached"), "{}", said.out);
    assert!(said.out.contains("mixture    to compute     changed: parameters"), "{}", said.out);
}

#[test]
fn a_new_source_file_tokenises_only_itself() {
    let bench = Bench::new(1);
    // each of these files is a unit of its own: large ones are
    let big: Vec<_> = corpus(9, 60).into_iter().map(|(domain, text)| (domain, text.repeat(120))).collect();
    for name in ["in/b.jsonl", "in/c.jsonl"] {
        bench.jsonl(name, &big.iter().map(|(d, t)| (d.clone(), format!("{name}{t}"))).collect::<Vec<_>>());
        assert!(std::fs::metadata(bench.path(name)).unwrap().len() > 4 << 20);
    }
    bench.run(&["--until", "tokens"]);
    let parts = || {
        tree(&bench.path("out/stages/tokens"))
            .into_iter()
            .filter(|p| p.to_string_lossy().contains("/jobs/"))
            .count()
    };
    let before = parts();
    bench.keep_tokenizer();
    bench.jsonl("in/d.jsonl", &big);
    bench.run(&["--until", "tokens"]);
    assert_eq!(parts(), before + 1);
}

#[test]
fn from_a_stage_on_everything_is_computed_again_and_compared() {
    let bench = Bench::new(2);
    bench.run(&[]);
    let again = computed(&bench, &["--from", "domains"]);
    for stage in ["domains", "mixture", "draw", "shuffle", "pack"] {
        assert!(again.contains(&stage.to_owned()), "{again:?}");
    }
    assert!(!again.contains(&"tokens".to_owned()));
    let said = bench.say(&["run", "conf.toml", "--until", "domains"]);
    assert_eq!((said.code, said.out.trim()), (0, ""));
}

#[test]
fn a_preview_shows_what_the_run_then_draws() {
    let bench = Bench::new(3);
    let said = bench.say(&["preview", "conf.toml", "--json"]);
    assert_eq!(said.code, 0, "{}", said.err);
    let preview: Value = serde_json::from_str(&said.out).unwrap();
    bench.run(&[]);
    for domain in preview["domains"].as_array().unwrap() {
        let name = domain["domain"].as_str().unwrap();
        let drawn =
            bench.sql(&format!("select sum(stop - start) as drawn from drawn where domain = '{name}'"), &[]);
        let (expected, drawn) = (domain["drawn"].as_f64().unwrap(), drawn[0]["drawn"].as_f64().unwrap());
        assert!((expected - drawn).abs() <= 2.0, "{name}: {expected} {drawn}");
    }
}

#[test]
fn another_seed_is_another_sample_to_train_the_tokenizer_on() {
    let sets = ["--set", "tokenizer.train.sample=20KB", "--set", "run.seed=2"];
    let bench = Bench::new(1);
    bench.run(&sets[..2]);
    let after = packed(&bench.run(&sets));
    let fresh = Bench::new(1);
    assert!(packed(&fresh.run(&sets)) == after);
}

#[test]
fn a_new_check_is_applied_to_what_is_there() {
    let bench = Bench::new(1);
    bench.run(&[]);
    bench.write("sql/checks/catalog_is_empty.sql", "select doc_id from catalog\n");
    let said = bench.say(&["run", "conf.toml"]);
    assert!(said.code == 3 && said.err.contains("catalog_is_empty.sql found rows"), "{said:?}");
    assert!(bench.say(&["plan", "conf.toml"]).out.contains("checks"));
}

#[test]
fn an_output_folder_may_have_any_name_and_lie_in_the_source_folder() {
    let bench = Bench::new(1);
    let want = packed(&bench.run(&[]));
    for name in ["out%20x", "out#1", "out?q", "in/out"] {
        let set = format!("run.output='{name}'");
        for _ in 0..2 {
            assert!(packed(&bench.run(&["--set", &set, "--set", "source.0.url=in"])) == want, "{name}");
        }
    }
}

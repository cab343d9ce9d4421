//! Promise 1: existing outputs are found, and nothing is computed twice.

use serde_json::Value;

use crate::project::{Project, corpus, packed, recipe, tree};

/// The stages that a run computed.
fn computed(project: &Project, more: &[&str]) -> Vec<String> {
    let mut arguments = vec!["run", "conf.toml", "--json"];
    arguments.extend(more);
    let said = project.say(&arguments);
    assert_eq!(said.code, 0, "{}", said.err);
    let value: Value = serde_json::from_str(&said.out).unwrap();
    let stages = value["stages"].as_array().unwrap().iter().filter(|stage| stage["cached"] == false);
    stages.map(|stage| stage["stage"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn an_unchanged_run_computes_nothing_and_another_recipe_does_not_tokenise() {
    let project = Project::new(1);
    let first = computed(&project, &[]);
    assert!(first.contains(&"tokens".to_owned()) && first.contains(&"pack".to_owned()), "{first:?}");
    assert!(computed(&project, &[]).is_empty());
    let global = format!("mixture.recipe={}", recipe("global"));
    let again = computed(&project, &["--set", &global]);
    assert!(again.starts_with(&["mixture".to_owned(), "draw".to_owned()]), "{again:?}");

    let said = project.say(&["plan", "conf.toml", "--set", "mixture.budget=30K"]);
    assert!(said.out.contains("catalog    cached"), "{}", said.out);
    assert!(said.out.contains("mixture    to compute     changed: parameters"), "{}", said.out);
}

#[test]
fn a_new_source_file_tokenises_only_itself() {
    let project = Project::new(1);
    // each of these files is large enough to be a unit of its own
    let big: Vec<_> = corpus(9, 60).into_iter().map(|(domain, text)| (domain, text.repeat(120))).collect();
    for name in ["in/b.jsonl", "in/c.jsonl"] {
        project.jsonl(name, &big.iter().map(|(d, t)| (d.clone(), format!("{name}{t}"))).collect::<Vec<_>>());
        assert!(std::fs::metadata(project.path(name)).unwrap().len() > 4 << 20);
    }
    project.run(&["--until", "tokens"]);
    let parts = || {
        tree(&project.path("out/stages/tokens"))
            .into_iter()
            .filter(|p| p.to_string_lossy().contains("/jobs/"))
            .count()
    };
    let before = parts();
    project.keep_tokenizer();
    project.jsonl("in/d.jsonl", &big);
    project.run(&["--until", "tokens"]);
    assert_eq!(parts(), before + 1);
}

#[test]
fn from_a_stage_on_everything_is_computed_again_and_compared() {
    let project = Project::new(2);
    project.run(&[]);
    let again = computed(&project, &["--from", "domains"]);
    for stage in ["domains", "mixture", "draw", "shuffle", "pack"] {
        assert!(again.contains(&stage.to_owned()), "{again:?}");
    }
    assert!(!again.contains(&"tokens".to_owned()));
    let said = project.say(&["run", "conf.toml", "--until", "domains"]);
    assert_eq!((said.code, said.out.trim()), (0, ""));
}

#[test]
fn a_preview_shows_what_the_run_then_draws() {
    let project = Project::new(3);
    let said = project.say(&["preview", "conf.toml", "--json"]);
    assert_eq!(said.code, 0, "{}", said.err);
    let preview: Value = serde_json::from_str(&said.out).unwrap();
    project.run(&[]);
    for domain in preview["domains"].as_array().unwrap() {
        let name = domain["domain"].as_str().unwrap();
        let drawn = project
            .sql(&format!("select sum(stop - start) as drawn from drawn where domain = '{name}'"), &[]);
        let (expected, drawn) = (domain["drawn"].as_f64().unwrap(), drawn[0]["drawn"].as_f64().unwrap());
        assert!((expected - drawn).abs() <= 2.0, "{name}: {expected} {drawn}");
    }
}

#[test]
fn another_seed_is_another_sample_to_train_the_tokenizer_on() {
    let sets = ["--set", "tokenizer.train.sample=20KB", "--set", "run.seed=2"];
    let project = Project::new(1);
    project.run(&sets[..2]);
    let after = packed(&project.run(&sets));
    let fresh = Project::new(1);
    assert!(packed(&fresh.run(&sets)) == after);
}

#[test]
fn a_new_check_is_applied_to_what_is_there() {
    let project = Project::new(1);
    project.run(&[]);
    project.write("sql/checks/catalog_is_empty.sql", "select doc_id from catalog\n");
    let said = project.say(&["run", "conf.toml"]);
    assert!(said.code == 3 && said.err.contains("catalog_is_empty.sql found rows"), "{said:?}");
    assert!(project.say(&["plan", "conf.toml"]).out.contains("checks"));
}

#[test]
fn an_own_check_adds_to_the_built_in_ones_and_one_that_would_never_run_is_refused() {
    let project = Project::new(1);
    project.own_recipe();
    project.write("sql/checks/mixture_is_mine.sql", "select doc_id from mixture where copies < 0\n");
    project.write("sql/checks/.mixture_is_mine.sql.swp.sql", "not SQL");
    project.write("sql/checks/README.md", "not SQL");
    project.git(&["init", "-q"]);
    project.commit("a check");
    let checks = |run: &std::path::Path| -> Vec<String> {
        let manifest: Value =
            serde_json::from_slice(&std::fs::read(run.join("manifest.json")).unwrap()).unwrap();
        let files = manifest["sql"].as_object().unwrap().keys();
        files.filter_map(|file| Some(file.strip_prefix("sql/checks/")?.to_owned())).collect()
    };
    let all = [
        "catalog_has_each_document_once.sql",
        "domains_add_up_to_the_documents.sql",
        "domains_have_shares_that_sum_to_one.sql",
        "draw_respects_max_copies.sql",
        "mixture_has_spans_inside_their_documents.sql",
        "mixture_is_mine.sql",
    ];
    assert_eq!(checks(&project.run(&[])), all);
    // a check of the same name replaces the built-in one
    let own = "select doc_id from mixture where stop > 5\n";
    project.write("sql/checks/mixture_has_spans_inside_their_documents.sql", own);
    let said = project.say(&["run", "conf.toml"]);
    assert!(said.code == 3 && said.err.contains("spans_inside_their_documents.sql found rows"), "{said:?}");
    let run = project.run(&["--at", "HEAD"]);
    assert_eq!(checks(&run), all);
    for file in ["draw_is_mine.SQL", "mine/draw_is_mine.sql"] {
        project.write(&format!("sql/checks/{file}"), "select 1 where false");
        let said = project.say(&["run", "conf.toml"]);
        assert!(said.code == 2 && said.err.contains("no check that would ever run"), "{said:?}");
        let _ = std::fs::remove_dir_all(project.path("sql/checks/mine"));
        let _ = std::fs::remove_file(project.path("sql/checks/draw_is_mine.SQL"));
    }
    for file in ["pack_is_empty.sql", "tokens_are_few.sql", "mixtures_are_mine.sql", "mixture.sql"] {
        project.write(&format!("sql/checks/{file}"), "select 1 where false");
        for command in [&["run", "conf.toml"][..], &["plan", "conf.toml"]] {
            let said = project.say(command);
            let cure = "checks run after catalog, domains, mixture, draw";
            assert!(said.code == 2 && said.err.contains(file) && said.err.contains(cure), "{said:?}");
        }
        assert_eq!(project.say(&["run", "conf.toml", "--at", "HEAD"]).code, 0);
        std::fs::remove_file(project.path(&format!("sql/checks/{file}"))).unwrap();
    }
    // a run is reproduced with its own checks, whatever the folder has
    project.write("sql/checks/pack_is_empty.sql", "select 1");
    let said = project.say(&["reproduce", run.to_str().unwrap()]);
    assert_eq!(said.code, 0, "{said:?}");
}

#[test]
fn recipes_and_checks_that_print_alike_are_not_taken_for_each_other() {
    let project = Project::new(1);
    let recipe = |quotes: &str| {
        format!(
            "-- Mine.\nselect doc_id, 0 as start, tokens as stop, 1.0 as copies,\n    \
             'it{quotes}s' as stratum from documents\n"
        )
    };
    let sets = [
        "--set",
        "mixture.recipe=mine.sql",
        "--set",
        "mixture.shortfall=allow",
        "--set",
        "mixture.budget=50M",
    ];
    let ask = "select distinct stratum from mixture";
    for (quotes, stratum) in [("''", "it's"), ("''''", "it''s")] {
        project.write("mine.sql", recipe(quotes));
        assert_eq!(project.say(&[&["run", "conf.toml", "--until", "mixture"][..], &sets].concat()).code, 0);
        let said = project.say(&[&["sql", "conf.toml", ask, "--json"][..], &sets].concat());
        assert_eq!(said.out.trim(), format!(r#"{{"stratum":"{stratum}"}}"#), "{said:?}");
    }
    let run = [&["run", "conf.toml", "--until", "mixture"][..], &sets].concat();
    project.write("sql/checks/mixture_own.sql", "select doc_id from mixture where stratum = 'it''s'\n");
    assert_eq!(project.say(&run).code, 0);
    project.write("sql/checks/mixture_own.sql", "select doc_id from mixture where stratum = 'it''''s'\n");
    let said = project.say(&run);
    assert!(said.code == 3 && said.err.contains("mixture_own.sql found rows"), "{said:?}");
    project.write(
        "sql/checks/mixture_own.sql",
        "select doc_id from mixture where tokens * 9000000000000000000 < 0\n",
    );
    let said = project.say(&run);
    assert!(said.code == 3 && said.err.contains("is beyond bigint"), "{said:?}");
}

#[test]
fn an_output_folder_may_have_any_name_and_lie_in_the_source_folder() {
    let project = Project::new(1);
    let want = packed(&project.run(&[]));
    for name in ["out%20x", "out#1", "out?q", "in/out"] {
        let set = format!("run.output='{name}'");
        for _ in 0..2 {
            assert!(packed(&project.run(&["--set", &set, "--set", "source.0.url=in"])) == want, "{name}");
        }
    }
}

//! Bad input: a row is recorded with file, line and reason, or the source is refused with a clear message.

use crate::project::{Project, Row, corpus, packed, recipe, said};

#[test]
fn every_bad_row_is_kept_with_file_line_and_reason() {
    let project = Project::new(1);
    let long = format!(r#"{{"text": "{}", "meta": {{"set": "web"}}}}"#, "x ".repeat(600));
    let lines: Vec<Vec<u8>> = [
        r#"{"text": "good", "meta": {"set": "web"}}"#,
        "not json",
        "[1, 2]",
        r#"{"meta": {"set": "web"}}"#,
        r#"{"text": 7, "meta": {"set": "web"}}"#,
        "",
        r#"{"text": "", "meta": {"set": "web"}}"#,
        r#"{"text": "no domain"}"#,
        r#"{"text": "domain 3", "meta": {"set": 3}}"#,
        r#"{"text": "empty domain", "meta": {"set": ""}}"#,
        &long,
        "\u{fffd}",
    ]
    .iter()
    .map(|line| {
        if *line == "\u{fffd}" {
            b"{\"text\": \"\xff\", \"meta\": {\"set\": \"web\"}}".to_vec()
        } else {
            line.as_bytes().to_vec()
        }
    })
    .collect();
    project.write("in/bad.jsonl", lines.join(&b'\n'));
    let said = project.say(&[
        "run",
        "conf.toml",
        "--until",
        "tokens",
        "--set",
        "source.0.max_document_bytes=1000KB",
    ]);
    assert_eq!(said.code, 3, "{said:?}");
    assert!(said.err.contains("more than") && said.err.contains("max_reject_share = 0.001"), "{}", said.err);
    assert!(said.err.contains("bad.jsonl line 2: not_json"), "{}", said.err);

    let sets = ["--set", "source.0.max_document_bytes=1KB", "--set", "source.0.max_reject_share=1"];
    let mut arguments = vec!["run", "conf.toml", "--until", "tokens"];
    arguments.extend(sets);
    assert_eq!(project.say(&arguments).code, 0);
    let mut arguments = vec![
        "sql",
        "conf.toml",
        "-- a comment first, as files have it\nselect file, line, reason from rejects where file like '%bad%' order by line",
        "--json",
    ];
    arguments.extend(sets);
    let said = project.say(&arguments);
    let found: Vec<(u64, String)> = said
        .out
        .lines()
        .map(|line| {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            assert!(row["file"].as_str().unwrap().ends_with("in/bad.jsonl"));
            (row["line"].as_u64().unwrap(), row["reason"].as_str().unwrap().to_owned())
        })
        .collect();
    let want = [
        (2, "not_json"),
        (3, "not_an_object"),
        (4, "no_text"),
        (5, "text_not_a_string"),
        (8, "no_domain"),
        (9, "domain_not_a_string"),
        (10, "bad_domain"),
        (11, "too_long"),
        (12, "not_utf8"),
    ];
    assert_eq!(found, want.map(|(line, reason)| (line, reason.to_owned())));
}

#[test]
fn an_empty_text_is_no_document_and_no_reject() {
    let project = Project::empty();
    for (i, (_, text)) in corpus(3, 60).into_iter().enumerate() {
        project.write(&format!("in/{i}.py"), text);
    }
    project.write("in/a/__init__.py", "");
    project.write("in/b/__init__.py", "\u{feff}");
    project.conf("in", "text", "shortfall = \"allow\"");
    project.change("conf.toml", "domain = \"meta.set\"", "domain = { const = \"T\" }");
    let said = project.say(&["run", "conf.toml", "--json"]);
    assert!(
        said.code == 0 && said.out.contains("\"empty\": 2") && said.out.contains("\"documents\": 60"),
        "{said:?}"
    );
    assert!(said.err.contains("2 of 62 rows have an empty text, and are no documents"), "{}", said.err);
    assert_eq!(project.sql("select count(*) as n from rejects", &[])[0]["n"], 0);
    let run = project.run(&[]);
    let said = project.say(&["verify", run.to_str().unwrap()]);
    assert_eq!(said.code, 0, "{said:?}");

    let project = Project::new(1);
    project.write("in/b.jsonl", "{\"text\": \"\"}\n".repeat(100));
    let said = project.say(&["run", "conf.toml", "--until", "tokens", "--json"]);
    assert!(said.code == 0 && said.out.contains("\"empty\": 100"), "{said:?}");
}

#[test]
fn what_looks_like_data_and_is_not_read_is_said_and_counted_in_the_manifest() {
    let project = Project::new(1);
    let want = packed(&project.run(&[]));
    for name in ["b.jsonl.xz", "c.csv", "d.JSONL.bz2", "README.md", "_SUCCESS"] {
        project.write(&format!("in/{name}"), "x");
    }
    std::os::unix::fs::symlink(".", project.path("in/itself")).unwrap();
    for url in ["in", "in/*"] {
        let said =
            project.say(&["run", "conf.toml", "--set", &format!("source.0.url={url}"), "--from", "tokens"]);
        assert_eq!(said.code, 0, "{said:?}");
        assert!(said.err.contains("source in: 4 files are not read"), "{}", said.err);
        let run = std::path::PathBuf::from(said.out.lines().last().unwrap());
        assert!(packed(&run) == want, "{url}");
    }
    // a run is found by its outputs, and reports its sources as they were when these were computed
    std::fs::remove_dir_all(project.path("out/runs")).unwrap();
    let run = project.run(&[]);
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(run.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["summary"]["counts"]["files_not_read"], 4);
    let not_read = &manifest["not_read"]["in"];
    let whys: Vec<_> = not_read.as_array().unwrap().iter().map(|of| (&of["why"], &of["files"])).collect();
    assert_eq!(
        serde_json::json!(whys),
        serde_json::json!([["other_format", 1], ["compressed", 2], ["loop", 1]])
    );
    assert!(not_read[0]["first"][0].as_str().unwrap().ends_with("in/c.csv"));

    // a file that another source of the conf reads counts as read
    project.jsonl("in/c.csv", &corpus(2, 20));
    let text = std::fs::read_to_string(project.path("conf.toml")).unwrap();
    let second = "[[source]]\nname = \"csv\"\nurl = \"in/*.csv\"\nformat = \"jsonl\"\ndomain = \"meta.set\"\n[tokenizer]";
    project.write("conf.toml", text.replace("[tokenizer]", second));
    let said = project.say(&["run", "conf.toml", "--until", "tokens"]);
    assert!(said.code == 0 && said.err.contains("source in: 3 files are not read"), "{said:?}");
}

#[test]
fn a_json_file_that_is_no_object_a_line_is_refused_with_the_cure() {
    let project = Project::new(1);
    project.write("in/b.json", "[\n  {\"text\": \"a\", \"meta\": {\"set\": \"web\"}}\n]\n");
    let said = project.say(&["run", "conf.toml", "--until", "tokens"]);
    assert!(said.code == 3 && said.err.contains("b.json` is JSON, but not an object a line"), "{said:?}");
    assert!(said.err.contains("jq -c '.[]' FILE"), "{said:?}");
}

#[test]
fn a_wrong_conf_recipe_or_budget_ends_with_its_code_and_the_cure() {
    let project = Project::new(2);
    let long_row: Vec<Row> = corpus(1, 3);
    project.jsonl("in/more.jsonl", &long_row);
    project.write("bad.sql", "select doc_id, 0 as start, tokens as stop, random() as copies from documents");
    project.write("two.sql", "select 1; drop table documents");
    project.write(
        "wide.sql",
        "select doc_id, cast(0 as bigint) as start, tokens + 5 as stop, 1.0 as copies from documents",
    );
    project.write(
        "none.sql",
        "select doc_id, cast(0 as bigint) as start, tokens as stop, 1.0 as copies from documents where domain = 'x'",
    );
    let upsample = format!("mixture.recipe={}", recipe("upsample_domain"));
    let poem =
        ["--set", &upsample, "--set", "mixture.params.domain=poem", "--set", "mixture.shortfall=allow"];
    let upsampled = poem.to_vec();
    for (arguments, code, message) in [
        (vec!["--set", "pack.sequence_token=7"], 2, "sequence_tokens"),
        (vec!["--set", "mixture.budget=five"], 2, "budget"),
        (vec!["--set", "mixture.recipe=nowhere.sql"], 2, "nowhere.sql"),
        (vec!["--set", "mixture.recipe=bad.sql"], 2, "random"),
        (vec!["--set", "mixture.recipe=two.sql"], 2, "SELECT"),
        (vec!["--set", "mixture.recipe=wide.sql"], 3, "is not inside its"),
        (vec!["--set", "mixture.params.long_shar=0.5"], 2, "long_share"),
        (vec!["--set", "mixture.budget=5B"], 3, "max_copies = 4 leaves"),
        (vec!["--set", "source.0.url=nothing/*.jsonl"], 2, "nothing/*.jsonl` has no files"),
        (vec!["--set", "source.0.url=hdfs://there/x"], 2, "no such storage is known"),
        (vec!["--set", "engine.spill=/proc/nowhere"], 2, "engine.spill"),
        (
            vec!["--set", "mixture.recipe=none.sql", "--set", "mixture.shortfall=allow"],
            3,
            "nothing is to be drawn",
        ),
        (upsampled, 2, "there are no documents of domain `poem`"),
        (vec!["--set", "tokenizer.train.vocab=12"], 2, "vocab"),
        (vec!["--set", "train.steps=0"], 2, "train"),
        (vec!["--set", "mixture.shares={ book = 0.5, poems = 0.5 }"], 3, "poems"),
    ] {
        let mut all = vec!["run", "conf.toml"];
        all.extend(&arguments);
        let said = project.say(&all);
        assert_eq!(said.code, code, "{arguments:?}: {}", said.err);
        assert!(said.err.contains(message), "{arguments:?}: {}", said.err);
        assert_eq!(said.out, "");
    }
    let said = project.say(&[
        "run",
        "conf.toml",
        "--set",
        "mixture.budget=5B",
        "--set",
        "mixture.shortfall=allow",
        "--until",
        "mixture",
    ]);
    assert_eq!(said.code, 0, "{}", said.err);
}

#[test]
fn a_wrong_query_is_shown_with_the_place_and_the_tables() {
    let project = Project::new(1);
    project.run(&["--until", "domains"]);
    for (query, message) in [
        ("select dmain from domains", "did you mean `domain`?"),
        ("select * form domains", "this is no SQL"),
        (
            "select * from nosuch",
            "the tables are catalog, documents, domains, heldout, rejects, shares, tokens",
        ),
        (
            "select * from drawn",
            "stage mixture and those after it have not been computed: `lengthwise run conf.toml`",
        ),
        ("drop table domains", "a query cannot begin with `drop`"),
        ("select 1; select 2", "a query has only one statement"),
        ("select domain from domains where domain = $domain", "only recipes have parameters"),
    ] {
        let said = project.say(&["sql", "conf.toml", query]);
        assert!(said.code == 2 && said.err.contains(message) && said.out.is_empty(), "{said:?}");
        assert_eq!(said.err.matches(message).count(), 1, "{}", said.err);
    }
    let none = project.say(&["sql", "conf.toml", "select domain, tokens from domains where false"]);
    assert!(none.code == 0 && none.out.contains("| domain | tokens |"), "{none:?}");
    for (query, message) in [
        ("select tokens / 0 from documents", "line 1, column 8: `documents.tokens / 0` divides by zero"),
        ("select sum(tokens + 9223372036854700000) from documents", "is beyond bigint"),
        ("select 9000000000 * 9000000000", "`9000000000 * 9000000000` is beyond bigint"),
    ] {
        let said = project.say(&["sql", "conf.toml", query]);
        assert_eq!((said.code, said.err.matches(message).count()), (3, 1), "{said:?}");
    }
}

#[test]
fn a_recipe_of_another_encoding_is_read_or_refused_with_the_cure() {
    let project = Project::new(1);
    project.own_recipe();
    let text = "-- Mine.\nselect doc_id, 0 as start, tokens as stop,\n    1.0 as copes from documents\n";
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let run = |recipe: &str| project.say(&["run", "conf.toml", "--set", &format!("mixture.recipe={recipe}")]);
    project.write("marked.sql", format!("\u{feff}{text}"));
    let said = run("marked.sql");
    assert!(said.code == 2 && said.err.contains("marked.sql:3:5"), "{said:?}");
    let mut windows = vec![0xff, 0xfe];
    windows.extend(utf16(text));
    let latin = [text.as_bytes(), b"-- caf\xe9\n"].concat();
    for (file, bytes, message) in [
        ("windows.sql", windows.clone(), "windows.sql is UTF-16"),
        ("bare.sql", utf16(text), "bare.sql is UTF-16"),
        ("latin.sql", latin.clone(), "latin.sql is not UTF-8, from line 4 on"),
    ] {
        project.write(file, bytes);
        let said = run(file);
        assert!(said.code == 2 && said.err.contains(message) && said.err.contains("iconv"), "{said:?}");
    }
    for (file, bytes, message) in [
        ("zero.sql", [text.as_bytes(), b"--\0\n"].concat(), "zero.sql has a byte of zero in line 4"),
        ("packed.sql", vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3], "packed.sql is compressed"),
    ] {
        project.write(file, bytes);
        let said = run(file);
        assert!(said.code == 2 && said.err.contains(message), "{said:?}");
    }
    // a conf is treated the same, both in the folder and in a commit
    project.git(&["init", "-q"]);
    let conf = std::fs::read_to_string(project.path("conf.toml")).unwrap();
    for (bytes, code, message) in [
        (format!("\u{feff}{conf}").into_bytes(), 0, ""),
        (utf16(&conf), 2, "conf.toml is UTF-16"),
        ([conf.as_bytes(), b"# caf\xe9"].concat(), 2, "conf.toml is not UTF-8"),
    ] {
        project.write("conf.toml", bytes);
        project.commit("conf");
        for more in [&[][..], &["--at", "HEAD"]] {
            let said = project.say(&[&["run", "conf.toml", "--until", "tokenizer"], more].concat());
            assert!(said.code == code && said.err.contains(message), "{said:?}");
        }
    }
}

#[test]
fn copies_that_are_no_sample_are_said_with_what_is_likely() {
    let project = Project::new(1);
    let recipe = |copies: &str| {
        format!(
            "-- Mine.\nwith large as (select * from documents where tokens > 100000000),\n\
             total as (select coalesce(sum(cast(tokens as decimal(38, 0))), 0) as tokens from large)\n\
             select doc_id, 0 as start, documents.tokens as stop, {copies} as copies from documents cross join total\n"
        )
    };
    for (copies, budget, message) in [
        (
            "1.0 * $budget / documents.tokens",
            "5000B",
            "`mixture.budget` may be far beyond what there is to draw from",
        ),
        ("$budget / cast(total.tokens as double)", "40K", "copies is inf"),
        ("$budget / cast(total.tokens as double)", "40K", "look for a sum of no rows"),
        ("0.0 / total.tokens", "40K", "start, stop or copies is null"),
        ("$budget / total.tokens", "40K", "total.tokens` divides by zero"),
        ("1.0 - documents.tokens", "40K", "below zero"),
        ("documents.tokens * $budget * 90000000000", "5B", "is beyond bigint"),
    ] {
        project.write("mine.sql", recipe(copies));
        let budget = format!("mixture.budget={budget}");
        let said = project.say(&["run", "conf.toml", "--set", "mixture.recipe=mine.sql", "--set", &budget]);
        assert!(said.code == 3 && said.err.contains(message), "{copies}: {said:?}");
    }
}

#[test]
fn a_password_on_the_command_line_is_refused_and_not_shown() {
    let project = Project::empty();
    for command in ["gc", "verify", "report"] {
        let said = project.say(&[command, "s3://AKIAEXAMPLE:hunter2@bucket/out"]);
        assert!(said.code == 2 && said.err.contains("looks like a password"), "{said:?}");
        assert!(!said.err.contains("hunter2"), "{said:?}");
    }
}

#[test]
fn a_json_log_says_where_a_conf_is_wrong() {
    let project = Project::new(1);
    let mut command = project.command(&["run", "conf.toml", "--set", "engine.partitions=0"]);
    let said = said(command.env("LENGTHWISE_LOG_FORMAT", "json").output().unwrap());
    assert!(said.code == 2 && said.err.contains("\"place\":\""), "{said:?}");
    project.change("conf.toml", "seed = 7", "sed = 7");
    let mut command = project.command(&["run", "conf.toml"]);
    command.env("LENGTHWISE_LOG_FORMAT", "json").env("LENGTHWISE_METRICS", project.path("m.prom"));
    let said = crate::project::said(command.output().unwrap());
    assert!(said.code == 2 && said.err.contains("\"place\":\"conf.toml:3"), "{said:?}");
    // the metrics file reports the failure, too
    let metrics = std::fs::read_to_string(project.path("m.prom")).unwrap();
    assert!(metrics.contains("lengthwise_run_exit_code{run=\"conf.toml\"} 2"), "{metrics}");
}

#[test]
fn no_recipe_reaches_what_is_held_out() {
    let project = Project::new(1);
    for hidden in ["all_documents", "heldout"] {
        let recipe = format!(
            "-- leak\nwith {hidden} as (select * from {hidden})\n\
             select doc_id, cast(0 as bigint) as start, cast(10 as bigint) as stop, cast(1 as double) as copies from {hidden}\n"
        );
        project.write("leak.sql", recipe);
        let said = project.say(&["run", "conf.toml", "--set", "mixture.recipe=leak.sql"]);
        assert!([2, 3].contains(&said.code), "{said:?}");
        assert!(said.err.contains(hidden), "{said:?}");
    }
}

#[test]
fn no_text_of_a_folder_is_left_out_unsaid() {
    let project = Project::empty();
    for (i, name) in ["__init__.py", "a.txt", "_b/c.txt"].iter().enumerate() {
        project.write(&format!("in/{name}"), format!("text {i} {}", "of a file ".repeat(40)));
    }
    project.conf("in", "text", "");
    let sets = ["--set", "source.0.domain={ const = \"T\" }", "--until", "catalog"];
    let run = |project: &Project| {
        let mut all = vec!["run", "conf.toml", "--json"];
        all.extend(sets);
        project.say(&all)
    };
    let said = run(&project);
    assert!(said.code == 0 && said.out.contains("\"documents\": 3"), "{said:?}");
    project.write("in/chapter#1", "text that no listing shows");
    let said = run(&project);
    assert!(said.code == 2 && said.err.contains("chapter#1` cannot be read"), "{said:?}");
    std::fs::remove_file(project.path("in/chapter#1")).unwrap();
    std::os::unix::fs::symlink("nowhere", project.path("in/d.txt")).unwrap();
    let said = run(&project);
    assert!(said.code == 2 && said.err.contains("d.txt` is a link to what isn't there"), "{said:?}");
}

#[test]
fn an_output_that_is_reached_through_a_link_is_no_source_and_a_folder_of_a_run_s_name_is_one() {
    let project = Project::empty();
    project.conf("all/**/*.jsonl", "jsonl", "shortfall = \"allow\"");
    for folder in ["web", "tasks", "stages", "runs", "latest"] {
        project.jsonl(&format!("all/{folder}/x.jsonl"), &corpus(u64::from(folder.as_bytes()[0]), 40));
    }
    std::os::unix::fs::symlink("all", project.path("link")).unwrap();
    for (url, output) in
        [("all/**/*.jsonl", "all"), ("all/**/*.jsonl", "link"), ("link/**/*.jsonl", "all"), ("all", "link")]
    {
        let sets = [format!("source.0.url={url}"), format!("run.output={output}")];
        let run = || {
            let run = project.run(&["--set", &sets[0], "--set", &sets[1]]);
            let text = std::fs::read(run.join("manifest.json")).unwrap();
            let manifest: serde_json::Value = serde_json::from_slice(&text).unwrap();
            manifest["summary"]["counts"]["documents"].as_u64()
        };
        assert_eq!((run(), run()), (Some(200), Some(200)), "{url} {output}");
    }
}

//! Evaluations, sweeps and comparisons.

use std::path::Path;

use serde_json::Value;

use crate::project::{Project, recipe, tree};

const TRAIN: &str =
    "train={ shape = { hidden_size = 16, intermediate_size = 16, layers = 1, heads = 2 }, steps = 4 }";

/// Writes essays, and questions with choices.
fn texts(project: &Project) {
    let sentence = |i: usize| format!("The sea was calm and wide, dawn {i} until all primes run again. ");
    // enough distinct words for keys
    let letter = |i: usize| char::from(b'a' + (i % 26) as u8);
    let word = |i: usize| format!("{}{}{}a", letter(i), letter(i / 26), letter(i * 7));
    let words: Vec<String> = (0..90).map(word).collect();
    let essay = (0..60).map(sentence).chain([words.join(" ") + ". "]).collect::<String>();
    project.write("essays/a.txt", essay);
    project.write("essays/b.txt", (60..90).map(sentence).collect::<String>());
    project.write("questions.csv", "Was the sea calm?,no,yes,B\nIs 7 prime?,\"yes, it is\",no,A\n");
}

const EVAL: &str = "eval={ loss = true, choices = { file = \"questions.csv\" }, \
                    needle = { haystack = \"essays/*.txt\", lengths = [400, \"0.6K\"], depths = [0, 100] } }";

fn cases(run: &Path, evaluation: &str) -> Vec<Value> {
    let lines = std::fs::read_to_string(run.join(format!("eval/{evaluation}/cases.jsonl"))).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The stored record of each answer, including its time.
fn answers(project: &Project) -> Vec<String> {
    let files = tree(&project.path("out/stages/eval"));
    let jobs = files.iter().filter(|path| path.to_string_lossy().contains("/jobs/"));
    jobs.map(|path| std::fs::read_to_string(path).unwrap()).collect()
}

#[test]
fn a_run_ends_with_its_evaluations_and_asks_them_once() {
    let project = Project::new(3);
    texts(&project);
    let run = project.run(&["--set", TRAIN, "--set", EVAL]);
    let needles = cases(&run, "needle");
    let asked: Vec<(u64, f64)> =
        needles.iter().map(|c| (c["length"].as_u64().unwrap(), c["depth"].as_f64().unwrap())).collect();
    assert_eq!(asked, [(400, 0.0), (400, 100.0), (600, 0.0), (600, 100.0)]);
    assert_eq!(cases(&run, "choices").len(), 2);
    // each held-out document occurs once
    let heldout = project.sql("select doc_id from heldout", &[]);
    let ids = |rows: &[Value]| {
        let mut ids: Vec<String> =
            rows.iter().map(|row| row["doc_id"].as_str().unwrap().to_owned()).collect();
        ids.sort();
        ids
    };
    let read = ids(&cases(&run, "loss"));
    assert!(read.windows(2).all(|pair| pair[0] != pair[1]) && read.len() > 3);
    assert!(read.len() <= heldout.len());
    let report = std::fs::read_to_string(run.join("report.html")).unwrap();
    for heading in ["Needle in a haystack", "Loss of held-out documents", "Questions with choices"] {
        assert!(report.contains(heading), "{heading}");
    }
    let plan = project.say(&["plan", "conf.toml", "--set", TRAIN, "--set", EVAL]);
    assert!(
        plan.out.lines().any(|line| line.starts_with("eval ") && line.contains("cached")),
        "{}",
        plan.out
    );
    // the recorded times are the same, so nothing was asked again
    let before = answers(&project);
    assert!(before.iter().any(|answer| answer.contains("seconds")));
    assert_eq!(project.run(&["--set", TRAIN, "--set", EVAL]), run);
    assert_eq!(answers(&project), before);
    assert_eq!(project.say(&["verify", run.to_str().unwrap()]).code, 0);
    // a conf without evaluations has the same run, and the earlier results remain valid
    assert_eq!(project.run(&["--set", TRAIN]), run);
    let report = std::fs::read_to_string(run.join("report.html")).unwrap();
    assert!(report.contains("Needle in a haystack") && report.contains("Loss of held-out documents"));
    assert_eq!(project.say(&["verify", run.to_str().unwrap()]).code, 0);
}

#[test]
fn files_of_questions_are_read_each_by_itself() {
    let project = Project::new(3);
    let run = project.run(&["--set", TRAIN]);
    for file in ["a", "b"] {
        // without a newline at the end
        project.write(&format!("q/{file}.csv"), "What is 1?,a,b,A");
    }
    let said = project.say(&["eval", "choices", run.to_str().unwrap(), "--file", "q/*.csv", "--json"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(serde_json::from_str::<Value>(&said.out).unwrap()["result"]["questions"], 2);
    project.write("q/b.csv", "What is 1?,a,b,X");
    let wrong = project.say(&["eval", "choices", run.to_str().unwrap(), "--file", "q/*.csv"]);
    assert!(wrong.code == 2 && wrong.err.contains("q/b.csv, line 1"), "{wrong:?}");
}

#[test]
fn models_of_other_tokens_are_not_compared_by_loss() {
    let project = Project::new(3);
    let run = |vocab: &str| project.run(&["--set", "eval={ loss = true }", "--set", TRAIN, "--set", vocab]);
    let (one, other) = (run("tokenizer.train.vocab=400"), run("tokenizer.train.vocab=300"));
    let (one, other) = (one.to_str().unwrap(), other.to_str().unwrap());
    let train = format!("train={{ checkpoint = \"{other}/checkpoint\", steps = 4 }}");
    let known = project.say(&["run", "conf.toml", "--set", &train, "--set", "run.output=elsewhere"]);
    assert!(known.code == 2 && known.err.contains("the checkpoint knows 300"), "{known:?}");
    assert!(tree(&project.path("elsewhere/stages/tokens")).is_empty());
    let against = project.say(&["eval", "loss", one, "--against", &format!("{other}/checkpoint")]);
    assert!(against.code == 2 && against.err.contains("has another tokenizer"), "{against:?}");
    let said = project.say(&["compare", one, other, "--json"]);
    let compared: Value = serde_json::from_str(&said.out).unwrap();
    let rows = compared["loss"].as_array().unwrap();
    assert!(!rows.is_empty() && rows.iter().all(|row| row["differences"][0].is_null()), "{rows:?}");
}

#[test]
fn a_case_that_was_asked_is_not_asked_again() {
    let project = Project::new(3);
    texts(&project);
    let run = project.run(&["--set", TRAIN]);
    let run = run.to_str().unwrap();
    let ask = || {
        let arguments = ["eval", "needle", run, "--haystack", "essays/*.txt", "--lengths", "400,500"];
        let said = project.say(&[&arguments[..], &["--depths", "0,50", "--json"]].concat());
        assert_eq!(said.code, 0, "{}", said.err);
        let value: Value = serde_json::from_str(&said.out).unwrap();
        (value, answers(&project))
    };
    let (first, before) = ask();
    // as after a kill: without a manifest, and without the third answer
    let stage = Path::new(first["cases"].as_str().unwrap()).parent().unwrap();
    std::fs::remove_file(stage.join("manifest.json")).unwrap();
    std::fs::remove_file(stage.join("jobs/length-500-depth-0.json")).unwrap();
    let (second, after) = ask();
    assert_eq!(first["result"]["score"], second["result"]["score"]);
    let same: Vec<bool> = before.iter().zip(&after).map(|(a, b)| a == b).collect();
    // lengths 400 and 500, each at depths 0 and 50
    assert_eq!(same, [true, true, false, true]);
}

#[test]
fn a_conf_a_run_and_a_checkpoint_are_evaluated_alike() {
    let project = Project::new(3);
    texts(&project);
    project.write(
        "conf.toml",
        std::fs::read_to_string(project.path("conf.toml")).unwrap()
            + "[train]\nsteps = 4\nshape = { hidden_size = 16, intermediate_size = 16, layers = 1, heads = 2 }\n\
               [eval.retrieval]\nhaystack = \"essays/*.txt\"\nlengths = [4000]\ntasks = [\"single\", \"variables\"]\nsamples = 2\n",
    );
    let run = project.run(&[]);
    let checkpoint = run.join("checkpoint");
    let ask = |target: &str, more: &[&str]| {
        let said = project.say(&[&["eval", "retrieval", target, "--json"], more].concat());
        assert_eq!(said.code, 0, "{}", said.err);
        serde_json::from_str::<Value>(&said.out).unwrap()["result"].clone()
    };
    let of_conf = ask("conf.toml", &[]);
    assert_eq!(of_conf["cells"].as_array().unwrap().len(), 2);
    assert_eq!(ask(run.to_str().unwrap(), &[]), of_conf);
    let more = ["--haystack", "essays/*.txt", "--lengths", "4000", "--samples", "2"];
    let all = ask(checkpoint.to_str().unwrap(), &more);
    let single = |result: &Value| {
        result["cells"].as_array().unwrap().iter().find(|cell| cell["task"] == "single").cloned()
    };
    assert_eq!(single(&all), single(&of_conf));
    // the loss needs documents, which a checkpoint does not have
    let said = project.say(&["eval", "loss", checkpoint.to_str().unwrap()]);
    assert!(said.code == 2 && said.err.contains("--heldout"), "{said:?}");
    let heldout = run.join("heldout");
    let given =
        project.say(&["eval", "loss", checkpoint.to_str().unwrap(), "--heldout", heldout.to_str().unwrap()]);
    let own = project.say(&["eval", "loss", run.to_str().unwrap()]);
    assert_eq!((given.code, own.code), (0, 0), "{given:?} {own:?}");
    // compared with another checkpoint, here the run's own: no difference
    let beside = project.say(&[
        "eval",
        "loss",
        run.to_str().unwrap(),
        "--against",
        checkpoint.to_str().unwrap(),
        "--json",
    ]);
    assert_eq!(beside.code, 0, "{beside:?}");
    let rows = serde_json::from_str::<Value>(&beside.out).unwrap()["against"].clone();
    assert!(rows.as_array().unwrap().iter().all(|row| row["differences"][0]["mean"] == 0.0), "{rows}");
    assert!(rows.as_array().unwrap().iter().any(|row| row["domain"] == "book"), "{rows}");
    let numbers = |out: &str| out.lines().rev().skip(1).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(numbers(&given.out), numbers(&own.out));
}

#[test]
fn what_an_evaluation_can_not_be_asked_of_is_said() {
    let project = Project::new(3);
    texts(&project);
    let run = project.run(&["--set", TRAIN]);
    let run = run.to_str().unwrap();
    let data = project.run(&[]);
    let data = data.to_str().unwrap();
    project.write("bad.csv", "q,a,b,A\nq,a,b,X\n");
    project.write("latin.txt", b"caf\xe9");
    for essay in tree(&project.path("essays")) {
        project.write(
            &format!("ess[a]ÿs 100%/{}", essay.file_name().unwrap().display()),
            std::fs::read(&essay).unwrap(),
        );
    }
    for (arguments, code, message) in [
        (&["eval", "needle", run][..], 2, "--haystack is needed"),
        (
            &["eval", "needle", run, "--haystack", "essays", "--lengths", "100"],
            2,
            "need more than the 100 tokens",
        ),
        (
            &["eval", "needle", run, "--haystack", "ess[a]ÿs 100%/*.txt", "--lengths", "100"],
            2,
            "need more than the 100 tokens",
        ),
        (
            &["eval", "needle", run, "--haystack", "essays", "--lengths", "1x"],
            2,
            "\"1x\" has a unit that is not known here",
        ),
        (&["eval", "needle", run, "--haystack", "nowhere"], 2, "has no files"),
        (&["eval", "needle", run, "--haystack", "latin.txt"], 2, "is not UTF-8"),
        (&["eval", "loss", run, "--heldout", "nowhere"], 2, "no packed documents below"),
        (&["eval", "loss", data, "--haystack", "essays"], 2, "trained nothing"),
        (&["eval", "choices", run, "--file", "bad.csv"], 2, "bad.csv, line 2: the answer `X`"),
        (&["eval", "loss", "conf.toml"], 2, "there is no model to evaluate"),
        (&["eval", "loss", run, "--device", "gpu"], 2, "there is no device `gpu`"),
        (&["eval", "loss", run, "--rope-scaling", "{"], 2, "--rope-scaling is not JSON"),
        (&["eval", "loss", run, "--rope-scaling", "{\"type\": \"yarn\"}"], 2, "needs `factor`"),
        (&["eval", "loss", run, "--rope-scaling", "\"yarn\""], 2, "has no `rope_type`"),
        (&["eval", "loss", run, "--rope-scaling", "{\"factor\": 4.0}"], 2, "has no `rope_type`"),
    ] {
        let said = project.say(arguments);
        assert!(said.code == code && said.err.contains(message), "{arguments:?} {said:?}");
    }
    let wrong = project.say(&["run", "conf.toml", "--set", "eval={ needel = { haystack = \"essays\" } }"]);
    assert!(wrong.code == 2 && wrong.err.contains("needel"), "{wrong:?}");
}

#[test]
fn what_training_and_evaluations_lack_is_said_before_documents_are_read() {
    let project = Project::new(3);
    texts(&project);
    project.write("bad.csv", "q,a,b,A\nq,a,b,X\n");
    project.write("empty.csv", "");
    let config = "{\"model_type\": \"llama\", \"hidden_size\": 16, \"intermediate_size\": 16, \"num_hidden_layers\": 1, \
                  \"num_attention_heads\": 2, \"vocab_size\": 64, \"rms_norm_eps\": 1e-5}";
    project.write("small/config.json", config);
    for (train, eval, message) in [
        (Some(TRAIN), "eval.needle.haystack=nowhere", "nowhere` has no files"),
        (Some(TRAIN), "eval.choices.file=nowhere.csv", "nowhere.csv` has no files"),
        (Some(TRAIN), "eval.choices.file=bad.csv", "bad.csv, line 2: the answer `X`"),
        (Some(TRAIN), "eval.choices.file=empty.csv", "empty.csv has no question"),
        (Some(TRAIN), "eval.needle={ haystack = \"essays\", depths = [101] }", "depth 101 is not within"),
        (Some(TRAIN), "eval.needle={ haystack = \"essays\", prompt = \"x\" }", "has no {context}"),
        (
            Some(TRAIN),
            "eval.retrieval={ haystack = \"essays\", lengths = [100] }",
            "tokens at least, and has 100",
        ),
        (Some(TRAIN), "eval={ loss = true, devices = [\"libtorch-cuda:99\"] }", "libtorch-cuda:99"),
        (Some(TRAIN), "eval.bookqa.file=empty.csv", "empty.csv has no question"),
        (None, "eval.loss=true", "there is no [train] table"),
        (Some("train={ checkpoint = \"nowhere\", steps = 4 }"), "eval.loss=true", "there is no config.json"),
        (
            Some("train={ checkpoint = \"small\", steps = 4 }"),
            "eval.loss=true",
            "there is no model.safetensors",
        ),
    ] {
        let mut arguments = vec!["run", "conf.toml", "--set", eval];
        arguments.extend(train.iter().flat_map(|train| ["--set", train]));
        let said = project.say(&arguments);
        assert!(said.code == 2 && said.err.contains(message), "{eval}: {said:?}");
        assert!(tree(&project.path("out/stages/tokens")).is_empty());
    }
    let none = ["--set", TRAIN, "--set", "eval.loss=true", "--set", "mixture.holdout=0"];
    let said = project.say(&[&["run", "conf.toml"][..], &none].concat());
    assert!(said.code == 2 && said.err.contains("no documents are held out"), "{said:?}");
    assert!(tree(&project.path("out/stages/tokens")).is_empty());
    let own = recipe("cut_128k");
    let sweep = ["sweep", "conf.toml", "--recipes", &own, "--set", TRAIN];
    let said = project.say(&[&sweep[..], &["--set", "eval.needle.haystack=nowhere"]].concat());
    assert!(said.code == 2 && said.err.contains("nowhere` has no files"), "{said:?}");
    assert!(tree(&project.path("out/stages/tokens")).is_empty());
}

#[test]
fn a_sweep_with_a_mistake_in_its_last_recipe_computes_nothing() {
    let project = Project::new(3);
    project.write("mine/cut_128k.sql", std::fs::read(recipe("cut_128k")).unwrap());
    let own = recipe("cut_128k");
    for (recipes, message) in [
        (format!("{own},nosuch"), "--recipes nosuch"),
        (format!("{own},mine/cut_128k.sql"), "two recipes of --recipes are called cut_128k"),
        (format!("{own},{}:long_shar=0.9", recipe("per_source")), "did you mean `long_share`"),
    ] {
        let said = project.say(&["sweep", "conf.toml", "--recipes", &recipes]);
        assert!(said.code == 2 && said.err.contains(message), "{said:?}");
        assert!(tree(&project.path("out")).is_empty());
    }
}

#[test]
fn a_sweep_whose_last_recipe_names_no_domain_draws_nothing() {
    let project = Project::new(3);
    let recipes = format!("{},{}:domain=nosuch", recipe("cut_128k"), recipe("upsample_domain"));
    let said = project.say(&["sweep", "conf.toml", "--recipes", &recipes]);
    assert!(said.code == 2 && said.err.contains("nosuch"), "{said:?}");
    assert!(!tree(&project.path("out/stages/mixture")).is_empty());
    assert!(tree(&project.path("out/stages/draw")).is_empty());
}

#[test]
fn a_sweep_trains_each_recipe_on_the_same_tokens_and_compares_them() {
    let project = Project::new(3);
    texts(&project);
    let recipes = format!("{},{}:long_share=0.9", recipe("cut_128k"), recipe("per_source"));
    let shortfall = "mixture.shortfall=allow";
    let arguments =
        ["sweep", "conf.toml", "--recipes", &recipes, "--set", TRAIN, "--set", EVAL, "--set", shortfall];
    let said =
        project.say(&[&arguments[..], &["--html", "sweep.html", "--svg", "sweep.svg", "--json"]].concat());
    assert_eq!(said.code, 0, "{}", said.err);
    let compared: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(compared["names"], serde_json::json!(["cut_128k", "per_source-0.9"]));
    let long = |side: usize| -> f64 {
        let rows = compared["long"].as_array().unwrap();
        rows.iter().map(|row| row["sides"][side].as_f64().unwrap()).sum()
    };
    assert!(long(1) > long(0), "{compared}");
    let keys: Vec<&str> =
        compared["conf"].as_array().unwrap().iter().map(|row| row[0].as_str().unwrap()).collect();
    assert_eq!(keys, ["mixture.params.long_share", "mixture.recipe", "run.name"]);
    assert!(compared["loss"].as_array().unwrap().iter().any(|row| row["differences"][0]["mean"].is_number()));
    let tokens = tree(&project.path("out/stages/tokens"));
    let manifests = tokens.iter().filter(|path| path.ends_with("manifest.json")).count();
    assert_eq!(manifests, 1, "the tokens stage is one for all");
    let page = std::fs::read_to_string(project.path("sweep.html")).unwrap();
    assert!(page.contains("per_source-0.9") && page.contains("Loss of held-out documents"));
    let picture = std::fs::read_to_string(project.path("sweep.svg")).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("per_source-0.9"), "{picture}");

    let runs: Vec<String> = compared["runs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|seeds| format!("out/runs/{}", seeds[0].as_str().unwrap()))
        .collect();
    let again = project.say(&["compare", &runs[0], &runs[1], "--json"]);
    assert_eq!(again.code, 0, "{again:?}");
    let again: Value = serde_json::from_str(&again.out).unwrap();
    assert_eq!(again["loss"], compared["loss"]);
    assert_eq!(again["sql"][0]["diff"], compared["sql"][0]["diff"]);
    let alone = project.say(&["compare", &runs[0]]);
    assert!(alone.code == 2 && alone.err.contains("nothing to compare with"), "{alone:?}");
}

#[test]
fn two_commits_of_a_conf_are_compared() {
    let project = Project::new(4);
    project.own_recipe();
    project.git(&["init", "-q"]);
    project.commit("before");
    project.change("conf.toml", "long_tokens = 512", "long_tokens = 256");
    project.change("sql/mixtures/own.sql", "double = 0.70", "double = 0.60");
    project.commit("after");
    // before the runs exist, the error says what is missing, and nothing is computed
    let early = project.say(&["compare", "conf.toml", "--at", "HEAD~1..HEAD"]);
    assert!(early.code != 0 && early.err.contains("lengthwise run"), "{early:?}");
    for commit in ["HEAD~1", "HEAD"] {
        project.run(&["--at", commit]);
    }
    let said = project.say(&["compare", "conf.toml", "--at", "HEAD~1..HEAD", "--json"]);
    assert_eq!(said.code, 0, "{}", said.err);
    let compared: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(compared["names"], serde_json::json!(["HEAD~1", "HEAD"]));
    let keys = compared["conf"].as_array().unwrap();
    assert!(keys.contains(&serde_json::json!(["mixture.long_tokens", ["512", "256"]])), "{keys:?}");
    assert!(compared["sql"][0]["diff"].as_str().unwrap().contains("0.60"), "{}", compared["sql"]);
    let commits = compared["commits"].as_array().unwrap();
    assert!(commits.iter().all(Value::is_string) && commits[0] != commits[1], "{commits:?}");
}

#[test]
fn the_cards_say_what_run_and_recipe_they_are_of() {
    let project = Project::new(3);
    let run = project.run(&["--set", TRAIN]);
    let name = run.file_name().unwrap().to_str().unwrap();
    for card in ["README.md", "checkpoint/README.md"] {
        let card = std::fs::read_to_string(run.join(card)).unwrap();
        assert!(card.starts_with("---\n") && card.contains(name) && card.contains("per_source"), "{card}");
    }
    let json = |file: &str| -> Value {
        serde_json::from_slice(&std::fs::read(run.join("checkpoint").join(file)).unwrap()).unwrap()
    };
    assert_eq!(json("tokenizer_config.json")["tokenizer_class"], "PreTrainedTokenizerFast");
    assert_eq!(json("generation_config.json")["do_sample"], false);
    assert_eq!(json("config.json")["rope_parameters"]["rope_type"], "default");
}

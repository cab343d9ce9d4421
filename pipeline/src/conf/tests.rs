use insta::assert_snapshot;
use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme};
use proptest::prelude::*;

use super::*;

/// Has each key once, none at its default.
const FULL: &str = r#"
[run]
name = "full"
seed = 7
output = "s3://bucket/runs"

[[source]]
name = "pajama"
url = "s3://bucket/pajama/**/*.jsonl.zst"
format = "jsonl"
text = "content.body"
domain = "meta.redpajama_set_name"
max_reject_share = 0.01
max_document_bytes = "128MB"

[[source]]
url = "books/"
format = "text"
domain = { const = "Book" }

[[source]]
url = "${HOME}/src"
format = "text"
domain = [{ glob = "**/*.rs", domain = "Rust" }, { glob = "**", domain = "Other" }]

[tokenizer]
train = { vocab = 8192, sample = "16MB" }
bos = true
eos = false

[mixture]
recipe = "sql/mixtures/per_source.sql"
budget = "5B"
holdout = 0.01
shortfall = "allow"
long_tokens = "8K"
max_span = 65_536
max_copies = 2

[mixture.shares]
RedPajamaBook = 1
RedPajamaGithub = 3.0

[mixture.params]
long_share = 0.7
target = "5B"
steps = 3
whole = true

[pack]
sequence_tokens = 81920
mode = "best_fit"
sequences_per_file = 128
sequences_per_row_group = 8

[engine]
partitions = 4
memory = "8GiB"
spill = "/mnt/scratch"

[train]
steps = 100
devices = ["flex"]
"#;

/// Has the required keys alone.
const SMALL: &str = r#"
[run]
name = "small"
output = "runs"
[[source]]
url = "docs/*.jsonl"
format = "jsonl"
domain = "domain"
[tokenizer]
url = "tokenizer.json"
[mixture]
recipe = "sql/mixtures/global.sql"
budget = "10M"
[pack]
sequence_tokens = 8192
"#;

fn env(name: &str) -> Option<String> {
    let value = match name {
        "HOME" => "/home/ada",
        "KEYED" => "s3://user:hunter2@bucket/runs",
        "EMPTY" => "",
        _ => return None,
    };
    Some(value.to_owned())
}

fn parse(text: &str, sets: &[&str]) -> Result<Conf> {
    let sets: Vec<_> = sets.iter().map(|set| (*set).to_owned()).collect();
    Conf::parse(text, "conf/x.toml", &sets, &env)
}

#[track_caller]
fn good(text: &str, sets: &[&str]) -> Conf {
    parse(text, sets).unwrap_or_else(|error| panic!("{}", render(&error)))
}

/// What the user sees of the error that a conf gives.
#[track_caller]
fn refused(text: &str, sets: &[&str]) -> String {
    render(&parse(text, sets).expect_err("this conf should be refused"))
}

/// FULL with one line changed.
#[track_caller]
fn changed(from: &str, to: &str) -> String {
    assert_eq!(FULL.matches(from).count(), 1, "{from:?} should be in FULL once");
    FULL.replace(from, to)
}

fn render(error: &dyn Diagnostic) -> String {
    let mut shown = String::new();
    let handler = GraphicalReportHandler::new_themed(GraphicalTheme::none()).with_width(100);
    handler.render_report(&mut shown, error).expect("a string takes all");
    shown.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

// What is right.

#[test]
fn a_full_conf_means_what_it_says() {
    assert_snapshot!(good(FULL, &[]).to_toml(), @r#"
    [run]
    name = "full"
    seed = 7
    output = "s3://bucket/runs"

    [[source]]
    url = "s3://bucket/pajama/**/*.jsonl.zst"
    name = "pajama"
    format = "jsonl"
    text = "content.body"
    domain = "meta.redpajama_set_name"
    max_reject_share = 0.01
    max_document_bytes = 128000000

    [[source]]
    url = "books/"
    name = "books/"
    format = "text"
    max_reject_share = 0.001
    max_document_bytes = 64000000

    [source.domain]
    const = "Book"

    [[source]]
    url = "/home/ada/src"
    name = "${HOME}/src"
    format = "text"
    max_reject_share = 0.001
    max_document_bytes = 64000000

    [[source.domain]]
    glob = "**/*.rs"
    domain = "Rust"

    [[source.domain]]
    glob = "**"
    domain = "Other"

    [tokenizer]
    bos = true
    eos = false

    [tokenizer.train]
    vocab = 8192
    sample = 16000000

    [mixture]
    recipe = "sql/mixtures/per_source.sql"
    budget = 5000000000
    holdout = 0.01
    shortfall = "allow"
    long_tokens = 8000
    max_span = 65536
    max_copies = 2

    [mixture.shares]
    RedPajamaBook = 1.0
    RedPajamaGithub = 3.0

    [mixture.params]
    long_share = 0.7
    steps = 3
    target = "5B"
    whole = true

    [pack]
    sequence_tokens = 81920
    mode = "best_fit"
    sequences_per_file = 128
    sequences_per_row_group = 8

    [engine]
    partitions = 4
    memory = 8589934592
    spill = "/mnt/scratch"

    [train]
    devices = ["flex"]
    steps = 100
    "#);
}

#[test]
fn the_defaults_are_filled_in() {
    assert_snapshot!(good(SMALL, &[]).to_toml(), @r#"
    [run]
    name = "small"
    seed = 0
    output = "runs"

    [[source]]
    url = "docs/*.jsonl"
    name = "docs/*.jsonl"
    format = "jsonl"
    text = "text"
    domain = "domain"
    max_reject_share = 0.001
    max_document_bytes = 64000000

    [tokenizer]
    url = "tokenizer.json"

    [mixture]
    recipe = "sql/mixtures/global.sql"
    budget = 10000000
    holdout = 0.0
    shortfall = "error"
    long_tokens = 4096
    max_span = 131072
    max_copies = 4
    shares = "corpus"

    [mixture.params]

    [pack]
    sequence_tokens = 8192
    mode = "concat"
    sequences_per_file = 256
    sequences_per_row_group = 16

    [engine]
    memory = 2000000000
    "#);
}

#[test]
fn the_resolved_conf_parses_back_to_itself_from_toml_and_json() {
    let rules = "domain = [{ glob = \"a/**\", domain = \"x\" }]";
    let named =
        SMALL.replace("budget", "shares = \"slimpajama-text\"\nbudget").replace("domain = \"domain\"", rules);
    for text in [FULL, SMALL, &named] {
        let conf = good(text, &[]);
        assert_eq!(good(&conf.to_toml(), &[]), conf);
        assert_eq!(good(&conf.to_toml(), &[]).to_toml(), conf.to_toml());
        let json = serde_json::to_string(&conf).expect("a conf has a form in JSON");
        assert_eq!(serde_json::from_str::<Conf>(&json).expect("and is read from it"), conf);
    }
}

#[test]
fn a_parameter_has_the_type_it_is_written_with() {
    let params = good(FULL, &[]).mixture.params;
    assert_eq!(params["long_share"], Param::Float(0.7));
    assert_eq!(params["target"], Param::Text("5B".to_owned()));
    assert_eq!(params["steps"], Param::Int(3));
    assert_eq!(params["whole"], Param::Bool(true));
}

#[test]
fn target_shares_sum_to_one() {
    assert_eq!(Shares::Corpus.targets(), None);
    let table = good(FULL, &[]).mixture.shares.targets().expect("a table has targets");
    assert_eq!(table.into_values().collect::<Vec<_>>(), [0.25, 0.75]);
    for named in [Shares::Slimpajama, Shares::SlimpajamaText] {
        let shares = named.targets().expect("a named set has targets");
        assert_eq!(shares.len(), 7);
        assert!((shares.values().sum::<f64>() - 1.0).abs() < 1e-12);
    }
}

#[test]
fn the_named_shares_are_those_of_the_paper() {
    let sum = |set: [(&str, f64); 7]| set.iter().map(|(_, share)| share).sum::<f64>();
    assert!((sum(SLIMPAJAMA) - 0.9999).abs() < 1e-9, "the authors' code sums to 0.9999");
    assert!((sum(SLIMPAJAMA_TEXT) - 1.0).abs() < 1e-9);
    for ((code, _), (text, _)) in SLIMPAJAMA.iter().zip(&SLIMPAJAMA_TEXT) {
        assert_eq!(code, text);
    }
    assert_eq!(good(SMALL, &["mixture.shares=slimpajama"]).mixture.shares, Shares::Slimpajama);
    assert_eq!(good(SMALL, &["mixture.shares=slimpajama-text"]).mixture.shares, Shares::SlimpajamaText);
}

#[test]
fn counts_and_sizes_are_read_exactly() {
    for (text, count) in [
        ("0", 0),
        ("4096", 4096),
        ("128K", 128_000),
        ("512M", 512_000_000),
        ("5B", 5_000_000_000),
        ("1.5B", 1_500_000_000),
        ("0.001K", 1),
        ("1_000 K", 1_000_000),
        ("9223372036854775807", i64::MAX as u64),
    ] {
        assert_eq!(text.parse(), Ok(Count(count)), "{text}");
    }
    for (text, size) in [
        ("7", 7),
        ("7B", 7),
        ("64KB", 64_000),
        ("512M", 512_000_000),
        ("2GB", 2_000_000_000),
        ("2GiB", 2 << 30),
        ("1.5KiB", 1536),
    ] {
        assert_eq!(text.parse(), Ok(Size(size)), "{text}");
    }
    for bad in [
        "",
        "B",
        "K5",
        "5b",
        "5T",
        "-5",
        "5e9",
        ".5K",
        "5.K",
        "1.2.3K",
        "1.0001K",
        "0.5",
        "9223372036854775808",
        "99999999999B",
        "5MiB",
    ] {
        assert!(bad.parse::<Count>().is_err(), "{bad}");
    }
    for bad in ["2TB", "1.5B", "2 giga", "2gb"] {
        assert!(bad.parse::<Size>().is_err(), "{bad}");
    }
    assert_eq!(Count(5_000_000_000).to_string(), "5B");
    assert_eq!(Count(81_920).to_string(), "81920");
    assert_eq!(Count(0).to_string(), "0");
    assert_eq!(Size(64_000_000).to_string(), "64MB");
}

// --set.

#[test]
fn a_set_overrides_what_the_file_says() {
    let sets = [
        "run.name=x",
        "run . seed = 3",
        "mixture.budget=20M",
        "source.0.url=s3://b/a=b/*.jsonl",
        "train.devices=[\"flex\", \"cuda:0\"]",
        "mixture.shares.\"a.b\"=1",
        "mixture.params.long_share=0.6",
        "mixture.params.keep=true",
        "pack={sequence_tokens=4096}",
        "run.name=last",
    ];
    let conf = good(SMALL, &sets);
    assert_eq!(conf.run.name, "last");
    assert_eq!(conf.run.seed, 3);
    assert_eq!(conf.mixture.budget, Count(20_000_000));
    assert_eq!(conf.source[0].url, "s3://b/a=b/*.jsonl");
    assert_eq!(conf.source[0].name, "s3://b/a=b/*.jsonl");
    assert_eq!(conf.mixture.shares, Shares::Table([("a.b".to_owned(), 1.0)].into()));
    assert_eq!(conf.mixture.params["long_share"], Param::Float(0.6));
    assert_eq!(conf.mixture.params["keep"], Param::Bool(true));
    assert_eq!(conf.pack.sequence_tokens, Count(4096));
    let train = conf.train.expect("--set made the table");
    assert_eq!(train["devices"].as_array().map(Vec::len), Some(2));
}

#[test]
fn a_whole_conf_can_come_from_sets() {
    let sets = [
        "run.name=x",
        "run.output=runs",
        "source.0.url=docs",
        "source.0.format=text",
        "source.0.domain.const=Book",
        "source.1.url=more",
        "source.1.format=parquet",
        "source.1.domain=domain",
        "tokenizer.train.vocab=512",
        "mixture.recipe=r.sql",
        "mixture.budget=1K",
        "pack.sequence_tokens=64",
    ];
    let conf = good("", &sets);
    assert_eq!(conf.source.len(), 2);
    assert_eq!(conf.source[0].domain, Domain::Const(Const { domain: "Book".to_owned() }));
    assert_eq!(conf.source[1].text.as_deref(), Some("text"));
    assert_eq!(conf.tokenizer.train, Some(TrainTokenizer { vocab: 512, sample: Size(32_000_000) }));
}

#[test]
fn a_set_without_equals_is_refused() {
    assert_snapshot!(refused(SMALL, &["run.name"]), @r#"
     x `--set run.name` has no `=`
      ,-[--set:1:1]
    1 | run.name
      : ^^^^|^^^
      :     `-- expected key=value
      `----
     help: for example: --set mixture.budget=10M, --set source.0.url=docs/
    "#);
}

#[test]
fn a_set_whose_key_is_no_key_is_refused() {
    assert_snapshot!(refused(SMALL, &["run..name=x"]), @r#"
     x `--set run..name=x`: what stands before `=` is not a key
      ,-[--set:1:1]
    1 | run..name=x
      : ^^^^|^^^^
      :     `-- expected key.key…
      `----
     help: for example: --set mixture.budget=10M, --set source.0.url=docs/
    "#);
}

#[test]
fn a_set_far_behind_the_last_source_is_refused() {
    assert_snapshot!(refused(SMALL, &["source.5.url=x"]), @r#"
     x `--set source.5.url=x` cannot be done
      ,-[--set:1:1]
    1 | source.5.url=x
      : ^^^^^^|^^^^^
      :       `-- the list has 1, so 0 to 1 can be set, not 5
      `----
    "#);
}

#[test]
fn a_set_below_a_plain_value_is_refused() {
    assert_snapshot!(refused(SMALL, &["run.name.first=x"]), @r#"
     x `--set run.name.first=x` cannot be done
      ,-[--set:1:1]
    1 | run.name.first=x
      : ^^^^^^^|^^^^^^
      :        `-- `first` would have to be in a table, but there is a plain value
      `----
    "#);
}

#[test]
fn a_wrong_value_from_a_set_is_shown_in_the_set() {
    assert_snapshot!(refused(SMALL, &["run.seed=1", "pack.sequence_tokens=many"]), @r#"
     x `pack.sequence_tokens`: "many" is not a number; expected a whole number, or a text with K, M
     | or B (decimal): "128K", "512M", "1.5B"
      ,-[--set:1:22]
    1 | pack.sequence_tokens=many
      :                      ^^|^
      :                        `-- this value
      `----
     help: for example: sequence_tokens = 81920
    "#);
}

#[test]
fn a_wrong_value_inside_a_set_is_shown_in_its_place() {
    assert_snapshot!(refused(SMALL, &["pack = { sequence_tokens = 64, mode = \"concatt\" }"]), @r#"
     x `pack.mode` cannot be "concatt"
      ,-[--set:1:39]
    1 | pack = { sequence_tokens = 64, mode = "concatt" }
      :                                       ^^^^|^^^^
      :                                           `-- did you mean `concat`?
      `----
    "#);
}

#[test]
fn an_unknown_key_from_a_set_is_shown_in_the_set() {
    assert_snapshot!(refused(SMALL, &["pack.sequnce_tokens=64"]), @r#"
     x unknown key `sequnce_tokens` in [pack]
      ,-[--set:1:1]
    1 | pack.sequnce_tokens=64
      : ^^^^^^^^^|^^^^^^^^^
      :          `-- did you mean `sequence_tokens`?
      `----
    "#);
}

#[test]
fn an_unknown_key_inside_a_set_is_shown_in_its_place() {
    assert_snapshot!(refused(SMALL, &["pack={ sequence_tokens = 64, mod = \"concat\" }"]), @r#"
     x unknown key `mod` in [pack]
      ,-[--set:1:30]
    1 | pack={ sequence_tokens = 64, mod = "concat" }
      :                              ^|^
      :                               `-- did you mean `mode`?
      `----
    "#);
}

// The environment.

#[test]
fn variables_are_expanded_in_urls() {
    for (url, expanded) in [
        ("${HOME}/data", "/home/ada/data"),
        ("s3://b/${X:-data}/*.jsonl", "s3://b/data/*.jsonl"),
        ("${CARGO_HOME:-${HOME}/.cargo}/registry", "/home/ada/.cargo/registry"),
        ("${HOME:-${NOT_NEEDED}}", "/home/ada"),
        ("${EMPTY:-full}", "full"),
        ("s3://${X:-data}:9000/${HOME}", "s3://data:9000//home/ada"),
        ("${X:-{a,b}}/*.{c,d}$", "{a,b}/*.{c,d}$"),
    ] {
        let conf = good(SMALL, &[&format!("source.0.url='{url}'")]);
        assert_eq!(conf.source[0].url, expanded);
        assert_eq!(conf.source[0].name, url, "the name is the url as it was written");
    }
}

#[test]
fn variables_are_expanded_in_no_other_text() {
    let conf =
        good(SMALL, &["mixture.params.text=${HOME}", "train.checkpoint=${HOME}/c", "train.text=${HOME}"]);
    assert_eq!(conf.mixture.params["text"], Param::Text("${HOME}".to_owned()));
    let train = conf.train.expect("--set made the table");
    assert_eq!(train["checkpoint"].as_str(), Some("/home/ada/c"));
    assert_eq!(train["text"].as_str(), Some("${HOME}"));
}

#[test]
fn an_unset_variable_is_pointed_at() {
    assert_snapshot!(refused(&changed("${HOME}/src", "/data/${DATA_HOME}/src"), &[]), @r#"
     x the environment variable `DATA_HOME` is not set
       ,-[conf/x.toml:22:14]
    21 | [[source]]
    22 | url = "/data/${DATA_HOME}/src"
       :              ^^^^^|^^^^^
       :                   `-- in this url
    23 | format = "text"
       `----
     help: set it, or give a default: ${DATA_HOME:-…}
    "#);
}

#[test]
fn an_unset_variable_in_a_default_is_pointed_at() {
    assert_snapshot!(refused(SMALL, &["run.output=${A:-x/${B}}/runs"]), @r#"
     x the environment variable `B` is not set
      ,-[--set:1:19]
    1 | run.output=${A:-x/${B}}/runs
      :                   ^|^
      :                    `-- in this url
      `----
     help: set it, or give a default: ${B:-…}
    "#);
}

#[test]
fn a_variable_that_is_never_closed_is_refused() {
    assert_snapshot!(refused(&changed("${HOME}/src", "${HOME/src"), &[]), @r#"
     x this `${` is never closed
       ,-[conf/x.toml:22:8]
    21 | [[source]]
    22 | url = "${HOME/src"
       :        ^^^^^|^^^^
       :             `-- in this url
    23 | format = "text"
       `----
     help: write ${VAR} or ${VAR:-default}
    "#);
}

#[test]
fn an_empty_url_is_refused() {
    assert_snapshot!(refused(SMALL, &["run.output=${X:-}"]), @r#"
     x this url is empty
      ,-[--set:1:12]
    1 | run.output=${X:-}
      :            ^^^|^^
      :               `-- expected a url or a path
      `----
    "#);
}

#[test]
fn a_credential_in_a_url_is_refused_and_not_shown() {
    let shown = refused(&changed("s3://bucket/runs", "s3://AKIA123:hunter2/x@bucket/runs"), &[]);
    assert!(!shown.contains("hunter2") && !shown.contains("AKIA"), "{shown}");
    assert_snapshot!(shown, @r#"
     x this url carries a credential
      ,-[conf/x.toml:5:10]
    4 | seed = 7
    5 | output = "s3://*****************************"
      :          ^^^^^^^^^^^^^^^^^^|^^^^^^^^^^^^^^^^^
      :                            `-- a user, password, key or signature
    6 |
      `----
     help: give credentials in the environment, as the SDKs read them (AWS_ACCESS_KEY_ID,
           GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY, …): what is in a conf ends up
           in manifests
    "#);
}

#[test]
fn a_credential_from_the_environment_is_refused_and_not_shown() {
    refused(SMALL, &["run.output=${HOME:-s3://u:hunter2@bucket}"]);
    let shown = refused(SMALL, &["run.output=${KEYED}"]);
    assert!(!shown.contains("hunter2"), "{shown}");
    assert_snapshot!(shown, @r#"
     x this url carries a credential
      ,-[--set:1:12]
    1 | run.output=${KEYED}
      :            ^^^^|^^^
      :                `-- a user, password, key or signature
      `----
     help: give credentials in the environment, as the SDKs read them (AWS_ACCESS_KEY_ID,
           GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY, …): what is in a conf ends up
           in manifests
    "#);
}

#[test]
fn a_credential_is_not_shown_by_an_error_beside_it() {
    let text =
        changed("name = \"pajama\"", "nam = \"pajama\"").replace("s3://bucket/pajama", "s3://u:hunter2@b");
    let broken = text.replace("nam =", "nam");
    for shown in [refused(&text, &[]), refused(&broken, &[]), refused(&text, &["s3://u:hunter2@b"])] {
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}

#[test]
fn credentials_are_told_from_ordinary_urls() {
    for url in [
        "s3://key:secret@bucket/x",
        "https://token@host/x",
        "s3://key:se/cret@bucket/x",
        "https://a.blob.core.windows.net/c/x?sv=2022&sig=abc",
        "https://b.s3.amazonaws.com/x?X-Amz-Signature=abc",
        "https://host/x?a=1&api_key=abc",
        "abfss://container:key@account.dfs.core.windows.net/x",
        "s3:/key:secret@bucket/x",
        "s3//key:secret@bucket/x",
        "s3:key:secret@bucket/x",
    ] {
        assert!(crate::secret::in_url(url), "{url}");
        let masked = crate::secret::mask(&format!("url=\"{url}\" # what"));
        assert!(masked.starts_with("url=\"") && masked.ends_with("**\" # what"), "{masked}");
    }
    for url in [
        "runs/a@b/c:d",
        "s3://bucket/user@host/a:b",
        "s3://bucket/**/part-?.{a,b}",
        "https://host:9000/x?versionId=1&design=2",
        "http://[::1]/x",
        "abfss://container@account.dfs.core.windows.net/x",
        "s3://${BUCKET:-data}/x",
        "/data/s3/x:y@z",
        "a//b:c@d",
        "s3:bucket/x",
    ] {
        assert!(!crate::secret::in_url(url), "{url}");
        assert_eq!(crate::secret::mask(url), url);
    }
}

// What is wrong in the file.

#[test]
fn what_is_not_toml_is_shown_with_its_place() {
    assert_snapshot!(refused(&changed("seed = 7", "seed = 7 8"), &[]), @r#"
     x this is not TOML: string values must be quoted, expected literal string
      ,-[conf/x.toml:4:8]
    3 | name = "full"
    4 | seed = 7 8
      :        ^|^
      :         `-- here
    5 | output = "s3://bucket/runs"
      `----
    "#);
}

#[test]
fn a_number_too_large_for_toml_is_pointed_at() {
    assert_snapshot!(refused(&changed("seed = 7", "seed = 9223372036854775808"), &[]), @r#"
     x this number is too large
      ,-[conf/x.toml:4:8]
    3 | name = "full"
    4 | seed = 9223372036854775808
      :        ^^^^^^^^^|^^^^^^^^^
      :                 `-- does not fit 64 bits
    5 | output = "s3://bucket/runs"
      `----
     help: whole numbers go from -9223372036854775808 to 9223372036854775807
    "#);
}

#[test]
fn a_misspelt_key_brings_a_suggestion() {
    assert_snapshot!(refused(&changed("sequence_tokens", "sequnce_tokens"), &[]), @r#"
     x unknown key `sequnce_tokens` in [pack]
       ,-[conf/x.toml:51:1]
    50 | [pack]
    51 | sequnce_tokens = 81920
       : ^^^^^^^|^^^^^^
       :        `-- did you mean `sequence_tokens`?
    52 | mode = "best_fit"
       `----
    "#);
}

#[test]
fn an_unknown_key_brings_the_known_ones() {
    assert_snapshot!(refused(&changed("holdout = 0.01", "colour = 1"), &[]), @r#"
     x unknown key `colour` in [mixture]
       ,-[conf/x.toml:34:1]
    33 | budget = "5B"
    34 | colour = 1
       : ^^^|^^
       :    `-- not known here
    35 | shortfall = "allow"
       `----
     help: known here: `recipe`, `budget`, `holdout`, `shortfall`, `long_tokens`, `max_span`,
           `max_copies`, `shares`, `params`
    "#);
}

#[test]
fn of_two_mistakes_the_first_is_shown() {
    assert_snapshot!(refused(&changed("holdout = 0.01", "zebra = 1\napple = 2"), &[]), @r#"
     x unknown key `zebra` in [mixture]
       ,-[conf/x.toml:34:1]
    33 | budget = "5B"
    34 | zebra = 1
       : ^^|^^
       :   `-- not known here
    35 | apple = 2
       `----
     help: known here: `recipe`, `budget`, `holdout`, `shortfall`, `long_tokens`, `max_span`,
           `max_copies`, `shares`, `params`
    "#);
}

#[test]
fn an_unknown_table_brings_a_suggestion() {
    assert_snapshot!(refused(&changed("[engine]", "[engin]"), &[]), @r#"
     x unknown key `engin` in the conf
       ,-[conf/x.toml:56:2]
    55 |
    56 | [engin]
       :  ^^|^^
       :    `-- did you mean `engine`?
    57 | partitions = 4
       `----
    "#);
}

#[test]
fn an_unknown_key_inside_a_rule_is_pointed_at() {
    assert_snapshot!(refused(&changed("{ glob = \"**\", domain", "{ glob = \"**\", domian"), &[]), @r#"
     x unknown key `domian` in [source.domain]
       ,-[conf/x.toml:24:65]
    23 | format = "text"
    24 | domain = [{ glob = "**/*.rs", domain = "Rust" }, { glob = "**", domian = "Other" }]
       :                                                                 ^^^|^^
       :                                                                    `-- did you mean `domain`?
    25 |
       `----
    "#);
}

#[test]
fn a_missing_key_brings_an_example() {
    assert_snapshot!(refused(&changed("budget = \"5B\"\n", ""), &[]), @r#"
     x [mixture] has no `budget`
       ,-[conf/x.toml:31:1]
    30 |
    31 | [mixture]
       : ^^^^|^^^^
       :     `-- `budget` is missing here
    32 | recipe = "sql/mixtures/per_source.sql"
       `----
     help: for example: budget = "5B"
    "#);
}

#[test]
fn a_missing_table_brings_an_example() {
    assert_snapshot!(refused(&SMALL.replace("[pack]\nsequence_tokens = 8192\n", ""), &[]), @r#"
     x [pack] is missing from the conf
       ,-[conf/x.toml:13:15]
    12 | recipe = "sql/mixtures/global.sql"
    13 | budget = "10M"
       :               ^
       :               `-- add it, here or above
       `----
     help: for example:
           [pack]
           sequence_tokens = 81920
    "#);
}

#[test]
fn an_empty_conf_says_what_to_begin_with() {
    assert_snapshot!(refused("", &[]), @r#"
    x [run] is missing from the conf
     ,-[conf/x.toml:1:1]
     `----
    help: for example:
          [run]
          name = "per-source-128k"
          output = "runs"
    "#);
}

#[test]
fn a_source_without_a_url_is_pointed_at() {
    assert_snapshot!(refused(&changed("url = \"books/\"\n", ""), &[]), @r#"
     x [[source]] has no `url`
       ,-[conf/x.toml:16:1]
    15 |
    16 | [[source]]
       : ^^^^^|^^^^
       :      `-- `url` is missing here
    17 | format = "text"
       `----
     help: for example: url = "s3://bucket/slimpajama/**/*.jsonl.zst"
    "#);
}

#[test]
fn a_value_of_the_wrong_type_brings_an_example() {
    assert_snapshot!(refused(&changed("sequence_tokens = 81920", "sequence_tokens = true"), &[]), @r#"
     x `pack.sequence_tokens` must be a whole number, or a text with K, M or B (decimal): "128K",
     | "512M", "1.5B"
       ,-[conf/x.toml:51:19]
    50 | [pack]
    51 | sequence_tokens = true
       :                   ^^|^
       :                     `-- this is `true`
    52 | mode = "best_fit"
       `----
     help: for example: sequence_tokens = 81920
    "#);
}

#[test]
fn a_negative_number_is_refused_where_none_can_be() {
    assert_snapshot!(refused(&changed("max_copies = 2", "max_copies = -2"), &[]), @r#"
     x `mixture.max_copies` must be a whole number from 0 to 4294967295
       ,-[conf/x.toml:38:14]
    37 | max_span = 65_536
    38 | max_copies = -2
       :              ^|
       :               `-- this is the number -2
    39 |
       `----
     help: for example: max_copies = 4
    "#);
}

#[test]
fn a_date_is_of_no_use_anywhere() {
    assert_snapshot!(refused(&changed("name = \"full\"", "name = 2024-02-15"), &[]), @r#"
     x `run.name` must be a text in quotes
      ,-[conf/x.toml:3:8]
    2 | [run]
    3 | name = 2024-02-15
      :        ^^^^^|^^^^
      :             `-- this is a date
    4 | seed = 7
      `----
     help: for example: name = "per-source-128k"
    "#);
}

#[test]
fn a_single_source_in_one_pair_of_brackets_is_explained() {
    assert_snapshot!(refused(&SMALL.replace("[[source]]", "[source]"), &[]), @r#"
     x `source` must be a list
      ,-[conf/x.toml:5:1]
    4 | output = "runs"
    5 | [source]
      : ^^^^|^^^
      :     `-- this is a table
    6 | url = "docs/*.jsonl"
      `----
     help: for example:
           [[source]]
           url = "s3://bucket/slimpajama/**/*.jsonl.zst"
           format = "jsonl"
           domain = "meta.redpajama_set_name"
    "#);
}

#[test]
fn an_unknown_unit_says_which_are_known() {
    assert_snapshot!(refused(&changed("budget = \"5B\"", "budget = \"5T\""), &[]), @r#"
     x `mixture.budget`: "5T" has a unit that is not known here; expected a whole number, or a text
     | with K, M or B (decimal): "128K", "512M", "1.5B"
       ,-[conf/x.toml:33:10]
    32 | recipe = "sql/mixtures/per_source.sql"
    33 | budget = "5T"
       :          ^^|^
       :            `-- this value
    34 | holdout = 0.01
       `----
     help: for example: budget = "5B"
    "#);
}

#[test]
fn an_unknown_word_brings_a_suggestion() {
    assert_snapshot!(refused(&changed("format = \"jsonl\"", "format = \"json\""), &[]), @r#"
     x `source.format` cannot be "json"
       ,-[conf/x.toml:10:10]
     9 | url = "s3://bucket/pajama/**/*.jsonl.zst"
    10 | format = "json"
       :          ^^^|^^
       :             `-- did you mean `jsonl`?
    11 | text = "content.body"
       `----
    "#);
}

#[test]
fn a_word_that_is_no_text_says_which_words_there_are() {
    assert_snapshot!(refused(&changed("mode = \"best_fit\"", "mode = 2"), &[]), @r#"
     x `pack.mode` must be "concat" or "best_fit"
       ,-[conf/x.toml:52:8]
    51 | sequence_tokens = 81920
    52 | mode = 2
       :        |
       :        `-- this is a number
    53 | sequences_per_file = 128
       `----
     help: for example: mode = "concat"
    "#);
}

#[test]
fn an_unknown_set_of_shares_brings_the_known_ones() {
    assert_snapshot!(refused(SMALL, &["mixture.shares=pile"]), @r#"
     x `mixture.shares` cannot be "pile"
      ,-[--set:1:16]
    1 | mixture.shares=pile
      :                ^^|^
      :                  `-- not known here
      `----
     help: known here: `corpus`, `slimpajama`, `slimpajama-text`
    "#);
}

#[test]
fn a_share_that_is_negative_is_pointed_at() {
    assert_snapshot!(refused(&changed("RedPajamaBook = 1", "RedPajamaBook = -1"), &[]), @r#"
     x `mixture.shares.RedPajamaBook` must be a number, not negative
       ,-[conf/x.toml:41:17]
    40 | [mixture.shares]
    41 | RedPajamaBook = -1
       :                 ^|
       :                  `-- this value
    42 | RedPajamaGithub = 3.0
       `----
    "#);
}

#[test]
fn shares_that_are_all_zero_are_refused() {
    assert_snapshot!(refused(SMALL, &["mixture.shares={ a = 0, b = 0.0 }"]), @r#"
     x `mixture.shares` must sum to more than 0, and to a finite number
      ,-[--set:1:16]
    1 | mixture.shares={ a = 0, b = 0.0 }
      :                ^^^^^^^^^|^^^^^^^^
      :                         `-- this value
      `----
    "#);
}

#[test]
fn a_parameter_that_is_a_list_is_refused() {
    assert_snapshot!(refused(&changed("steps = 3", "steps = [3]"), &[]), @r#"
     x `mixture.params.steps`: expected true or false, a number or a text
       ,-[conf/x.toml:47:9]
    46 | target = "5B"
    47 | steps = [3]
       :         ^|^
       :          `-- this value
    48 | whole = true
       `----
    "#);
}

#[test]
fn a_parameter_that_is_no_number_is_refused() {
    assert_snapshot!(refused(&changed("long_share = 0.7", "long_share = nan"), &[]), @r#"
     x `mixture.params.long_share` must be a finite number
       ,-[conf/x.toml:45:14]
    44 | [mixture.params]
    45 | long_share = nan
       :              ^|^
       :               `-- this value
    46 | target = "5B"
       `----
    "#);
}

#[test]
fn a_name_that_is_no_folder_is_refused() {
    assert_snapshot!(refused(&changed("name = \"full\"", "name = \"../full\""), &[]), @r#"
     x `run.name` becomes a folder's name: 1 to 128 letters, digits, `-`, `_` and `.`, with no `.` in
     | front
      ,-[conf/x.toml:3:8]
    2 | [run]
    3 | name = "../full"
      :        ^^^^|^^^^
      :            `-- this value
    4 | seed = 7
      `----
    "#);
    for name in ["", ".", "..", ".hidden", "a b", "a/b", "größe", &"x".repeat(129)] {
        refused(SMALL, &[&format!("run.name='{name}'")]);
    }
}

#[test]
fn two_sources_of_one_name_are_refused() {
    assert_snapshot!(refused(&changed("url = \"books/\"", "url = \"${HOME}/src\""), &[]), @r#"
     x two sources are called "${HOME}/src"
       ,-[conf/x.toml:22:7]
    21 | [[source]]
    22 | url = "${HOME}/src"
       :       ^^^^^^|^^^^^^
       :             `-- the second one
    23 | format = "text"
       `----
     help: documents keep their source's name as `origin`; give each source its own `name`, which is
           its url by default
    "#);
    assert_snapshot!(refused(&changed("url = \"books/\"", "url = \"books/\"\nname = \"pajama\""), &[]), @r#"
     x two sources are called "pajama"
       ,-[conf/x.toml:18:8]
    17 | url = "books/"
    18 | name = "pajama"
       :        ^^^^|^^^
       :            `-- the second one
    19 | format = "text"
       `----
     help: documents keep their source's name as `origin`; give each source its own `name`, which is
           its url by default
    "#);
}

#[test]
fn a_conf_without_a_source_is_refused() {
    let none =
        SMALL.replace("[[source]]\nurl = \"docs/*.jsonl\"\nformat = \"jsonl\"\ndomain = \"domain\"\n", "");
    assert_snapshot!(refused(&none, &[]), @r#"
     x [[source]] is missing from the conf
       ,-[conf/x.toml:11:23]
    10 | [pack]
    11 | sequence_tokens = 8192
       :                       ^
       :                       `-- add it, here or above
       `----
     help: for example:
           [[source]]
           url = "s3://bucket/slimpajama/**/*.jsonl.zst"
           format = "jsonl"
           domain = "meta.redpajama_set_name"
    "#);
    assert_snapshot!(refused(&none, &["source=[]"]), @r#"
     x `source` is empty: a run needs at least one [[source]]
      ,-[--set:1:8]
    1 | source=[]
      :        ^|
      :         `-- this value
      `----
    "#);
}

#[test]
fn a_tokenizer_is_either_loaded_or_trained() {
    assert_snapshot!(refused(&changed("bos = true", "url = \"tokenizer.json\""), &[]), @r#"
     x [tokenizer] has both `url` and `train`
       ,-[conf/x.toml:27:9]
    26 | [tokenizer]
    27 | train = { vocab = 8192, sample = "16MB" }
       :         ^^^^^^^^^^^^^^^^|^^^^^^^^^^^^^^^^
       :                         `-- one of them has to go
    28 | url = "tokenizer.json"
       `----
     help: url = "s3://bucket/tokenizer.json", or train = { vocab = 8192 } on the run's own documents
    "#);
    assert_snapshot!(refused(&SMALL.replace("url = \"tokenizer.json\"", ""), &[]), @r#"
     x [tokenizer] has neither `url` nor `train`
       ,-[conf/x.toml:9:1]
     8 | domain = "domain"
     9 | [tokenizer]
       : ^^^^^|^^^^^
       :      `-- give one of them
    10 |
       `----
     help: url = "s3://bucket/tokenizer.json", or train = { vocab = 8192 } on the run's own documents
    "#);
}

#[test]
fn the_tokens_around_documents_are_asked_for_or_named() {
    for (value, want) in [
        ("true", Special::Own(true)),
        ("false", Special::Own(false)),
        ("32000", Special::Id(32_000)),
        ("\"<|endoftext|>\"", Special::Text("<|endoftext|>".to_owned())),
    ] {
        let conf = good(SMALL, &[&format!("tokenizer.eos={value}")]);
        assert_eq!((&conf.tokenizer.bos, &conf.tokenizer.eos), (&None, &Some(want)));
        assert_eq!(conf.resolved().expect("it is good"), conf);
    }
    assert_snapshot!(refused(&changed("eos = false", "eos = -1"), &[]), @r#"
     x `tokenizer.eos`: expected true or false, a token's text or its id
       ,-[conf/x.toml:29:7]
    28 | bos = true
    29 | eos = -1
       :       ^|
       :        `-- this value
    30 |
       `----
     help: for example: eos = true
    "#);
}

#[test]
fn files_of_format_text_have_no_columns() {
    assert_snapshot!(refused(&changed("domain = { const = \"Book\" }", "domain = \"meta.domain\""), &[]), @r#"
     x files of format text have no columns to take the domain from
       ,-[conf/x.toml:19:10]
    18 | format = "text"
    19 | domain = "meta.domain"
       :          ^^^^^^|^^^^^^
       :                `-- a column
    20 |
       `----
     help: domain = { const = "Book" }, or rules on the file's path: domain = [{ glob = "**/*.rs",
           domain = "Rust" }]
    "#);
    assert_snapshot!(refused(&changed("url = \"books/\"", "url = \"books/\"\ntext = \"body\""), &[]), @r#"
     x `source.text` is a column, and files of format text have none: the whole file is the text
       ,-[conf/x.toml:18:8]
    17 | url = "books/"
    18 | text = "body"
       :        ^^^|^^
       :           `-- this value
    19 | format = "text"
       `----
    "#);
}

#[test]
fn a_bad_glob_is_pointed_at() {
    assert_snapshot!(refused(&changed("glob = \"**/*.rs\"", "glob = \"**/*.[rs\""), &[]), @r#"
     x this is not a glob: unclosed character class; missing ']'
       ,-[conf/x.toml:24:20]
    23 | format = "text"
    24 | domain = [{ glob = "**/*.[rs", domain = "Rust" }, { glob = "**", domain = "Other" }]
       :                    ^^^^^|^^^^
       :                         `-- in this rule
    25 |
       `----
     help: `*` is anything within a name, `**` any folders, `{a,b}` one of these names, `[ab]` one of
           these letters
    "#);
}

#[test]
fn numbers_out_of_range_are_refused() {
    assert_snapshot!(refused(&changed("holdout = 0.01", "holdout = 1"), &[]), @r#"
     x `mixture.holdout` must be 0 or more, and below 1
       ,-[conf/x.toml:34:11]
    33 | budget = "5B"
    34 | holdout = 1
       :           |
       :           `-- this value
    35 | shortfall = "allow"
       `----
    "#);
    let rule =
        |set| refused(SMALL, &[set]).lines().find(|line| !line.trim().is_empty()).unwrap_or("").to_owned();
    let rules = [
        "source.0.max_reject_share=1.5",
        "source.0.max_reject_share=nan",
        "source.0.max_document_bytes=0",
        "source.0.max_document_bytes=2001MB",
        "source.0.text=a..b",
        "source.0.text='\"a.b'",
        "source.0.name=\"\"",
        "source.0.domain=\"\"",
        "source.0.domain={ const = \"\" }",
        "source.0.domain=[]",
        "source.0.domain=[{ glob = '*', domain = '' }]",
        "tokenizer={ train = { vocab = 255 } }",
        "tokenizer={ train = { vocab = 256, sample = 0 } }",
        "mixture.budget=0",
        "mixture.holdout=-0.1",
        "mixture.holdout=4e-7",
        "mixture.long_tokens=0",
        "mixture.max_span=0",
        "mixture.max_copies=0",
        "mixture.max_copies=1001",
        "pack.sequence_tokens=15",
        "pack.sequences_per_file=0",
        "pack.sequences_per_row_group=0",
        "pack.sequences_per_row_group=257",
        "pack={ sequence_tokens = 16777216, sequences_per_row_group = 128 }",
        "pack={ sequence_tokens = 131072, sequences_per_file = 1024, sequences_per_row_group = 513 }",
        "pack={ sequence_tokens = 16, sequences_per_file = 524273 }",
        "engine.partitions=0",
        "engine.memory=63MB",
        "run.seed=-1",
    ]
    .map(|set| format!("{set}\n{}\n", rule(set)));
    assert_snapshot!(rules.join("\n"), @r#"
    source.0.max_reject_share=1.5
      x `source.max_reject_share` must be from 0 to 1

    source.0.max_reject_share=nan
      x `source.max_reject_share` must be from 0 to 1

    source.0.max_document_bytes=0
      x `source.max_document_bytes` must be more than 0, and at most 2GB

    source.0.max_document_bytes=2001MB
      x `source.max_document_bytes` must be more than 0, and at most 2GB

    source.0.text=a..b
      x `source.text` must be a column's name, with dots into nested ones

    source.0.text='"a.b'
      x `source.text` must be a column's name, with dots into nested ones

    source.0.name=""
      x `source.name` is empty

    source.0.domain=""
      x `source.domain` must be a column's name, with dots into nested ones

    source.0.domain={ const = "" }
      x `source.domain` is empty

    source.0.domain=[]
      x `source.domain` has no rules, so no document would have a domain

    source.0.domain=[{ glob = '*', domain = '' }]
      x `source.domain.domain` is empty

    tokenizer={ train = { vocab = 255 } }
      x `tokenizer.train.vocab` must be 256 or more: the bytes come first

    tokenizer={ train = { vocab = 256, sample = 0 } }
      x `tokenizer.train.sample` must be more than 0

    mixture.budget=0
      x `mixture.budget` must be more than 0

    mixture.holdout=-0.1
      x `mixture.holdout` must be 0 or more, and below 1

    mixture.holdout=4e-7
      x `mixture.holdout` must be 0, or a millionth at least

    mixture.long_tokens=0
      x `mixture.long_tokens` must be more than 0

    mixture.max_span=0
      x `mixture.max_span` must be more than 0

    mixture.max_copies=0
      x `mixture.max_copies` must be 1 or more, and at most 1000

    mixture.max_copies=1001
      x `mixture.max_copies` must be 1 or more, and at most 1000

    pack.sequence_tokens=15
      x `pack.sequence_tokens` must be 16 or more, and at most 16777216

    pack.sequences_per_file=0
      x `pack.sequences_per_file` must be 1 or more

    pack.sequences_per_row_group=0
      x `pack.sequences_per_row_group` must be 1 or more

    pack.sequences_per_row_group=257
      x `pack.sequences_per_row_group` must be at most `sequences_per_file`, which is 256

    pack={ sequence_tokens = 16777216, sequences_per_row_group = 128 }
      x `pack.sequences_per_row_group` must be at most 4 where a sequence is 16777216 tokens: a row

    pack={ sequence_tokens = 131072, sequences_per_file = 1024, sequences_per_row_group = 513 }
      x `pack.sequences_per_row_group` must be at most 512 where a sequence is 131072 tokens: a row

    pack={ sequence_tokens = 16, sequences_per_file = 524273 }
      x `pack.sequences_per_file` must be at most 524272 where a row group has 16: a file has at most

    engine.partitions=0
      x `engine.partitions` must be 1 or more

    engine.memory=63MB
      x `engine.memory` must be 64MB or more

    run.seed=-1
      x `run.seed` must be a whole number, not negative
    "#);
}

// The trainer's table, and later stages.

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Trainer {
    steps: u32,
    devices: Vec<String>,
}

#[test]
fn the_trainer_reads_its_own_table() {
    let trainer = Trainer { steps: 100, devices: vec!["flex".to_owned()] };
    let conf = good(FULL, &[]);
    assert_eq!(conf.train::<Trainer>().expect("it is good"), Some(trainer));
    assert_eq!(good(SMALL, &[]).train::<Trainer>().expect("it is good"), None);

    let json = serde_json::to_string(&conf).expect("a conf has a form in JSON");
    let again: Conf = serde_json::from_str(&json).expect("and is read from it");
    assert_eq!(again.train::<Trainer>().expect("it is good"), conf.train().expect("it is good"));
}

#[test]
fn what_the_trainer_cannot_read_is_shown_in_the_conf() {
    let shown = |text: &str, sets: &[&str]| match good(text, sets).train::<Trainer>() {
        Ok(trainer) => panic!("{trainer:?} should be refused"),
        Err(error) => render(&error),
    };
    assert_snapshot!(shown(&changed("steps = 100", "stepz = 100"), &[]), @r#"
     x unknown key `stepz` in [train]
       ,-[conf/x.toml:62:1]
    61 | [train]
    62 | stepz = 100
       : ^^|^^
       :   `-- did you mean `steps`?
    63 | devices = ["flex"]
       `----
    "#);
    assert_snapshot!(shown(FULL, &["train.devices=[1]"]), @r#"
     x `train.devices` must be a text in quotes
      ,-[--set:1:16]
    1 | train.devices=[1]
      :                |
      :                `-- this is the number 1
      `----
    "#);
}

#[test]
fn a_later_stage_can_point_into_the_conf() {
    let conf = good(SMALL, &[]);
    let wrong = |path: &[&str]| render(&conf.wrong(path, "no such recipe", "this file", None));
    assert_snapshot!(wrong(&["mixture", "recipe"]), @r#"
     x no such recipe
       ,-[conf/x.toml:12:10]
    11 | [mixture]
    12 | recipe = "sql/mixtures/global.sql"
       :          ^^^^^^^^^^^^|^^^^^^^^^^^^
       :                      `-- this file
    13 | budget = "10M"
       `----
    "#);
    assert_snapshot!(wrong(&["mixture", "params", "long_share"]), @r#"
     x no such recipe
       ,-[conf/x.toml:11:1]
    10 | url = "tokenizer.json"
    11 | [mixture]
       : ^^^^|^^^^
       :     `-- this file
    12 | recipe = "sql/mixtures/global.sql"
       `----
    "#);

    let json = serde_json::to_string(&conf).expect("a conf has a form in JSON");
    let again: Conf = serde_json::from_str(&json).expect("and is read from it");
    assert_snapshot!(render(&again.wrong(&["mixture", "recipe"], "no such recipe", "this file", None)), @r#"
     x no such recipe
       ,-[the resolved conf:19:10]
    18 | [mixture]
    19 | recipe = "sql/mixtures/global.sql"
       :          ^^^^^^^^^^^^|^^^^^^^^^^^^
       :                      `-- this file
    20 | budget = 10000000
       `----
    "#);
}

proptest! {
    #[test]
    fn a_float_comes_back_from_a_manifest_to_the_last_bit(bits in any::<u64>()) {
        let value = f64::from_bits(bits);
        prop_assume!(value.is_finite());
        let sealed = crate::storage::sealed::seal(&serde_json::json!({ "params": { "x": value } }));
        let opened: serde_json::Value = crate::storage::sealed::open(&sealed).unwrap();
        let param: Param = serde_json::from_value(opened["params"]["x"].clone()).unwrap();
        let Param::Float(back) = param else { panic!("{param:?}") };
        prop_assert_eq!(back.to_bits(), bits);
    }
}

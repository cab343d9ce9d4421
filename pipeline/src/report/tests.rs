use serde_json::json;

use super::*;
use crate::algorithms::strata::{Asked, Repeated, Stratum};
use crate::conf::Conf;
use crate::directory::{Build, Summary};
use crate::hash::Digest;
use crate::output::Input;
use crate::run::Step;
use crate::stages::domains::Domain;
use crate::stages::shuffle::{Placed, Planned};

const MARKUP: &str = "<b>ook & 'son\"";

/// The manifest of a run that kept its promises: 4,000 tokens of one domain and 1,000 of another, half of
/// them in long documents.
fn manifest() -> RunManifest {
    let conf = r#"
        run = { name = "small", output = "out", seed = 7 }
        tokenizer = { url = "t.json" }
        mixture = { recipe = "sql/mixtures/mine.sql", budget = 5000 }
        pack = { sequence_tokens = 100 }
        [[source]]
        url = "a.jsonl"
        name = "a"
        format = "jsonl"
        domain = "d"
    "#;
    let domain = |name: &str, tokens: u64, share: f64| Domain {
        domain: name.into(),
        documents: tokens / 100,
        tokens,
        share,
        target: share,
        long_documents: 3,
        long_tokens: tokens / 4,
        tokens_by_length: vec![tokens * 3 / 4, 0, 0, tokens / 4, 0, 0, 0, 0, 0],
        documents_by_length: vec![0; 9],
        ..Default::default()
    };
    let stratum = |domain: &str, stratum: &str, budget: u64| {
        let long = if stratum == "short" { 0 } else { budget };
        let by_length = vec![budget - long, 0, 0, long, 0, 0, 0, 0, 0];
        let spans = budget / 100;
        Stratum {
            domain: domain.into(),
            stratum: stratum.into(),
            budget,
            available: budget,
            by_length,
            long,
            spans,
        }
    };
    let mixture = Asked {
        strata: vec![
            stratum(MARKUP, "long", 2000),
            stratum(MARKUP, "short", 2000),
            stratum("web", "long", 500),
            stratum("web", "short", 500),
        ],
        most_copies: vec![Repeated {
            doc_id: "ff00aa".into(),
            domain: "web".into(),
            tokens: 12,
            copies: 2.5,
        }],
    };
    let placed = |domain: &str, packed, dropped| Placed { domain: domain.into(), packed, dropped };
    let sql = "-- A mixture of mine.\nselect 1 < 2 as \"x\"\n";
    RunManifest {
        run: "small-0123456789ab".into(),
        build: Build { lengthwise: "0.1.0".into(), ..Default::default() },
        commit: Some("fd24ffb6e8870dc0677b521f99e650d9be5c7e21".into()),
        dirty: true,
        conf_file: "conf/small.toml".into(),
        conf: Conf::parse(conf, "small.toml", &[], &|_| None).unwrap(),
        sql: [("sql/mixtures/mine.sql".to_owned(), sql.to_owned())].into(),
        inputs: vec![Input { url: "a<1>.jsonl".into(), bytes: 1_234_567, blake3: Digest([0xab; 32]) }],
        not_read: Default::default(),
        tokenizer: Digest([0x6d; 32]),
        stages: vec![],
        files: vec![],
        tables: Default::default(),
        summary: Summary {
            counts: [("duplicates".to_owned(), 12), ("rejects".to_owned(), 3)].into(),
            domains: vec![domain(MARKUP, 16_000, 0.8), domain("web", 4_000, 0.2)],
            asked: mixture.clone(),
            drawn: mixture,
            evaluations: Default::default(),
            planned: Planned {
                sequences: 49,
                files: 1,
                padding: 0,
                domains: vec![placed(MARKUP, 3_930, 70), placed("web", 970, 30)],
            },
        },
    }
}

fn attempt() -> Attempt {
    let step = |stage: &str, cached, seconds| Step {
        stage: stage.into(),
        key: "85034fdcd95e655397e878f3fb5b5c17".into(),
        cached,
        seconds,
        ended: String::new(),
        counts: [("heldout_tokens".to_owned(), 9_876)].into(),
        ingredients: Default::default(),
    };
    Attempt {
        started: "2026-11-23T15:33:17.978727498Z".into(),
        seconds: 72.5,
        host: "vm".into(),
        cores: 2,
        steps: vec![step("tokens", true, 0.02), step("pack", false, 33.1)],
        files: vec![],
    }
}

fn metrics() -> Vec<Value> {
    let line = |step: u64| {
        let loss = 9.0 - step as f64 * 0.1;
        json!({ "step": step, "loss": loss, "grad_norm": 1.5, "learning_rate": 2e-5, "tokens": step * 100, "tokens_per_second": 1447.0 })
    };
    (1..=20).map(line).collect()
}

/// The headings of the sections.
fn sections(html: &str) -> Vec<&str> {
    let after = html.split("<section>\n<h2>").skip(1);
    after.filter_map(|rest| rest.split_once("</h2>").map(|(title, _)| title)).collect()
}

/// The text of some HTML: tags and white space become single blanks.
fn words_of(html: &str) -> String {
    let texts = html.split('<').map(|piece| piece.split_once('>').map_or(piece, |(_, text)| text));
    let text = texts.collect::<Vec<_>>().join(" ").replace('\u{202f}', " ");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn what_the_data_says_is_escaped_wherever_it_stands() {
    let mut manifest = manifest();
    manifest.run = "<i>".into();
    manifest.conf_file = "<i>".into();
    manifest.build.lengthwise = "<i>".into();
    manifest.commit = Some("<i>".into());
    manifest.sql.insert("<i>.sql".into(), "</pre><i>".into());
    manifest.inputs[0].url = "<i>".into();
    manifest.summary.drawn.most_copies[0].doc_id = "<i>".into();
    manifest.summary.drawn.strata[0].stratum = "<i>".into();
    let mut attempt = attempt();
    (attempt.host, attempt.started) = ("<i>".into(), "<i>".into());
    (attempt.steps[0].stage, attempt.steps[0].key) = ("<i>".into(), "<i>".into());
    attempt.steps[0].counts.insert("<i>".into(), 1);

    let html = html(&manifest, &attempt, &metrics());
    assert!(!html.contains("<i>") && !html.contains("<b>ook") && !html.contains("ook & "));
    assert!(html.contains("&lt;b&gt;ook &amp; &#39;son&quot;"));
    assert!(html.contains("select 1 &lt; 2 as &quot;x&quot;"));
}

#[test]
fn the_head_says_what_the_run_is_and_whether_it_kept_its_promises() {
    let manifest = manifest();
    let html = html(&manifest, &attempt(), &[]);
    let (head, _) = html.split_once("</header>").unwrap();
    let (_, head) = head.split_once("<header>").unwrap();
    let lines = head.replace("</dd></div>", "\u{1e}").replace("</p>", "\u{1e}").replace("</li>", "\u{1e}");
    let lines = lines.replace("</h1>", "\u{1e}").replace("</h2>", "\u{1e}");
    let text: Vec<String> = lines.split('\u{1e}').map(words_of).filter(|line| !line.is_empty()).collect();
    insta::assert_snapshot!(text.join("\n"), @r"
    lengthwise run
    small-0123456789ab
    mine drew 5 000 tokens from 200 documents in 2 domains, packed into 49 sequences of 100 tokens. Long documents, of more than 4 096 tokens, hold 50.0 % of the tokens drawn; in the corpus they hold 25.0 %.
    A mixture of mine.
    It did what the recipe asked
    kept The budget is met: 5 000 tokens are drawn.
    kept Every stratum of a domain has the tokens that the recipe asked for, to the token.
    kept Domain shares are within 0.2 points of their targets: the farthest, web, by +0.00.
    kept Nothing is lost: 4 900 tokens are packed, 100 are the dropped tail, together all that is drawn.
    budget 5 000 tokens
    drawn 5 000 tokens
    packed 4 900 tokens
    dropped 100 tokens, the last sequence
    sequences 49 × 100 tokens
    documents 200 with 20 000 tokens
    duplicates 12 documents, left out
    rejects 3 source rows
    held out 0 documents
    recipe sql/mixtures/mine.sql
    conf conf/small.toml
    commit fd24ffb6e887 with uncommitted changes
    seed 7
    tokenizer 6d6d6d6d6d6d
    lengthwise 0.1.0
    ");
}

#[test]
fn a_section_without_data_is_not_there() {
    let mut manifest = manifest();
    manifest.summary.asked.strata[0].budget += 500;
    let all = [
        "Before and after",
        "Domains",
        "Strata",
        "What fell short",
        "Documents repeated most",
        "Training",
        "Lineage",
        "Inputs, conf and SQL",
    ];
    assert_eq!(sections(&html(&manifest, &attempt(), &metrics())), all);

    manifest.summary.asked = manifest.summary.drawn.clone();
    for mixture in [&mut manifest.summary.asked, &mut manifest.summary.drawn] {
        mixture.strata.iter_mut().for_each(|stratum| stratum.stratum.clear());
        mixture.most_copies[0].copies = 1.0;
    }
    let bare = html(&manifest, &Attempt { steps: vec![], ..attempt() }, &[]);
    assert_eq!(sections(&bare), ["Before and after", "Domains", "Inputs, conf and SQL"]);

    manifest.summary.domains.clear();
    let empty = html(&manifest, &Attempt { steps: vec![], ..attempt() }, &[]);
    assert_eq!(sections(&empty), ["Inputs, conf and SQL"]);
}

#[test]
fn every_number_of_a_domain_is_in_its_row() {
    let html = html(&manifest(), &attempt(), &[]);
    let rows: Vec<String> = html.split("<tr>").map(words_of).collect();
    // between them stand the shares by length, the chart's text for people who cannot see it
    let row = |start: &str, end: &str| {
        let found =
            rows.iter().find(|row| row.starts_with(start)).unwrap_or_else(|| panic!("no row of {start}"));
        let found = found.split(" Shares in").next().unwrap();
        assert!(found.ends_with(end), "{found}");
    };
    let book = "&lt;b&gt;ook &amp; &#39;son&quot;";
    row(&format!("{book} 160 16 000"), "80.0 80.0 80.0 +0.00 25.0 50.0 0.25 4 000 3 930 70");
    row("web 40 4 000", "20.0 20.0 20.0 +0.00 25.0 50.0 0.25 1 000 970 30");
    row("all 200 20 000", "100.0 100.0 100.0 25.0 50.0 0.25 5 000 4 900 100");
}

#[test]
fn a_share_is_flagged_where_it_is_more_than_a_fifth_of_a_point_from_its_target() {
    let flags = |target: f64| {
        let mut manifest = manifest();
        manifest.summary.domains[0].target = target;
        html(&manifest, &attempt(), &[]).matches("class=\"far\"").count()
    };
    assert_eq!((flags(0.8), flags(0.7985), flags(0.7975), flags(0.8025)), (0, 0, 1, 1));
}

#[test]
fn what_falls_short_is_said_first_and_listed_with_what_was_asked() {
    let mut manifest = manifest();
    manifest.summary.asked.strata[3].budget = 800;
    manifest.summary.domains.push(Domain { domain: "absent".into(), target: 0.05, ..Default::default() });
    let html = html(&manifest, &attempt(), &[]);
    let text = words_of(&html);
    assert!(text.contains("It did not do all that the recipe asked"));
    assert!(text.contains("broken web (short) has 500 tokens, where the recipe asked for 800."));
    assert!(text.contains("web short 800 500 62.5"));
    assert!(text.contains("absent should have 5.0 % of the tokens, but has no documents."));
}

#[test]
fn a_budget_that_is_not_met_and_tokens_that_are_lost_are_broken_promises() {
    let mut manifest = manifest();
    manifest.conf.mixture.budget.0 = 10_000;
    manifest.summary.planned.domains[0].packed -= 1;
    let text = words_of(&html(&manifest, &attempt(), &[]));
    assert!(text.contains("broken The budget is not met: 5 000 tokens are drawn of 10 000, 50.0 % of it."));
    assert!(text.contains("broken 4 899 tokens packed and 100 dropped are not the 5 000 that are drawn."));
}

#[test]
fn a_recipe_that_means_other_shares_is_noted_and_not_called_broken() {
    let mut manifest = manifest();
    manifest.summary.domains[0].target = 0.5;
    manifest.summary.domains[1].target = 0.5;
    let text = words_of(&html(&manifest, &attempt(), &[]));
    assert!(text.contains("note The recipe itself asks for other shares than the targets"), "{text:.1500}");
    assert!(text.contains("It did what the recipe asked"));
}

#[test]
fn a_long_share_from_conf_or_header_is_held_against_every_domain() {
    let mut manifest = manifest();
    let recipe = manifest.conf.mixture.recipe.clone();
    manifest.sql.insert(recipe, "-- Mine.\n--   $long_share  double = 0.45  of all\nselect 1".into());
    let text = words_of(&html(&manifest, &attempt(), &[]));
    assert!(text.contains(
        "kept Long documents have 50.0 % of all tokens; $long_share is 45.0 %, reached in every domain."
    ));

    manifest.conf.mixture.params.insert("long_share".into(), crate::conf::Param::Float(0.7));
    let text = words_of(&html(&manifest, &attempt(), &[]));
    assert!(text.contains("note Long documents have 50.0 % of all tokens; $long_share is 70.0 %, less in"));
    assert!(text.contains("web (50.0 %)"));
}

#[test]
fn a_loss_that_is_not_finite_is_shown_as_such() {
    let mut metrics = metrics();
    metrics[19]["loss"] = Value::Null;
    let text = words_of(&html(&manifest(), &attempt(), &metrics));
    assert!(text.contains("final loss not a number nats a token, from 8.900"), "{text}");
}

#[test]
fn a_long_training_is_drawn_with_few_points() {
    let points: Vec<(f64, f64)> =
        (1..=100_000).map(|step| (f64::from(step), 1.0 / f64::from(step))).collect();
    let svg = curve("Loss", "large", &points);
    assert!(svg.len() < 20_000 && svg.contains("means of 200 steps"), "{} bytes", svg.len());
}

#[test]
fn only_the_first_source_files_are_listed() {
    let mut manifest = manifest();
    let input = manifest.inputs[0].clone();
    manifest.inputs = (0..1_023).map(|i| Input { url: format!("file-{i}."), ..input.clone() }).collect();
    let html = html(&manifest, &attempt(), &[]);
    assert!(html.contains("file-19.") && !html.contains("file-20."));
    assert!(words_of(&html).contains("and 1 003 more, in manifest.json"));
}

#[test]
fn every_element_that_is_opened_is_closed_in_its_order() {
    let html = html(&manifest(), &attempt(), &metrics());
    let mut open = vec![];
    for tag in html.split('<').skip(1) {
        let name = tag.split(|c: char| c.is_whitespace() || c == '>').next().unwrap();
        let empty = ["!doctype", "meta"].contains(&name) || tag.split('>').next().unwrap().ends_with('/');
        match name.strip_prefix('/') {
            Some(closed) => assert_eq!(open.pop(), Some(closed), "before {tag:.60}"),
            None if !empty => open.push(name),
            None => {}
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

#[test]
fn the_file_fetches_nothing_and_runs_nothing() {
    let html = html(&manifest(), &attempt(), &metrics());
    for needle in ["http:", "https:", "url(", "@import", "<script", "<link", "src=", "href="] {
        assert!(!html.contains(needle), "{needle}");
    }
}

#[test]
fn numbers_are_grouped_and_lengths_of_time_are_said_as_people_say_them() {
    assert_eq!(
        [0, 999, 1_000, 1_234_567].map(number),
        ["0", "999", "1\u{202f}000", "1\u{202f}234\u{202f}567"]
    );
    assert_eq!(
        [0.021, 33.14, 725.4, 11_520.0].map(duration),
        ["21 ms", "33.1 s", "12 min 5 s", "3 h 12 min"]
    );
    assert_eq!([0.0, -0.00001, -0.0123, 0.0123].map(points), ["+0.00", "+0.00", "\u{2212}1.23", "+1.23"]);
    assert_eq!([17, 68_758_469].map(bytes), ["17 bytes", "68.8\u{202f}MB"]);
}

//! Files made to exhaust memory: small on disk, huge when read. A run over them must not take much more
//! memory than one without them.

use std::io::Write;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{RecordBatch, StringArray, StructArray};
use arrow::datatypes::{DataType, Field, Fields, Schema};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;

use crate::project::{Project, terminate};

/// Runs up to the stage `tokens`. Returns the exit code, the peak resident memory in MB, and stderr.
fn run(project: &Project, sets: &[&str]) -> (i32, u64, String) {
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let arguments: Vec<&str> = ["run", "conf.toml", "--until", "tokens"].into_iter().chain(sets).collect();
    let mut command = project.command(&arguments);
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut most = 0;
    let code = loop {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        most = most.max(kilobytes.unwrap_or(0) / 1024);
        if let Some(code) = child.try_wait().unwrap() {
            break code.code().unwrap_or(-1);
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let said = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
    (code, most, said)
}

/// A folder with a corpus and its tokenizer, and the peak memory in MB of a run over it.
fn ordinary() -> (Project, u64) {
    let project = Project::new(5);
    project.keep_tokenizer();
    let (code, most, said) = run(&project, &["run.output=before"]);
    assert_eq!(code, 0, "{said}");
    (project, most)
}

/// JSON lines, one of which has a text of `bytes` bytes.
fn bomb(mut out: impl Write, bytes: usize) {
    writeln!(out, r#"{{"text":"before","meta":{{"set":"web"}}}}"#).unwrap();
    out.write_all(br#"{"meta":{"set":"web"},"text":""#).unwrap();
    let some = vec![b'a'; 1 << 20];
    (0..bytes >> 20).for_each(|_| out.write_all(&some).unwrap());
    out.write_all(b"\"}\n").unwrap();
    writeln!(out, r#"{{"text":"after","meta":{{"set":"web"}}}}"#).unwrap();
}

#[test]
fn a_line_of_five_gigabytes_in_a_small_file_is_a_reject_and_takes_no_memory() {
    let (project, before) = ordinary();
    let mut zst = zstd::Encoder::new(vec![], 1).unwrap();
    bomb(&mut zst, 5 << 30);
    project.write("in/b.jsonl.zst", zst.finish().unwrap());
    let mut gz = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    bomb(&mut gz, 1 << 30);
    project.write("in/c.jsonl.gz", gz.finish().unwrap());
    // a line may be as long as its text with every letter escaped
    let sets = ["source.0.max_reject_share=0.5", "source.0.max_document_bytes=1MB"];
    let (code, most, said) = run(&project, &sets);
    assert_eq!(code, 0, "{said}");
    assert!(most < before + 100, "{most} MB, {before} MB without: {said}");
    let sql = "select file, line, reason from rejects order by file";
    let rejects = project.say(&["sql", "conf.toml", sql, "--json", "--set", sets[0], "--set", sets[1]]);
    let lines: Vec<&str> = rejects.out.lines().collect();
    assert_eq!(lines.len(), 2, "{rejects:?}");
    for (line, file) in lines.iter().zip(["b.jsonl.zst", "c.jsonl.gz"]) {
        assert!(line.contains(file) && line.contains(r#""line":2"#) && line.contains("too_long"), "{line}");
    }
}

#[test]
fn a_parquet_file_whose_pages_say_the_same_text_thousands_of_times_takes_no_memory() {
    let (project, before) = ordinary();
    let text = "a ".repeat(1 << 19);
    let set = Fields::from(vec![Field::new("set", DataType::Utf8, false)]);
    let schema = Arc::new(Schema::new(vec![
        Field::new("text", DataType::Utf8, false),
        Field::new("meta", DataType::Struct(set.clone()), false),
    ]));
    let properties = WriterProperties::builder().set_dictionary_page_size_limit(64 << 20).build();
    let mut writer = ArrowWriter::try_new(vec![], schema.clone(), Some(properties)).unwrap();
    for _ in 0..60 {
        let texts = Arc::new(StringArray::from(vec![text.as_str(); 50]));
        let sets = StructArray::new(set.clone(), vec![Arc::new(StringArray::from(vec!["web"; 50]))], None);
        writer.write(&RecordBatch::try_new(schema.clone(), vec![texts, Arc::new(sets)]).unwrap()).unwrap();
    }
    project.write("bomb/a.parquet", writer.into_inner().unwrap());
    assert!(std::fs::metadata(project.path("bomb/a.parquet")).unwrap().len() < 20 << 20);
    let (code, most, said) = run(&project, &["source.0.url=bomb/*", "source.0.format=parquet"]);
    assert_eq!(code, 0, "{said}");
    // the file holds one document three thousand times
    assert!(most < before + 600, "{most} MB, {before} MB without: {said}");
    let documents = "select count(*) as n from documents";
    let sets = ["--set", "source.0.url=bomb/*", "--set", "source.0.format=parquet"];
    let said = project.say(&[&["sql", "conf.toml", documents, "--json"][..], &sets].concat());
    assert!(said.out.contains(r#""n":1"#), "{said:?}");
}

#[test]
fn millions_of_bad_rows_in_a_small_file_take_no_memory() {
    let (project, before) = ordinary();
    project.write("in/b.jsonl", "1\n".repeat(8 << 20));
    let (code, most, said) = run(&project, &["source.0.max_reject_share=1", "engine.partitions=2"]);
    assert_eq!(code, 0, "{said}");
    assert!(most < before + 1500, "{most} MB, {before} MB without: {said}");
}

/// Recipes that never end: one recurses endlessly, and one works on a single batch for years.
pub const ENDLESS: [&str; 2] = [
    "-- Endless.
-- One row: a document.
with recursive n as (select 1 as i union all select i + 1 as i from n),
     spans as (select doc_id, 0 as start, tokens as stop, 1.0 * (select count(*) from n) as copies from documents)
     select doc_id, start, stop, copies from spans",
    "-- Endless.
-- One row: a document.
with pairs as (
         select a.doc_id, count(*) as n from documents a cross join documents b cross join documents c cross join documents d
         where a.tokens < b.tokens + c.tokens + d.tokens group by a.doc_id
     ),
     spans as (
         select documents.doc_id, 0 as start, documents.tokens as stop, 1.0 * pairs.n as copies
         from documents inner join pairs on documents.doc_id = pairs.doc_id
     )
     select doc_id, start, stop, copies from spans",
];

#[test]
fn a_recipe_that_never_ends_is_ended_by_the_clock_and_by_a_signal() {
    let project = Project::new(5);
    project.keep_tokenizer();
    assert_eq!(project.say(&["run", "conf.toml", "--until", "domains"]).code, 0);
    for (i, recipe) in ENDLESS.iter().enumerate() {
        project.write("endless.sql", recipe);
        let run = ["run", "conf.toml", "--set", "mixture.recipe=endless.sql"];
        let said = project.say(&[&run[..], &["--set", "engine.recipe_seconds=2"]].concat());
        assert_eq!(said.code, 3, "{i}: {said:?}");
        assert!(said.err.contains("endless.sql has run for 2 seconds"), "{said:?}");
        assert!(said.err.contains("engine.recipe_seconds"), "{said:?}");

        let mut child = project.command(&run).spawn().unwrap();
        std::thread::sleep(Duration::from_secs(2));
        terminate(&child);
        let told = std::time::Instant::now();
        assert_eq!(child.wait().unwrap().code(), Some(75));
        assert!(told.elapsed() < Duration::from_secs(5), "{:?}", told.elapsed());
    }
    assert_eq!(project.say(&["run", "conf.toml"]).code, 0);
}

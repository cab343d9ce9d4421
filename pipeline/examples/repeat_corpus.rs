//! Repeats a corpus several times with distinct documents, to measure what grows with it:
//!
//!     cargo run --release --example repeat_corpus -- CORPUS DIR TIMES
//!
//! CORPUS is a folder of JSONL.zst files with a `text` in each line. DIR gets TIMES files for each of them,
//! whose texts begin with the number of the repetition.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [corpus, to, times] = &arguments[..] else { return Err("see the top of the file".into()) };
    let (to, times): (&Path, usize) = (Path::new(to), times.parse()?);
    std::fs::create_dir_all(to)?;
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(corpus)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.retain(|path| path.to_string_lossy().ends_with(".jsonl.zst"));
    files.sort();
    for path in files {
        let lines = BufReader::new(zstd::Decoder::new(File::open(&path)?)?).lines();
        let documents: Vec<Value> =
            lines.map(|line| Ok(serde_json::from_str(&line?)?)).collect::<Result<_, std::io::Error>>()?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for time in 0..times {
            let mut out = zstd::Encoder::new(File::create(to.join(format!("{time:04}-{name}")))?, 1)?;
            for document in &documents {
                let mut document = document.clone();
                let text = format!("{time} {}", document["text"].as_str().ok_or("a document without text")?);
                document["text"] = text.into();
                serde_json::to_writer(&mut out, &document)?;
                out.write_all(b"\n")?;
            }
            out.finish()?;
        }
    }
    Ok(())
}

//! Measures how fast documents are tokenised on one core, and with `--check` whether the ids are those of
//! Hugging Face's `tokenizers`.
//!
//!     cargo run --release --example tokenizer_speed -- TOKENIZER.json CORPUS.jsonl.zst… [--check]

use std::io::BufRead;
use std::time::Instant;

use lengthwise::algorithms::tokenizer::Tokenizer;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--check").collect();
    let check = std::env::args().any(|a| a == "--check");
    let tokenizer = Tokenizer::from_json(&std::fs::read(&arguments[0])?, &arguments[0])?;
    let mut texts = vec![];
    for path in &arguments[1..] {
        for line in std::io::BufReader::new(zstd::Decoder::new(std::fs::File::open(path)?)?).lines() {
            let row: serde_json::Value = serde_json::from_str(&line?)?;
            texts.push(row["text"].as_str().unwrap_or_default().to_owned());
        }
    }
    let bytes: usize = texts.iter().map(String::len).sum();
    println!("{} documents, {bytes} bytes, cut into pieces: {}", texts.len(), tokenizer.is_cut());
    let mut rates = vec![];
    for _ in 0..5 {
        let started = Instant::now();
        let mut encoder = tokenizer.encoder();
        let (mut ids, mut tokens) = (vec![], 0);
        for text in &texts {
            ids.clear();
            encoder.encode(text, &mut ids)?;
            tokens += ids.len();
        }
        let rate = tokens as f64 / started.elapsed().as_secs_f64() / 1e6;
        println!("{tokens} tokens, {rate:.1} M tokens/s");
        rates.push(rate);
    }
    rates.sort_by(f64::total_cmp);
    println!("median of five: {:.1} M tokens/s", rates[2]);

    let all = texts.concat();
    for length in [3_000, 30_000, 300_000, 3_000_000, 30_000_000] {
        let pieces: Vec<&str> =
            all.as_bytes().chunks(length).filter_map(|c| std::str::from_utf8(c).ok()).collect();
        let mut encoder = tokenizer.encoder();
        let (mut ids, mut tokens) = (vec![], 0);
        let started = Instant::now();
        for text in &pieces {
            ids.clear();
            encoder.encode(text, &mut ids)?;
            tokens += ids.len();
        }
        let rate = tokens as f64 / started.elapsed().as_secs_f64() / 1e6;
        println!("texts of {length} bytes: {rate:.1} M tokens/s ({} texts)", pieces.len());
    }
    if check {
        let mut encoder = tokenizer.encoder();
        let mut different = 0;
        for text in &texts {
            let mut ids = vec![];
            encoder.encode(text, &mut ids)?;
            different += usize::from(ids != tokenizer.encode_plain(text)?);
        }
        println!(
            "{different} of {} documents have other ids than Hugging Face's tokenizers gives",
            texts.len()
        );
    }
    Ok(())
}

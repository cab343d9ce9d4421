//! Writes a catalog of N made-up documents, to measure how recipes and previews scale without tokenising
//! anything.
//!
//!     cargo run --release --example synthetic_catalog -- 100000000 /tmp/catalog
//!
//! The files are like those of the stage *catalog*: sorted by doc_id, within and across files. Lengths are
//! log-normal by domain, roughly those of SlimPajama's seven domains.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{FixedSizeBinaryArray, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

/// Per domain: its share of the documents, and the mean and the standard deviation of the logarithm of their
/// tokens.
const DOMAINS: [(&str, f64, f64, f64); 7] = [
    ("RedPajamaC4", 0.480, 5.9, 1.0),
    ("RedPajamaCommonCrawl", 0.310, 6.9, 1.3),
    ("RedPajamaStackExchange", 0.100, 5.9, 0.8),
    ("RedPajamaWikipedia", 0.053, 6.1, 1.2),
    ("RedPajamaGithub", 0.052, 6.6, 1.5),
    ("RedPajamaArXiv", 0.0045, 9.4, 0.8),
    ("RedPajamaBook", 0.0005, 11.5, 0.9),
];

const FILE_ROWS: u64 = 1 << 20;
const GROUP_ROWS: u64 = 65_536;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [rows, folder] = arguments.as_slice() else {
        eprintln!("usage: synthetic_catalog N DIR");
        std::process::exit(2);
    };
    let rows: u64 = rows.parse().expect("N is a number of documents");
    std::fs::create_dir_all(folder).expect("DIR can be created");
    for (file, from) in (0..rows).step_by(FILE_ROWS as usize).enumerate() {
        let path = Path::new(folder).join(format!("catalog-{file:05}.parquet"));
        write_file(&path, from, (from + FILE_ROWS).min(rows), rows);
    }
}

fn write_file(path: &Path, from: u64, to: u64, rows: u64) {
    let schema = Arc::new(Schema::new(vec![
        Field::new("doc_id", DataType::FixedSizeBinary(16), false),
        Field::new("domain", DataType::Utf8, false),
        Field::new("tokens", DataType::Int64, false),
        Field::new("bytes", DataType::Int64, false),
        Field::new("origin", DataType::Utf8, false),
    ]));
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1).expect("1 is a level")))
        .set_max_row_group_row_count(Some(GROUP_ROWS as usize))
        .build();
    let file = File::create(path).expect("DIR can be written");
    let mut writer = ArrowWriter::try_new(file, schema.clone(), Some(properties)).expect("a valid schema");
    for begin in (from..to).step_by(GROUP_ROWS as usize) {
        let group: Vec<_> = (begin..to.min(begin + GROUP_ROWS)).map(|i| document(i, rows)).collect();
        let batch = RecordBatch::try_new(
            schema.clone(),
            vec![
                Arc::new(
                    FixedSizeBinaryArray::try_from_iter(group.iter().map(|d| d.0)).expect("16 bytes each"),
                ),
                Arc::new(StringArray::from_iter_values(group.iter().map(|d| d.1))),
                Arc::new(Int64Array::from_iter_values(group.iter().map(|d| d.2))),
                Arc::new(Int64Array::from_iter_values(group.iter().map(|d| d.2 * 4))),
                Arc::new(StringArray::from_iter_values(group.iter().map(|_| "synthetic"))),
            ],
        );
        writer.write(&batch.expect("columns as the schema has them")).expect("DIR can be written");
    }
    writer.close().expect("DIR can be written");
}

/// The doc_id, domain and tokens of the i-th of n documents. Ids ascend with i: the i-th is random within the
/// i-th of n equal parts of the range.
fn document(i: u64, n: u64) -> ([u8; 16], &'static str, i64) {
    let random = |salt: u64| mix(i.wrapping_mul(8).wrapping_add(salt));
    let part = u64::MAX / n;
    let mut id = [0; 16];
    id[..8].copy_from_slice(&(i * part + random(0) % part).to_be_bytes());
    id[8..].copy_from_slice(&random(1).to_be_bytes());

    let unit = |salt: u64| (random(salt) >> 11) as f64 / (1u64 << 53) as f64;
    let mut place = unit(2);
    let domain = DOMAINS.iter().find(|(_, share, ..)| {
        place -= share;
        place < 0.0
    });
    let (name, _, mean, deviation) = domain.unwrap_or(&DOMAINS[0]);
    // a normal variate, by the Box–Muller transform
    let normal = libm::sqrt(-2.0 * libm::log(1.0 - unit(3))) * libm::cos(std::f64::consts::TAU * unit(4));
    let tokens = libm::exp(mean + deviation * normal).clamp(1.0, 3e6) as i64;
    (id, name, tokens)
}

/// SplitMix64.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678_9abc_def1);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

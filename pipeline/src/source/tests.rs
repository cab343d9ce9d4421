use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::StreamExt;
use futures::stream::BoxStream;
use globset::Glob;
use object_store::chunked::ChunkedStore;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};

use super::*;
use crate::Error;

/// What became of a row: domain and text, `None` if the text is empty, or the reason why it was rejected.
type Fate = Result<Option<(String, String)>, Reason>;

/// A row as tests compare it: part, line and fate.
type Seen = (u32, u64, Fate);

fn column(path: &str) -> Column {
    Column::parse(path).unwrap()
}

fn spec(format: Format) -> Arc<Spec> {
    Arc::new(Spec {
        origin: "test".into(),
        format,
        text: column("text"),
        domain: DomainRule::Column(column("meta.set")),
        max_document_bytes: 1000,
    })
}

fn changed(spec: &Arc<Spec>, change: impl FnOnce(&mut Spec)) -> Arc<Spec> {
    let mut spec = (**spec).clone();
    change(&mut spec);
    Arc::new(spec)
}

fn reader(store: &Arc<dyn ObjectStore>) -> Reader {
    Reader { store: store.clone(), spool: std::env::temp_dir(), stop: Arc::default() }
}

fn memory() -> Arc<dyn ObjectStore> {
    Arc::new(InMemory::new())
}

async fn put(store: &Arc<dyn ObjectStore>, path: &str, bytes: impl Into<Vec<u8>>) {
    store.put(&path.into(), bytes.into().into()).await.unwrap();
}

async fn list_all(
    store: &Arc<dyn ObjectStore>,
    path: &str,
    format: Format,
) -> Result<Vec<SourceFile>, Error> {
    Ok(all_of(store, path, format, &[]).await?.files)
}

async fn all_of(
    store: &Arc<dyn ObjectStore>,
    path: &str,
    format: Format,
    own: &[Path],
) -> Result<Listing, Error> {
    list(&**store, &Path::parse(path).unwrap(), &format!("mem://{path}"), format, own).await
}

/// Lists a local path.
async fn on_disk(path: &std::path::Path, format: Format) -> Result<Listing, Error> {
    let url = path.to_str().unwrap();
    list(&LocalFileSystem::new(), &Path::parse(url).unwrap(), url, format, &[]).await
}

/// All rows of a file, folder or glob.
async fn scan(
    store: &Arc<dyn ObjectStore>,
    path: &str,
    spec: &Arc<Spec>,
) -> Result<(Vec<Seen>, Vec<FileSummary>), Error> {
    let (mut rows, mut files) = (Vec::new(), Vec::new());
    for unit in units(list_all(store, path, spec.format).await?) {
        let mut parts = reader(store).parts(unit, spec.clone(), |_| false);
        while let Some(part) = parts.next().await? {
            part.rows(spec, &mut |row| {
                let outcome = row.outcome.map(|d| d.map(|d| (d.domain.to_owned(), d.text.to_owned())));
                rows.push((part.index, row.line, outcome.map_err(|reject| reject.reason)));
                Ok(())
            })?;
        }
        files.extend_from_slice(parts.files());
    }
    Ok((rows, files))
}

/// The details of a file's rejects.
async fn details(store: &Arc<dyn ObjectStore>, path: &str, spec: &Arc<Spec>) -> Vec<String> {
    let mut details = Vec::new();
    for unit in units(list_all(store, path, spec.format).await.unwrap()) {
        let mut parts = reader(store).parts(unit, spec.clone(), |_| false);
        while let Some(part) = parts.next().await.unwrap() {
            part.rows(spec, &mut |row| {
                details.extend(row.outcome.err().map(|reject| reject.detail));
                Ok(())
            })
            .unwrap();
        }
    }
    details
}

/// The message and help of an error that must be one with advice.
fn words<T>(result: Result<T, Error>) -> String {
    match result.map(|_| ()) {
        Err(Error::Data { message, help } | Error::Usage { message, help }) => {
            format!("{message}\n{}", help.unwrap_or_default())
        }
        other => panic!("such an error was expected, not {other:?}"),
    }
}

fn document(text: &str) -> Fate {
    Ok(Some(("d".to_owned(), text.to_owned())))
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

mod rows_of_jsonl {
    use super::*;

    /// Lines with what becomes of them; a blank line gives no row.
    fn good_and_bad_lines() -> Vec<(Vec<u8>, Option<Fate>)> {
        let line = |line: &str, outcome| (line.as_bytes().to_vec(), Some(outcome));
        let bad = |text: &str, reason| line(text, Err(reason));
        vec![
            line("\u{feff}{\"text\":\"plain\",\"meta\":{\"set\":\"d\"}}", document("plain")),
            line(
                r#"{"meta":{"x":[1,{"set":0}],"set":"d"},"id":1e999,"text":"a\n\"b\" \u00e9\ud83d\ude00"}"#,
                document("a\n\"b\" é😀"),
            ),
            (b"  \t ".to_vec(), None),
            (Vec::new(), None),
            line("{\"text\":\"windows\",\"meta\":{\"set\":\"d\"}}\r", document("windows")),
            bad(r#"{"text":"cut off","meta":{"set":"d"#, Reason::NotJson),
            bad(r#"{"text":"a","meta":{"set":"d"}} {}"#, Reason::NotJson),
            bad(r#"{"text":"\ud800 alone","meta":{"set":"d"}}"#, Reason::NotJson),
            bad(
                &format!(r#"{{"text":{}0{},"meta":{{"set":"d"}}}}"#, "[".repeat(100_000), "]".repeat(99_999)),
                Reason::TooLong,
            ),
            bad(&format!(r#"{{"x":{}}}"#, "[".repeat(30_000)), Reason::NotJson),
            bad(
                &format!(r#"{{"text":{}{}}}"#, "[".repeat(30_000), "]".repeat(30_000)),
                Reason::TextNotAString,
            ),
            bad(r#"["text"]"#, Reason::NotAnObject),
            bad("null", Reason::NotAnObject),
            bad(r#"{"meta":{"set":"d"}}"#, Reason::NoText),
            bad(r#"{"text":null,"meta":{"set":"d"}}"#, Reason::NoText),
            bad(r#"{"text":7,"meta":{"set":"d"}}"#, Reason::TextNotAString),
            bad(r#"{"text":["a"],"meta":{"set":"d"}}"#, Reason::TextNotAString),
            bad(r#"{"text":{"text":"a"},"meta":{"set":"d"}}"#, Reason::TextNotAString),
            line(r#"{"text":"","meta":{"set":"d"}}"#, Ok(None)),
            line(r#"{"text":"","meta":{}}"#, Ok(None)),
            (b"{\"text\":\"\xff\",\"meta\":{\"set\":\"d\"}}".to_vec(), Some(Err(Reason::NotUtf8))),
            bad(r#"{"text":"a"}"#, Reason::NoDomain),
            bad(r#"{"text":"a","meta":"d"}"#, Reason::NoDomain),
            bad(r#"{"text":"a","meta":{"set":null}}"#, Reason::NoDomain),
            bad(r#"{"text":"a","meta":{"set":3}}"#, Reason::DomainNotAString),
            bad(r#"{"text":"a","meta":{"set":""}}"#, Reason::BadDomain),
            bad(&format!(r#"{{"text":"a","meta":{{"set":"{}"}}}}"#, "d".repeat(257)), Reason::BadDomain),
            bad(&format!(r#"{{"text":"{}","meta":{{"set":"d"}}}}"#, "a".repeat(1001)), Reason::TooLong),
            bad(&format!(r#"{{"x":"{}"}}"#, "a".repeat(200_000)), Reason::TooLong),
            line(
                &format!(r#"{{"text":"{}","meta":{{"set":"d"}}}}"#, r"\u0061".repeat(1000)),
                document(&"a".repeat(1000)),
            ),
            line(r#"{"text":"old","text":"new","meta":{"set":"d"}}"#, document("new")),
            bad(r#"{"text":"a","meta":{"set":"d"},"meta":{}}"#, Reason::NoDomain),
            line(r#"{"te\u0078t":"key with escape","meta":{"set":"d"}}"#, document("key with escape")),
            line(r#"{"text":"no newline at the end","meta":{"set":"d"}}"#, document("no newline at the end")),
        ]
    }

    #[tokio::test]
    async fn every_bad_line_is_kept_with_its_number_and_reason_plain_and_compressed() {
        let lines = good_and_bad_lines();
        let bytes = lines.iter().map(|(line, _)| line.clone()).collect::<Vec<_>>().join(&b'\n');
        let expected: Vec<Seen> = (1..)
            .zip(&lines)
            .filter_map(|(number, (_, outcome))| Some((0, number, outcome.clone()?)))
            .collect();
        let store = memory();
        // both formats allow a file to be a concatenation of compressed files
        let (head, tail) = bytes.split_at(bytes.len() / 3);
        put(&store, "a.jsonl.gz", [gzip(head), gzip(tail)].concat()).await;
        put(&store, "a.jsonl.zst", [zstd(head), zstd(tail)].concat()).await;
        put(&store, "a.jsonl", bytes).await;
        for path in ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"] {
            let (rows, files) = scan(&store, path, &spec(Format::Jsonl)).await.unwrap();
            assert_eq!(rows.len(), expected.len());
            rows.iter().zip(&expected).for_each(|(row, expected)| assert_eq!(row, expected, "{path}"));
            assert_eq!((files[0].lines, files[0].parts), (lines.len() as u64, 1));
            let stored = store.get(&path.into()).await.unwrap().bytes().await.unwrap();
            assert_eq!((files[0].blake3, files[0].size), (blake3::hash(&stored), stored.len() as u64));
        }
    }

    #[tokio::test]
    async fn a_detail_says_what_is_wrong_and_where() {
        let store = memory();
        let lines = [
            "{\"text\": x}",
            "{\"text\": 1}",
            "{\"text\":\"a\"}",
            "{\"text\":\"\u{1}\"}",
            "{\"text\":\"\\ud800\"}",
            "{",
        ];
        put(&store, "a.jsonl", [lines.join("\n").as_bytes(), b"\n{\"\xff\"}\n", &[b'a'; 100_000]].concat())
            .await;
        assert_eq!(
            details(&store, "a.jsonl", &spec(Format::Jsonl)).await,
            [
                "expected value at column 10",
                "`text` is a number",
                "there is no `meta.set`",
                "control character (\\u0000-\\u001F) found while parsing a string at column 10",
                "unexpected end of hex escape at column 16",
                "EOF while parsing an object at column 1",
                "byte 3 is not UTF-8",
                "the line has 100000 bytes; a text may have 1000",
            ]
        );
    }

    #[tokio::test]
    async fn a_line_of_any_length_is_dropped_while_it_streams() {
        let mut long = b"{\"text\":\"".to_vec();
        long.resize(400 << 20, b'a');
        let bytes = [&b"{}\n"[..], &long, b"\n{}"].concat();
        let store = memory();
        put(&store, "a.jsonl.zst", zstd(&bytes)).await;
        put(&store, "a.jsonl", bytes).await;
        for path in ["a.jsonl.zst", "a.jsonl"] {
            let spec = spec(Format::Jsonl);
            let [file] = &list_all(&store, path, Format::Jsonl).await.unwrap()[..] else { panic!() };
            let mut parts = reader(&store).parts(Unit { files: vec![file.clone()] }, spec.clone(), |_| false);
            let part = parts.next().await.unwrap().unwrap();
            assert_eq!(part.bytes(), 7, "what is left of three lines");
            let mut seen = Vec::new();
            part.rows(&spec, &mut |row| {
                seen.push((row.line, row.outcome.unwrap_err().reason));
                Ok(())
            })
            .unwrap();
            assert_eq!(seen, [(1, Reason::NoText), (2, Reason::TooLong), (3, Reason::NoText)]);
        }
    }

    #[tokio::test]
    async fn a_file_that_is_one_list_or_one_object_over_many_lines_is_an_error_with_the_cure() {
        let store = memory();
        let row = r#"{"text":"t","meta":{"set":"d"}}"#;
        let long = format!("[{}]", vec![row; 3000].join(","));
        for text in [
            format!("[{row},{row}]"),
            format!("\n\u{feff} [{row}]\n\n"),
            format!("[\n{row},\n{row}\n]\n"),
            format!("[{row},\n{row}]\n"),
            "{\n  \"text\": \"t\"\n}\n".to_owned(),
            "\u{feff}{\r\n  \"text\": \"t\"\r\n}\r\n".to_owned(),
            "[]".to_owned(),
            // longer than any row may be
            long,
        ] {
            put(&store, "a.json", text.clone()).await;
            let words = words(scan(&store, "a.json", &spec(Format::Jsonl)).await);
            assert!(words.starts_with("`mem://a.json` is JSON, but not an object a line"), "{words}");
            assert!(words.contains("jq -c"), "{words}");
        }
        // one bad row does not make the file bad
        for text in [format!("[1]\n{row}\n"), format!("{row}\n[1]"), format!("{row}\n{{\n")] {
            put(&store, "a.json", text).await;
            let (rows, _) = scan(&store, "a.json", &spec(Format::Jsonl)).await.unwrap();
            assert_eq!(rows.iter().filter(|row| row.2.is_ok()).count(), 1);
            assert_eq!(rows.len(), 2);
        }
    }

    #[tokio::test]
    async fn a_column_with_a_dot_in_its_name_is_found_and_shown_as_it_is_written() {
        let store = memory();
        let rows = r#"{"a.b":{"c":"t"},"meta.kind":"d","meta":{"kind":"wrong"}}"#;
        put(&store, "a.jsonl", format!("{rows}\n{{}}\n{{\"a.b\":{{\"c\":\"t\"}}}}")).await;
        let spec = changed(&spec(Format::Jsonl), |spec| {
            spec.text = column("\"a.b\".c");
            spec.domain = DomainRule::Column(column("\"meta.kind\""));
        });
        assert_eq!(scan(&store, "a.jsonl", &spec).await.unwrap().0[0], (0, 1, document("t")));
        let details = details(&store, "a.jsonl", &spec).await;
        assert_eq!(details, ["there is no `\"a.b\".c`", "there is no `\"meta.kind\"`"]);
    }

    #[tokio::test]
    async fn a_text_in_the_same_struct_as_the_domain_or_deeper_is_found() {
        let store = memory();
        put(
            &store,
            "a.jsonl",
            r#"{"a":{"b":{"text":"t"},"set":"d","c":{"set":"x"}},"text":"wrong","set":"wrong"}"#,
        )
        .await;
        let spec = changed(&spec(Format::Jsonl), |spec| {
            spec.text = column("a.b.text");
            spec.domain = DomainRule::Column(column("a.set"));
        });
        assert_eq!(scan(&store, "a.jsonl", &spec).await.unwrap().0, [(0, 1, document("t"))]);
    }
}

mod damaged_files {
    use super::*;

    fn lines() -> Vec<u8> {
        let mut lines = Vec::new();
        for i in 0..200 {
            let _ = writeln!(lines, "{{\"text\":\"{}\",\"meta\":{{\"set\":\"d\"}}}}", i * 7919);
        }
        lines
    }

    #[tokio::test]
    async fn a_compressed_file_that_is_cut_short_anywhere_is_named() {
        let store = memory();
        for (name, bytes) in [("a.jsonl.gz", gzip(&lines())), ("a.jsonl.zst", zstd(&lines()))] {
            for length in 0..bytes.len() {
                put(&store, name, &bytes[..length]).await;
                let words = words(scan(&store, name, &spec(Format::Jsonl)).await);
                assert!(words.contains(&format!("`mem://{name}`")), "{words}");
                if length > 100 {
                    assert!(words.contains("ends too early in line "), "{words}");
                }
            }
        }
    }

    #[tokio::test]
    async fn a_damaged_gzip_file_is_named_with_the_line_reached() {
        let store = memory();
        let mut bytes = gzip(&lines());
        let end = bytes.len() - 6;
        bytes[end] ^= 1;
        put(&store, "a.jsonl.gz", bytes).await;
        let words = words(scan(&store, "a.jsonl.gz", &spec(Format::Jsonl)).await);
        assert_eq!(
            words,
            "the gzip data of `mem://a.jsonl.gz` is damaged (corrupt gzip stream does not have a matching checksum) \
             in line 201, after 7455 bytes of text\n\
             `gzip -t` checks a file; fetch it again, or leave it out of the source's url"
        );
    }

    #[tokio::test]
    async fn what_fills_up_a_compressed_file_is_no_damage_and_anything_else_is() {
        let store = memory();
        let (lines, zeros) = (lines(), vec![0; 600_000]);
        let skippable =
            |bytes: &[u8]| [b"\x50\x2a\x4d\x18", &(bytes.len() as u32).to_le_bytes()[..], bytes].concat();
        let frame = skippable(b"any bytes");
        let (head, tail) = lines.split_at(1000);
        for (name, bytes) in [
            ("a.jsonl.gz", [gzip(&lines), zeros.clone()].concat()),
            ("b.jsonl.gz", [gzip(&lines), vec![0]].concat()),
            ("c.jsonl.gz", [gzip(head), zeros.clone(), gzip(b""), gzip(tail), zeros.clone()].concat()),
            ("d.jsonl.zst", [frame.clone(), zstd(head), frame.clone(), zstd(tail), frame].concat()),
        ] {
            put(&store, name, bytes).await;
            let (rows, _) = scan(&store, name, &spec(Format::Jsonl)).await.unwrap();
            assert_eq!(rows.len(), 200, "{name}");
            assert!(rows.iter().all(|row| row.2.is_ok()), "{name}");
        }
        for (name, bytes) in [
            ("a.jsonl.gz", [gzip(&lines), b"x".to_vec()].concat()),
            ("b.jsonl.gz", [gzip(&lines), zeros.clone(), b"garbage that is no member".to_vec()].concat()),
            ("c.jsonl.gz", zeros.clone()),
            ("d.jsonl.zst", [zstd(&lines), b"garbage".to_vec()].concat()),
            ("e.jsonl.zst", [zstd(&lines), skippable(b"cut")[..9].to_vec()].concat()),
        ] {
            put(&store, name, bytes).await;
            let words = words(scan(&store, name, &spec(Format::Jsonl)).await);
            assert!(words.contains(&format!("`mem://{name}`")), "{words}");
        }
    }

    #[tokio::test]
    async fn a_compression_that_is_not_read_is_named() {
        let store = memory();
        for (bytes, name) in [
            (&b"\xfd7zXZ\0\0\x04"[..], "xz"),
            (b"BZh91AY&SY", "bzip2"),
            (b"\x04\x22\x4d\x18\x64", "lz4"),
            (b"PK\x03\x04", "zip"),
            (b"PAR1\x15", "Parquet"),
        ] {
            put(&store, "a.jsonl", bytes).await;
            let words = words(scan(&store, "a.jsonl", &spec(Format::Jsonl)).await);
            let expected = format!("`mem://a.jsonl` is {name}, but its name says plain text");
            assert!(words.starts_with(&expected), "{words}");
        }
    }

    #[tokio::test]
    async fn a_name_that_does_not_fit_the_bytes_is_an_error_both_ways() {
        let store = memory();
        let files = [
            ("a.jsonl", gzip(&lines())),
            ("b.jsonl", zstd(&lines())),
            ("c.jsonl.gz", zstd(&lines())),
            ("d.jsonl.zst", lines()),
            ("e.jsonl.gz", vec![]),
        ];
        for (name, bytes) in files {
            put(&store, name, bytes).await;
        }
        let error = async |name| {
            words(scan(&store, name, &spec(Format::Jsonl)).await).lines().next().unwrap().to_owned()
        };
        assert_eq!(error("a.jsonl").await, "`mem://a.jsonl` is gzip, but its name says plain text");
        assert_eq!(error("b.jsonl").await, "`mem://b.jsonl` is zstd, but its name says plain text");
        assert_eq!(error("c.jsonl.gz").await, "`mem://c.jsonl.gz` is zstd, but its name says gzip");
        assert_eq!(error("d.jsonl.zst").await, "`mem://d.jsonl.zst` is plain text, but its name says zstd");
        assert_eq!(error("e.jsonl.gz").await, "`mem://e.jsonl.gz` is empty, but its name says gzip");
    }

    #[tokio::test]
    async fn a_file_that_changed_after_it_was_listed_is_named() {
        let store = memory();
        put(&store, "a.jsonl", "{}").await;
        let files = list_all(&store, "a.jsonl", Format::Jsonl).await.unwrap();
        put(&store, "a.jsonl", "[]").await;
        let mut parts = reader(&store).parts(Unit { files }, spec(Format::Jsonl), |_| false);
        let words = words(parts.next().await);
        assert!(words.starts_with("`mem://a.jsonl` changed while it was read"), "{words}");
    }

    #[tokio::test]
    async fn a_local_file_that_is_written_to_while_it_is_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let store: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new());
        for append in [true, false] {
            std::fs::write(&path, format!("{{\"x\":{:57}}}\n", 1).repeat(5 * PART_BYTES as usize / 64))
                .unwrap();
            let files = on_disk(&path, Format::Jsonl).await.unwrap().files;
            let mut parts = reader(&store).parts(Unit { files }, spec(Format::Jsonl), |_| false);
            assert_eq!(
                parts.next().await.unwrap().unwrap().bytes(),
                PART_BYTES,
                "the part is full to the byte"
            );
            let mut file = std::fs::OpenOptions::new().write(true).append(append).open(&path).unwrap();
            file.write_all(b"{").unwrap();
            let words = words(loop {
                match parts.next().await {
                    Ok(Some(_)) => {}
                    end => break end,
                }
            });
            let expected = format!("`{}` changed while it was read: ", path.display());
            assert!(words.starts_with(&expected), "{words}");
        }
    }

    #[tokio::test]
    async fn a_signal_ends_the_reading_and_the_rows() {
        let store = memory();
        put(&store, "a.jsonl", "{}\n{}").await;
        let spec = spec(Format::Jsonl);
        let files = list_all(&store, "a.jsonl", Format::Jsonl).await.unwrap();
        let reader = reader(&store);
        let part = reader
            .parts(Unit { files: files.clone() }, spec.clone(), |_| false)
            .next()
            .await
            .unwrap()
            .unwrap();
        reader.stop.store(true, Ordering::Relaxed);
        assert!(matches!(part.rows(&spec, &mut |_| Ok(())), Err(Error::Stopped)));
        let mut parts = reader.parts(Unit { files }, spec, |_| false);
        assert!(matches!(parts.next().await, Err(Error::Stopped)));
    }
}

mod cutting_into_parts {
    use super::*;

    /// 80 MB that hardly compress, in lines of 0 to 2,000 bytes.
    fn many_lines() -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut random = blake3::Hasher::new().finalize_xof();
        while bytes.len() < 80 << 20 {
            let mut words = [0u8; 1000];
            random.fill(&mut words);
            let text: String =
                words[..usize::from(words[0]) * 4 % 997].iter().map(|b| format!("{b:02x}")).collect();
            let _ = writeln!(bytes, "{{\"text\":\"{text}\",\"meta\":{{\"set\":\"d\"}}}}");
        }
        bytes
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn parts_are_the_same_whatever_the_chunks_of_the_store_and_add_up_to_the_file() {
        let bytes = many_lines();
        let spec = changed(&spec(Format::Jsonl), |spec| spec.max_document_bytes = 1 << 20);
        let inner = memory();
        put(&inner, "a.jsonl", bytes.clone()).await;
        put(&inner, "a.jsonl.zst", zstd(&bytes)).await;
        let mut reference: Option<Vec<Seen>> = None;
        for (path, chunk) in
            [("a.jsonl", 10_007), ("a.jsonl", 1 << 20), ("a.jsonl", 1 << 30), ("a.jsonl.zst", 65_537)]
        {
            let store: Arc<dyn ObjectStore> = Arc::new(ChunkedStore::new(inner.clone(), chunk));
            let (rows, files) = scan(&store, path, &spec).await.unwrap();
            assert_eq!((files[0].parts, files[0].lines), (3, rows.len() as u64));
            let reference = reference.get_or_insert_with(|| rows.clone());
            assert!(*reference == rows, "other rows or parts with chunks of {chunk}");
        }
        // together they are the file, line by line, and a part ends with the line that brings it to its size
        let (mut part, mut size) = (0, 0);
        for (line, row) in bytes.split_inclusive(|&byte| byte == b'\n').zip(reference.unwrap()) {
            let value: serde_json::Value = serde_json::from_slice(line).unwrap();
            let text = value["text"].as_str().unwrap();
            let outcome = if text.is_empty() { Ok(None) } else { document(text) };
            assert_eq!((row.0, row.2), (part, outcome));
            size += line.len() as u64;
            if size >= PART_BYTES {
                (part, size) = (part + 1, 0);
            }
        }
    }

    #[tokio::test]
    async fn a_part_has_no_more_rows_than_their_rejects_have_room_in_memory() {
        let store = memory();
        put(&store, "a.jsonl", "1\n".repeat(3 << 19)).await;
        put(&store, "b.jsonl", "1\n".repeat(1 << 19)).await;
        let (rows, files) = scan(&store, "", &spec(Format::Jsonl)).await.unwrap();
        let mut parts = [0; 2];
        rows.iter().for_each(|row| parts[row.0 as usize] += 1);
        assert_eq!(parts, [1 << 20; 2]);
        let counted: Vec<_> = files.iter().map(|file| (file.lines, file.parts)).collect();
        assert_eq!(counted, [(3 << 19, 2), (1 << 19, 1)]);
    }

    #[tokio::test]
    async fn skipped_parts_keep_their_index_and_the_files_their_hash() {
        let bytes = many_lines();
        let store = memory();
        put(&store, "a.jsonl", bytes.clone()).await;
        let files = list_all(&store, "a.jsonl", Format::Jsonl).await.unwrap();
        let mut parts = reader(&store).parts(Unit { files }, spec(Format::Jsonl), |index| index != 1);
        let part = parts.next().await.unwrap().unwrap();
        assert_eq!(part.index, 1);
        assert!(part.bytes() >= PART_BYTES);
        assert!(parts.next().await.unwrap().is_none());
        assert_eq!((parts.files()[0].blake3, parts.files()[0].parts), (blake3::hash(&bytes), 3));
    }

    #[tokio::test]
    async fn small_files_share_parts_and_each_counts_its_own_lines() {
        let store = memory();
        put(&store, "a.jsonl", "{}\n\n{}").await;
        put(&store, "b.jsonl.gz", gzip(b"")).await;
        put(&store, "c.jsonl", "{}\n{}\n").await;
        let (rows, files) = scan(&store, "", &spec(Format::Jsonl)).await.unwrap();
        assert_eq!(
            rows.iter().map(|row| (row.0, row.1)).collect::<Vec<_>>(),
            [(0, 1), (0, 3), (0, 1), (0, 2)]
        );
        assert_eq!(
            files.iter().map(|file| (file.lines, file.parts)).collect::<Vec<_>>(),
            [(3, 1), (0, 0), (2, 1)]
        );
    }

    #[tokio::test]
    async fn a_reader_that_nobody_waits_for_ends() {
        let store = memory();
        put(&store, "a.jsonl", many_lines()).await;
        let files = list_all(&store, "a.jsonl", Format::Jsonl).await.unwrap();
        let mut parts = reader(&store).parts(Unit { files }, spec(Format::Jsonl), |_| false);
        parts.next().await.unwrap();
        // dropping `parts` here, and the runtime after it, would hang if the thread went on
    }
}

mod units_of_work {
    use super::*;

    fn file(name: &str, size: u64) -> SourceFile {
        SourceFile { path: name.into(), url: name.into(), size, version: "1".into() }
    }

    #[test]
    fn a_new_file_changes_one_bundle() {
        let files: Vec<_> = (0..1000).map(|i| file(&format!("f{i:04}"), 100_000)).collect();
        let before = units(files.clone());
        let after = units([files, vec![file("new", 100_000)]].concat());
        assert_eq!((before.len(), after.len()), (4, 4));
        let sizes = before.iter().map(|unit| unit.files.iter().map(|file| file.size).sum::<u64>());
        sizes.for_each(|size| assert!((10_000_000..40_000_000).contains(&size), "{size}"));
        assert_eq!(before.iter().zip(&after).filter(|(a, b)| a != b).count(), 1);
        assert!(after.iter().all(|unit| unit.files.is_sorted_by_key(|file| &file.path)));
    }

    #[test]
    fn large_files_stand_alone() {
        let files = vec![file("a", BUNDLE_FILE_BYTES), file("b", 10), file("c", 20), file("d", 1 << 40)];
        let names: Vec<Vec<_>> = units(files)
            .iter()
            .map(|unit| unit.files.iter().map(|file| file.url.clone()).collect())
            .collect();
        assert_eq!(names, [vec!["b", "c"], vec!["a"], vec!["d"]]);
    }
}

mod listing {
    use super::*;

    async fn tree() -> Arc<dyn ObjectStore> {
        let store = memory();
        for path in [
            "data/a.jsonl",
            "data/b.jsonl.zst",
            "data/README.md",
            "data/_SUCCESS",
            "data/.hidden.jsonl",
            "data/2024/c.json.gz",
            "data/2024/d.parquet",
            "data/2025/e.jsonl",
            "data/_tmp/f.jsonl",
            "database/g.jsonl",
        ] {
            put(&store, path, "x").await;
        }
        store
    }

    async fn names(store: &Arc<dyn ObjectStore>, path: &str, format: Format) -> Vec<String> {
        list_all(store, path, format)
            .await
            .unwrap()
            .into_iter()
            .map(|file| file.url.replace("mem://", ""))
            .collect()
    }

    #[tokio::test]
    async fn a_folder_gives_all_files_below_with_the_endings_of_its_format() {
        let store = tree().await;
        assert_eq!(
            names(&store, "data", Format::Jsonl).await,
            ["data/2024/c.json.gz", "data/2025/e.jsonl", "data/a.jsonl", "data/b.jsonl.zst"]
        );
        assert_eq!(names(&store, "data", Format::Parquet).await, ["data/2024/d.parquet"]);
        assert_eq!(names(&store, "data", Format::Text).await.len(), 8);
        assert_eq!(names(&store, "", Format::Jsonl).await.len(), 5);
    }

    #[tokio::test]
    async fn a_glob_gives_what_it_matches() {
        let store = tree().await;
        assert_eq!(names(&store, "data/*.jsonl", Format::Jsonl).await, ["data/a.jsonl"]);
        assert_eq!(
            names(&store, "data/*.{jsonl,md}", Format::Jsonl).await,
            ["data/README.md", "data/a.jsonl"]
        );
        assert_eq!(
            names(&store, "data/202[45]/*", Format::Jsonl).await,
            ["data/2024/c.json.gz", "data/2025/e.jsonl"]
        );
        assert_eq!(
            names(&store, "data/**/?.jsonl", Format::Jsonl).await,
            ["data/2025/e.jsonl", "data/a.jsonl"]
        );
        assert_eq!(names(&store, "data*/?.jsonl", Format::Jsonl).await, ["data/a.jsonl", "database/g.jsonl"]);
        assert_eq!(names(&store, "data/*", Format::Jsonl).await, ["data/a.jsonl", "data/b.jsonl.zst"]);
    }

    #[tokio::test]
    async fn hidden_files_and_folders_are_taken_only_where_they_are_named() {
        let store = tree().await;
        assert_eq!(names(&store, "data/_tmp", Format::Jsonl).await, ["data/_tmp/f.jsonl"]);
        assert_eq!(names(&store, "data/_*/*", Format::Jsonl).await, ["data/_tmp/f.jsonl"]);
        assert_eq!(names(&store, "data/.*", Format::Jsonl).await, ["data/.hidden.jsonl"]);
        assert_eq!(names(&store, "data/_SUCCESS", Format::Jsonl).await, ["data/_SUCCESS"]);
    }

    #[tokio::test]
    async fn nothing_found_says_what_was_looked_for() {
        let store = tree().await;
        assert_eq!(
            words(list_all(&store, "nowhere", Format::Parquet).await),
            "`mem://nowhere` has no files\n\
             looked for files named *.parquet, *.parq or *.pq; there is nothing below `mem://nowhere` (names that start with `.`, or `_` where they are tables, are skipped)"
        );
        assert_eq!(
            words(list_all(&store, "data/2025", Format::Parquet).await),
            "`mem://data/2025` has no files\n\
             looked for files named *.parquet, *.parq or *.pq; 1 file is not read: 1 whose names have none of the format's endings \
             (`mem://data/2025/e.jsonl`) (names that start with `.`, or `_` where they are tables, are skipped)"
        );
        assert!(words(list_all(&store, "data/[a", Format::Text).await).contains("is not a glob"));
    }

    async fn put_all(store: &Arc<dyn ObjectStore>, paths: &[&str]) {
        for path in paths {
            store.put(&Path::parse(path).unwrap(), "x".into()).await.unwrap();
        }
    }

    /// The listed files and the summary of those that are not read, without `base` in their URLs.
    fn shown(listing: &Listing, base: &str) -> (Vec<String>, String) {
        let files = listing.files.iter().map(|file| file.url.replace(base, "")).collect();
        (files, Unread::summary(&Unread::all(&listing.unread)).replace(base, ""))
    }

    #[tokio::test]
    async fn a_folder_gives_lines_by_any_of_their_names_and_what_looks_like_data_and_is_not_read_is_told() {
        let store = memory();
        let read = [
            "B.JSONL",
            "C.Ndjson.GZ",
            "a.jsonl",
            "d.json",
            "e.ndjson",
            "f.jsonl.zst",
            "g.JSON.gz",
            "h.ndjson.ZST",
        ];
        let left = [
            "i.jsonl.xz",
            "j.json.bz2",
            "k.tar.gz",
            "l.parquet",
            "m.parquet.gz",
            "n.CSV",
            "o.jsonl-00000-of-00002",
            "p.jsonl.part",
            "data",
            "part-00000",
            "q.zip",
        ];
        let no_data = [
            "README.md",
            "LICENSE",
            "dataset_infos.json",
            "a.jsonl.md5",
            "a.txt",
            "_SUCCESS",
            ".r.jsonl",
            "_s/t.jsonl.xz",
        ];
        put_all(&store, &[&read[..], &left, &no_data].concat()).await;
        put(&store, "u.jsonl", "").await;
        let listing = all_of(&store, "", Format::Jsonl, &[]).await.unwrap();
        let (files, told) = shown(&listing, "mem://");
        assert_eq!(files, read);
        assert_eq!(
            told,
            "13 files are not read: \
             9 whose names have none of the format's endings (`a.txt`, `data`, `k.tar.gz`, …), \
             3 compressed or put together in a way that is not read (`i.jsonl.xz`, `j.json.bz2`, `q.zip`), \
             1 empty (`u.jsonl`)"
        );
        let listing = all_of(&store, "", Format::Parquet, &[]).await.unwrap();
        assert_eq!(shown(&listing, "mem://").0, ["l.parquet"]);
        let all = all_of(&store, "", Format::Text, &[]).await.unwrap();
        assert_eq!((all.files.len(), all.unread), (read.len() + left.len() + 8, vec![]));
    }

    #[tokio::test]
    async fn a_folder_gives_tables_by_any_of_their_names() {
        let store = memory();
        put_all(&store, &["A.PARQUET", "b.parq", "c.pq", "d.parquet", "e.parquet.zst", "f.parquet.crc"])
            .await;
        let listing = all_of(&store, "", Format::Parquet, &[]).await.unwrap();
        let (files, told) = shown(&listing, "mem://");
        assert_eq!(files, ["A.PARQUET", "b.parq", "c.pq", "d.parquet"]);
        assert_eq!(
            told,
            "1 file is not read: 1 compressed or put together in a way that is not read (`e.parquet.zst`)"
        );
    }

    /// Names that a glob or a path might not take literally.
    const NAMES: [&str; 6] = ["jürgen", "語料", "100% #1", "br[1] x", "a{b,c}?", "~^`|<x>"];

    #[tokio::test]
    async fn a_folder_of_any_name_before_a_glob_is_found_and_one_that_looks_like_a_glob_is_none() {
        let (store, disk) = (memory(), tempfile::tempdir().unwrap());
        for name in NAMES.iter().chain(&["br1 x", "ab?"]) {
            put_all(&store, &[&format!("in/{name}/a.jsonl"), &format!("in/{name}/b/a.jsonl")]).await;
            std::fs::create_dir_all(disk.path().join("in").join(name).join("b")).unwrap();
            for file in ["a.jsonl", "b/a.jsonl"] {
                std::fs::write(disk.path().join("in").join(name).join(file), "{}").unwrap();
            }
        }
        for name in NAMES {
            let expected = [format!("in/{name}/a.jsonl"), format!("in/{name}/b/a.jsonl")];
            for (below, files) in [("/*.jsonl", 0..1), ("/*/a.jsonl", 1..2), ("/a.jsonl", 0..1), ("", 0..2)] {
                let url = format!("in/{name}{below}");
                let listing = all_of(&store, &url, Format::Jsonl, &[]).await.unwrap();
                assert_eq!(shown(&listing, "mem://").0, expected[files.clone()], "{url}");
                let listing = on_disk(&disk.path().join(&url), Format::Jsonl).await.unwrap();
                let base = format!("{}/", disk.path().display());
                assert_eq!(shown(&listing, &base).0, expected[files], "{url}");
                assert!(listing.files.iter().all(|file| std::fs::exists(&file.url).unwrap()));
            }
        }
        let both = all_of(&store, "in/br?1? x/*.jsonl", Format::Jsonl, &[]).await.unwrap();
        assert_eq!(shown(&both, "mem://").0, ["in/br[1] x/a.jsonl"]);
        let other = all_of(&store, "in/br[12] x/*.jsonl", Format::Jsonl, &[]).await.unwrap();
        assert_eq!(shown(&other, "mem://").0, ["in/br1 x/a.jsonl"]);
    }

    #[tokio::test]
    async fn a_folder_that_a_glob_of_files_matches_is_read_and_what_stars_do_not_enter_is_told() {
        let (store, disk) = (memory(), tempfile::tempdir().unwrap());
        let paths = [
            "a.jsonl",
            "b.jsonl/_SUCCESS",
            "b.jsonl/part-0.json",
            "b.jsonl/c/d.jsonl.gz",
            "e/f.jsonl",
            "e/g.csv",
            "h.jsonl/_SUCCESS",
        ];
        for path in paths {
            put_all(&store, &[&format!("in/{path}")]).await;
            let path = disk.path().join("in").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        }
        for (url, files, told) in [
            (
                "in/*.jsonl",
                vec!["in/a.jsonl", "in/b.jsonl/c/d.jsonl.gz", "in/b.jsonl/part-0.json"],
                "1 file is not read: 1 folders with nothing to read in them (`in/h.jsonl`)",
            ),
            (
                "in/*",
                vec!["in/a.jsonl"],
                "4 files are not read: 1 whose names have none of the format's endings (`in/e/g.csv`), \
                 3 in folders that the url's last `*` does not enter, as `**` would \
                 (`in/b.jsonl/c/d.jsonl.gz`, `in/b.jsonl/part-0.json`, `in/e/f.jsonl`)",
            ),
            ("in/*/f.jsonl", vec!["in/e/f.jsonl"], "0 files are not read: "),
        ] {
            let expected = (files.iter().map(|file| file.to_string()).collect(), told.to_owned());
            let listing = all_of(&store, url, Format::Jsonl, &[]).await.unwrap();
            assert_eq!(shown(&listing, "mem://"), expected, "{url}");
            let listing = on_disk(&disk.path().join(url), Format::Jsonl).await.unwrap();
            assert_eq!(shown(&listing, &format!("{}/", disk.path().display())), expected, "{url}");
        }
    }

    #[tokio::test]
    async fn what_is_no_file_of_a_local_folder_is_told_and_a_link_to_nothing_is_an_error() {
        use std::os::unix::ffi::OsStrExt;
        use std::os::unix::fs::symlink;
        let disk = tempfile::tempdir().unwrap();
        let folder = disk.path().join("in");
        std::fs::create_dir_all(folder.join("a")).unwrap();
        std::fs::write(folder.join("a/a.jsonl"), "{}").unwrap();
        std::fs::write(disk.path().join("elsewhere.jsonl"), "{}").unwrap();
        symlink("../../elsewhere.jsonl", folder.join("a/link.jsonl")).unwrap();
        symlink("..", folder.join("a/back")).unwrap();
        symlink("itself", folder.join("itself")).unwrap();
        symlink("nowhere", folder.join("gone")).unwrap();
        symlink("nowhere", folder.join(".#a.jsonl")).unwrap();
        let pipe = std::ffi::CString::new(folder.join("pipe.jsonl").as_os_str().as_bytes()).unwrap();
        assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
        let _socket = std::os::unix::net::UnixListener::bind(folder.join("socket.jsonl")).unwrap();

        let listing = on_disk(&folder, Format::Jsonl).await.unwrap();
        let (files, told) = shown(&listing, &format!("{}/", folder.display()));
        assert_eq!(files, ["a/a.jsonl", "a/link.jsonl"]);
        assert_eq!(
            told,
            "5 files are not read: 2 no files: pipes, sockets or devices (`pipe.jsonl`, `socket.jsonl`), \
             2 links to what isn't there (`gone`, `itself`), 1 links to a folder that they lie in (`a/back`)"
        );
        let named = words(on_disk(&folder.join("pipe.jsonl"), Format::Jsonl).await);
        assert!(named.contains("pipe.jsonl` is a pipe, a socket or a device"), "{named}");
        for url in ["in/gone", "in/go*"] {
            let named = words(on_disk(&disk.path().join(url), Format::Jsonl).await);
            assert!(named.contains("in/gone` is a link to what isn't there"), "{named}");
        }
        symlink("nowhere", folder.join("z.jsonl")).unwrap();
        let matched = words(on_disk(&folder, Format::Jsonl).await);
        assert!(matched.contains("in/z.jsonl` is a link to what isn't there"), "{matched}");
        std::fs::remove_file(folder.join("z.jsonl")).unwrap();

        for (name, why) in [
            (&b"x\n.jsonl"[..], "a control character"),
            (b"x\xff.jsonl", "not UTF-8"),
            (b"x.jsonl#1", "`#` and digits"),
        ] {
            let path = folder.join(std::ffi::OsStr::from_bytes(name));
            std::fs::write(&path, "{}").unwrap();
            let url = disk.path().join("in/*.jsonl*");
            let misnamed = words(on_disk(&url, Format::Jsonl).await);
            assert!(misnamed.contains(why) && misnamed.ends_with("rename it"), "{misnamed}");
            std::fs::remove_file(path).unwrap();
        }
    }

    #[tokio::test]
    async fn what_an_object_store_has_for_a_folder_is_no_file() {
        let store = memory();
        for path in ["in", "in/a.txt", "in/a.txt/b"] {
            put(&store, path, if path.ends_with('b') { "b" } else { "" }).await;
        }
        // the listing of a real store may have all three; the store of these tests lists only what is inside
        // the folder
        let spec = changed(&spec(Format::Text), |spec| spec.domain = DomainRule::Const("d".into()));
        let (rows, files) = scan(&store, "in/*.txt", &spec).await.unwrap();
        assert_eq!(rows, [(0, 1, document("b"))]);
        assert_eq!(files[0].url, "mem://in/a.txt/b");
    }

    #[tokio::test]
    async fn what_runs_write_is_no_source_unless_it_is_named() {
        let store = memory();
        let run = "data/out/runs/r-0123456789ab/b.jsonl";
        let key = "0123456789abcdef0123456789abcdef";
        let stage = format!("data/out/stages/tokens/{key}/d.jsonl");
        let mine = ["data/out/runs/mine.jsonl", "data/out/stages/s.jsonl", "data/out/tasks/t.jsonl"];
        let others = [&["data/a.jsonl", run, "data/out/runs2/c.jsonl", &stage][..], &mine].concat();
        put_all(&store, &others).await;
        let own = [Path::parse("data/out").unwrap()];
        let files = async |url| {
            let listing = all_of(&store, url, Format::Jsonl, &own).await?;
            assert_eq!(listing.unread, []);
            Ok::<_, Error>(shown(&listing, "mem://data/").0)
        };
        // somebody else's files in folders of the same names are read
        let all = [
            "a.jsonl",
            "out/runs/mine.jsonl",
            "out/runs2/c.jsonl",
            "out/stages/s.jsonl",
            "out/tasks/t.jsonl",
        ];
        assert_eq!(files("data").await.unwrap(), all);
        let b = ["out/runs/r-0123456789ab/b.jsonl"];
        assert_eq!(files("data/out/runs/*/b*").await.unwrap(), b);
        assert_eq!(files("data/out/runs/r-0123456789ab/b.jsonl").await.unwrap(), b);
        assert_eq!(files("data/out/runs/r-0123456789ab").await.unwrap(), b);
        let words = words(files("data/out/*/r-0123456789ab/*.jsonl").await);
        assert!(words.contains("so is what runs wrote, unless the url names its folder"), "{words}");
    }

    #[tokio::test]
    async fn local_folders_are_listed_like_any_other() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("in/deep er")).unwrap();
        std::fs::write(folder.path().join("in/deep er/é.jsonl"), "{}").unwrap();
        let files = on_disk(&folder.path().join("in"), Format::Jsonl).await.unwrap().files;
        assert_eq!(files.len(), 1);
        assert_eq!(files[0].url, format!("{}/in/deep er/é.jsonl", folder.path().display()));
        assert_eq!(std::fs::read(&files[0].url).unwrap(), b"{}");
    }
}

mod versions {
    use super::*;

    /// A store without e_tags in listings and, with `nowhere`, in answers to GET.
    #[derive(Debug)]
    struct Tagless {
        inner: InMemory,
        nowhere: bool,
    }

    impl std::fmt::Display for Tagless {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("tagless")
        }
    }

    /// Without e_tag and version. All objects have the same time, like two that were written within one
    /// second.
    fn without_tag(meta: ObjectMeta) -> ObjectMeta {
        let last_modified = std::time::UNIX_EPOCH.into();
        ObjectMeta { e_tag: None, version: None, last_modified, ..meta }
    }

    #[async_trait::async_trait]
    impl ObjectStore for Tagless {
        async fn put_opts(
            &self,
            at: &Path,
            payload: PutPayload,
            options: PutOptions,
        ) -> object_store::Result<PutResult> {
            self.inner.put_opts(at, payload, options).await
        }

        async fn put_multipart_opts(
            &self,
            at: &Path,
            options: PutMultipartOptions,
        ) -> object_store::Result<Box<dyn MultipartUpload>> {
            self.inner.put_multipart_opts(at, options).await
        }

        async fn get_opts(&self, at: &Path, options: GetOptions) -> object_store::Result<GetResult> {
            let mut got = self.inner.get_opts(at, options).await?;
            if self.nowhere {
                got.meta = without_tag(got.meta);
            }
            Ok(got)
        }

        fn delete_stream(
            &self,
            all: BoxStream<'static, object_store::Result<Path>>,
        ) -> BoxStream<'static, object_store::Result<Path>> {
            self.inner.delete_stream(all)
        }

        fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
            self.inner.list(prefix).map(|meta| meta.map(without_tag)).boxed()
        }

        async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
            self.inner.list_with_delimiter(prefix).await
        }

        async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
            self.inner.copy_opts(from, to, options).await
        }
    }

    #[tokio::test]
    async fn two_files_of_a_size_and_a_second_are_two_versions_also_where_a_store_gives_no_tag() {
        for nowhere in [false, true] {
            let store: Arc<dyn ObjectStore> = Arc::new(Tagless { inner: InMemory::new(), nowhere });
            let texts = ["a", "b"].map(|text| format!(r#"{{"text":"{text}","meta":{{"set":"d"}}}}"#));
            let mut seen = vec![];
            for text in &texts {
                put(&store, "in/a.jsonl", text.clone()).await;
                put(&store, "in/a.parquet", text.clone()).await;
                seen.push(list_all(&store, "in", Format::Jsonl).await.unwrap());
                assert_eq!(seen.last(), Some(&list_all(&store, "in/*", Format::Jsonl).await.unwrap()));
                assert_eq!(seen.last(), Some(&list_all(&store, "in/a.jsonl", Format::Jsonl).await.unwrap()));
            }
            assert_ne!(seen[0], seen[1]);
            let (rows, _) = scan(&store, "in", &spec(Format::Jsonl)).await.unwrap();
            assert_eq!(rows, [(0, 1, document("b"))]);
            // reading fails if a file changed after it was listed
            for format in [Format::Jsonl, Format::Parquet] {
                let files = list_all(&store, "in", format).await.unwrap();
                put(&store, files[0].path.as_ref(), texts[0].clone()).await;
                let mut parts = reader(&store).parts(Unit { files }, spec(format), |_| false);
                let changed = loop {
                    match parts.next().await {
                        Ok(Some(_)) => {}
                        end => break words(end),
                    }
                };
                assert!(changed.contains("changed while it was read"), "{changed}");
            }
        }
    }
}

mod folders_of_text {
    use super::*;

    #[tokio::test]
    async fn each_file_is_a_document_with_a_domain_by_its_path() {
        let store = memory();
        put(&store, "src/a.rs", "fn main() {}").await;
        put(&store, "src/b.md", "\u{feff}# b\r\n").await;
        put(&store, "src/c.rs", "").await;
        put(&store, "src/d.rs", b"\xff\xfe").await;
        put(&store, "src/e.rs", [b'a'; 1001]).await;
        put(&store, "src/f.xyz", "f").await;
        let rule = |glob: &str, domain: &str| (Glob::new(glob).unwrap().compile_matcher(), domain.to_owned());
        let spec = changed(&spec(Format::Text), |spec| {
            spec.domain = DomainRule::Paths(vec![
                rule("**/*.rs", "Rust"),
                rule("mem://src/*.md", "Markdown"),
                rule("src/*.md", "no"),
            ]);
        });
        let (rows, files) = scan(&store, "src", &spec).await.unwrap();
        let row = |domain: &str, text: &str| Ok(Some((domain.to_owned(), text.to_owned())));
        assert_eq!(
            rows.into_iter().map(|row| row.2).collect::<Vec<_>>(),
            [
                row("Rust", "fn main() {}"),
                row("Markdown", "# b\r\n"),
                Ok(None),
                Err(Reason::NotUtf8),
                Err(Reason::TooLong),
                Err(Reason::NoDomain),
            ]
        );
        assert!(files.iter().all(|file| file.lines == 1 && file.parts == 1));
        assert_eq!(files[4].blake3, blake3::hash(&[b'a'; 1001]), "also where it is too long");
        assert_eq!(details(&store, "src/f.xyz", &spec).await, ["there is no rule for this file's path"]);
    }
}

mod tables_of_parquet {
    use super::*;
    use ::parquet::arrow::ArrowWriter;
    use ::parquet::file::properties::WriterProperties;
    use ::parquet::file::reader::{FileReader, SerializedFileReader};
    use arrow::array::{
        Array, ArrayRef, BinaryArray, Int64Array, ListArray, NullArray, RecordBatch, StringArray,
        StringViewArray, StructArray,
    };
    use arrow::datatypes::{DataType, Field, Int32Type};
    use std::time::{Duration, Instant};

    /// A file with the columns text, meta.set, n and l, in row groups of `group` rows.
    fn table(texts: ArrayRef, domains: Vec<Option<&str>>, group: usize) -> Vec<u8> {
        let rows = texts.len();
        let meta = StructArray::from(vec![(
            Arc::new(Field::new("set", DataType::Utf8, true)),
            Arc::new(StringArray::from(domains)) as ArrayRef,
        )]);
        let lists =
            ListArray::from_iter_primitive::<Int32Type, _, _>((0..rows).map(|_| Some([Some(1), Some(2)])));
        let batch = RecordBatch::try_from_iter_with_nullable([
            ("n", Arc::new(Int64Array::from_iter_values(0..rows as i64)) as ArrayRef, false),
            ("l", Arc::new(lists), true),
            ("text", texts, true),
            ("meta", Arc::new(meta), true),
        ])
        .unwrap();
        written(&batch, group)
    }

    /// A file in row groups of `group` rows.
    fn written(batch: &RecordBatch, group: usize) -> Vec<u8> {
        let properties = WriterProperties::builder().set_max_row_group_row_count(Some(group)).build();
        let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).unwrap();
        writer.write(batch).unwrap();
        writer.into_inner().unwrap()
    }

    fn small_table() -> Vec<u8> {
        let long = "x".repeat(1001);
        let texts = StringArray::from(vec![Some("a"), None, Some(""), Some(&long), Some("é"), Some("f")]);
        table(Arc::new(texts), vec![Some("d"), Some("d"), Some("d"), Some("d"), None, Some("")], 4)
    }

    #[tokio::test]
    async fn rows_are_documents_or_rejects_also_where_the_domain_is_nested() {
        let store = memory();
        put(&store, "a.parquet", small_table()).await;
        let (rows, files) = scan(&store, "a.parquet", &spec(Format::Parquet)).await.unwrap();
        assert_eq!(
            rows,
            [
                (0, 1, document("a")),
                (0, 2, Err(Reason::NoText)),
                (0, 3, Ok(None)),
                (0, 4, Err(Reason::TooLong)),
                (0, 5, Err(Reason::NoDomain)),
                (0, 6, Err(Reason::BadDomain)),
            ]
        );
        assert_eq!((files[0].lines, files[0].parts, files[0].blake3), (6, 2, blake3::hash(&small_table())));
    }

    #[tokio::test]
    async fn a_binary_column_may_hold_text_and_one_bad_value_is_one_reject() {
        let store = memory();
        let texts = BinaryArray::from_vec(vec![b"a", b"\xff", "é".as_bytes()]);
        put(&store, "a.parquet", table(Arc::new(texts), vec![Some("d"); 3], 10)).await;
        put(
            &store,
            "b.parquet",
            table(Arc::new(StringViewArray::from(vec!["a", "b"])), vec![Some("d"); 2], 10),
        )
        .await;
        let (rows, _) = scan(&store, "a.parquet", &spec(Format::Parquet)).await.unwrap();
        assert_eq!(rows, [(0, 1, document("a")), (0, 2, Err(Reason::NotUtf8)), (0, 3, document("é"))]);
        let (rows, _) = scan(&store, "b.parquet", &spec(Format::Parquet)).await.unwrap();
        assert_eq!(rows, [(0, 1, document("a")), (0, 2, document("b"))]);
    }

    #[tokio::test]
    async fn a_column_that_is_not_there_or_no_text_is_an_error_that_lists_the_columns() {
        let store = memory();
        put(&store, "a.parquet", small_table()).await;
        let error = async |text: &str| {
            let spec = changed(&spec(Format::Parquet), |spec| {
                spec.text = column(text);
            });
            words(scan(&store, "a.parquet", &spec).await)
        };
        assert_eq!(
            error("body").await,
            "the text column `body` of `mem://a.parquet` is not in the file\n\
             set the source's `text` to a column that holds text: `text`, `meta.set` (others: `n`, `l.list.item`)"
        );
        assert!(
            error("n").await.starts_with("the text column `n` of `mem://a.parquet` holds INT64, not text")
        );
        assert!(error("meta").await.contains("is a struct or a list"));
        assert!(error("l.list.item").await.contains("is a list"));
    }

    #[tokio::test]
    async fn a_column_without_values_gives_rejects_and_no_error() {
        let store = memory();
        let (texts, set): (ArrayRef, ArrayRef) =
            (Arc::new(StringArray::from(vec!["a", "b"])), Arc::new(StringArray::from(vec!["d", "d"])));
        let nothing: ArrayRef = Arc::new(NullArray::new(2));
        let in_struct = |array: &ArrayRef| -> ArrayRef {
            let field = Arc::new(Field::new("set", array.data_type().clone(), true));
            Arc::new(StructArray::from(vec![(field, array.clone())]))
        };
        for (name, text, meta, reason) in [
            ("a.parquet", &texts, in_struct(&nothing), Reason::NoDomain),
            ("b.parquet", &texts, nothing.clone(), Reason::NoDomain),
            ("c.parquet", &nothing, in_struct(&set), Reason::NoText),
            ("d.parquet", &nothing, nothing.clone(), Reason::NoText),
        ] {
            let batch = RecordBatch::try_from_iter_with_nullable([
                ("text", text.clone(), true),
                ("meta", meta, true),
            ]);
            put(&store, name, written(&batch.unwrap(), 10)).await;
            let (rows, files) = scan(&store, name, &spec(Format::Parquet)).await.unwrap();
            assert_eq!(rows, [(0, 1, Err(reason)), (0, 2, Err(reason))], "{name}");
            assert_eq!(files[0].lines, 2);
        }
        // a small file may have millions of rows without values; their rejects are not small, so they are
        // spread over parts
        let nothing: ArrayRef = Arc::new(NullArray::new(3 << 20));
        let batch = RecordBatch::try_from_iter_with_nullable([
            ("text", nothing.clone(), true),
            ("meta", nothing, true),
        ]);
        put(&store, "a.parquet", written(&batch.unwrap(), 4 << 20)).await;
        let (rows, files) = scan(&store, "a.parquet", &spec(Format::Parquet)).await.unwrap();
        assert_eq!((rows.len(), files[0].parts), (3 << 20, 3));
    }

    #[tokio::test]
    async fn a_column_with_a_dot_in_its_name_is_found_and_listed_as_it_is_written() {
        let store = memory();
        let texts = |text: &str| -> ArrayRef { Arc::new(StringArray::from(vec![text])) };
        let field = Arc::new(Field::new("b.c", DataType::Utf8, true));
        let nested: ArrayRef = Arc::new(StructArray::from(vec![(field, texts("t"))]));
        let batch = RecordBatch::try_from_iter([("meta.kind", texts("d")), ("a", nested)]).unwrap();
        put(&store, "a.parquet", written(&batch, 10)).await;
        let spec = changed(&spec(Format::Parquet), |spec| {
            spec.text = column("a.\"b.c\"");
            spec.domain = DomainRule::Column(column("\"meta.kind\""));
        });
        assert_eq!(scan(&store, "a.parquet", &spec).await.unwrap().0, [(0, 1, document("t"))]);
        let spec = changed(&spec, |spec| spec.domain = DomainRule::Column(column("meta.kind")));
        assert_eq!(
            words(scan(&store, "a.parquet", &spec).await),
            "the domain column `meta.kind` of `mem://a.parquet` is not in the file\n\
             set the source's `domain` to a column that holds text: `\"meta.kind\"`, `a.\"b.c\"` (others: none)"
        );
    }

    #[tokio::test]
    async fn large_row_groups_are_cut_and_read_from_a_copy_where_the_store_is_remote() {
        let mut random = blake3::Hasher::new().finalize_xof();
        let texts = StringArray::from_iter_values((0..40_000).map(|i| {
            let mut bytes = [0; 1000];
            random.fill(&mut bytes);
            format!("{i} {}", bytes.iter().map(|b| format!("{b:02x}")).collect::<String>())
        }));
        let expected: Vec<String> = texts.iter().map(|text| text.unwrap().to_owned()).collect();
        let bytes = table(Arc::new(texts), vec![Some("d"); 40_000], 36_000);
        let spec = changed(&spec(Format::Parquet), |spec| spec.max_document_bytes = 3000);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.parquet"), &bytes).unwrap();
        let local: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(folder.path()).unwrap());
        let remote = memory();
        put(&remote, "a.parquet", bytes.clone()).await;
        let (rows, files) = scan(&remote, "a.parquet", &spec).await.unwrap();
        // the 72 MB of the first row group are two ranges, each a part; the second row group is the third
        // part
        assert_eq!((files[0].parts, files[0].blake3), (3, blake3::hash(&bytes)));
        assert_eq!([0, 17_999, 18_000, 35_999, 36_000].map(|row: usize| rows[row].0), [0, 0, 1, 1, 2]);
        let texts = rows.iter().map(|row| row.2.as_ref().unwrap().as_ref().unwrap().1.as_str());
        assert!(texts.eq(expected.iter().map(String::as_str)));
        assert!(rows.iter().map(|row| row.1).eq(1..=40_000));
        let (from_local, _) = scan(&local, "a.parquet", &spec).await.unwrap();
        assert!(rows == from_local);
    }

    #[tokio::test]
    async fn a_damaged_file_gives_an_error_or_other_rows_and_never_a_panic() {
        let store = memory();
        let good = small_table();
        let mut errors = 0;
        for at in 0..good.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[at] ^= flip;
                put(&store, "a.parquet", bytes).await;
                match scan(&store, "a.parquet", &spec(Format::Parquet)).await {
                    Ok(_) => {}
                    Err(error) => {
                        let words = words(Err::<(), _>(error));
                        assert!(words.contains("`mem://a.parquet`"), "{words}");
                        errors += 1;
                    }
                }
            }
        }
        assert!(errors > good.len() / 2);
        for length in (0..good.len()).step_by(13) {
            put(&store, "a.parquet", &good[..length]).await;
            let words = words(scan(&store, "a.parquet", &spec(Format::Parquet)).await);
            assert!(words.contains("`mem://a.parquet`"), "{words}");
        }
    }

    #[tokio::test]
    async fn a_header_that_has_no_end_is_refused_at_once() {
        use super::headers::{tests::*, wire};
        let texts: Vec<String> = (0..900).map(|i| format!("{i} is a text that no other row has")).collect();
        let whole = table(Arc::new(StringArray::from(texts)), vec![Some("d"); 900], 900);
        let read = async |bytes: Vec<u8>| {
            let store = memory();
            put(&store, "a.parquet", bytes).await;
            let started = Instant::now();
            let read = scan(&store, "a.parquet", &spec(Format::Parquet)).await.map(|(rows, _)| rows.len());
            assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
            read
        };
        assert_eq!(read(whole.clone()).await.unwrap(), 900);
        let reader = SerializedFileReader::new(::bytes::Bytes::from(whole.clone())).unwrap();
        let columns = reader.metadata().row_group(0).columns().to_vec();
        let text = columns.iter().find(|column| column.column_path().string() == "text").unwrap();
        let at = text.byte_range().0 as usize;
        let end = whole.len() - 8;
        let length = u32::from_le_bytes(whole[end..end + 4].try_into().unwrap()) as usize;
        for kind in [wire::TRUE, wire::DOUBLE] {
            // in place of the column's pages
            let mut lying = whole.clone();
            let evil = endless(1000, kind);
            lying[at..at + evil.len()].copy_from_slice(&evil);
            let error = words(read(lying).await);
            assert!(error.contains("row group 0: ") && error.contains("header"), "{error}");
            // after the footer's fields
            let field =
                [vec![UNKNOWN | wire::LIST], list(wire::LIST, 1), list(kind, i32::MAX as u32)].concat();
            let footer = [&whole[end - length..end - 1], &field, &[0]].concat();
            let size = (footer.len() as u32).to_le_bytes();
            let error = words(read([&whole[..end - length], &footer, &size, b"PAR1"].concat()).await);
            assert!(error.contains("its footer: ") && error.contains("header"), "{error}");
        }
        // the dictionary of the domains: in its page's Thrift header, the dictionary's own struct (0x4C)
        // begins with the number of values (0x15), which is written as twice the number
        let domain = columns.iter().find(|column| column.column_path().string() == "meta.set").unwrap();
        let at = domain.byte_range().0 as usize;
        let header = whole[at..].windows(3).position(|bytes| bytes == [0x4C, 0x15, 2]).unwrap();
        let mut lying = whole.clone();
        lying[at + header + 2] = 126;
        let error = words(read(lying).await);
        assert!(error.contains("a dictionary of 63 values has 5 bytes"), "{error}");
    }
}

//! JSONL: one JSON object per line, plain or compressed.
//!
//! [`read`] only finds the lines. [`Lines::each`](Rows::each) parses them, on the thread that takes the part.

use std::fmt;
use std::io::{self, BufRead, BufReader, Cursor, Read};

use flate2::bufread::GzDecoder;
use memchr::{memchr, memchr_iter};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::files::SourceFile;
use super::part::{Pieces, Rows};
use super::stored::{READ_BYTES, Stored, own};
use super::{Cell, Column, Each, Outcome, Reason, Reject, Spec};
use crate::{Error, Result};

/// The byte order mark of UTF-8, which Windows programs write at the beginning of a file.
const BOM: &[u8] = b"\xef\xbb\xbf";

/// The largest window of zstd that is accepted: 2²⁷ bytes = 128 MiB, what `zstd --long` and `--ultra -22` use.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Cuts a file into lines and passes them to `pieces`. Returns the number of lines.
pub(super) fn read(stored: &mut Stored, spec: &Spec, pieces: &mut Pieces<'_>) -> Result<u64> {
    let url = pieces.file.url.as_str();
    let kind = Kind::of_name(&url.to_lowercase());
    let mut cutting = Cutting::new(spec);
    let mut done = 0;
    let failed = |error, line, done| kind.failed(url, error, line, done);
    let mut decoded = kind.decode(stored).map_err(|error| failed(error, 1, 0))?;
    loop {
        pieces.check()?;
        let mut bytes = decoded.fill_buf().map_err(|error| failed(error, cutting.number, done))?;
        let filled = bytes.len();
        if filled == 0 {
            break;
        }
        while let Some(end) = memchr(b'\n', bytes) {
            cutting.add(&bytes[..end]);
            cutting.end_line();
            bytes = &bytes[end + 1..];
            if cutting.layout == Layout::Spread {
                return Err(not_lines(url));
            }
            if pieces.is_full_with(cutting.rows(), cutting.lines.data.len() as u64) {
                cutting.flush(pieces)?;
            }
        }
        cutting.add(bytes);
        decoded.consume(filled);
        done += filled as u64;
    }
    if cutting.length > 0 {
        cutting.end_line();
    }
    if matches!(cutting.layout, Layout::List | Layout::Spread) {
        return Err(not_lines(url));
    }
    cutting.flush(pieces)?;
    Ok(cutting.number - 1)
}

/// A lower-case file name without the ending of a compression that is read.
pub(super) fn uncompressed(name: &str) -> &str {
    name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name)
}

fn not_lines(url: &str) -> Error {
    Error::data(
        format!(
            "`{url}` is JSON, but not an object a line: its first row opens a list or an object of many lines"
        ),
        "write one object a line (`jq -c '.[]' FILE` does it with a list, `jq -c . FILE` with objects), or leave the file out of the source's url",
    )
}

/// How a file is compressed, by its name's ending.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Gzip,
    Zstd,
}

impl Kind {
    /// From a lower-case file name.
    fn of_name(name: &str) -> Self {
        match name {
            name if name.ends_with(".gz") => Kind::Gzip,
            name if name.ends_with(".zst") => Kind::Zstd,
            _ => Kind::Plain,
        }
    }

    /// The format of a file that begins with these bytes, in a word.
    fn of_first_bytes(bytes: &[u8]) -> &'static str {
        match bytes {
            [] => "empty",
            [0x1f, 0x8b, ..] => Kind::Gzip.name(),
            // a frame, or a skippable frame
            [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Kind::Zstd.name(),
            [0xfd, b'7', b'z', b'X'] => "xz",
            b"BZh1" | b"BZh2" | b"BZh3" | b"BZh4" | b"BZh5" | b"BZh6" | b"BZh7" | b"BZh8" | b"BZh9" => {
                "bzip2"
            }
            [0x04, 0x22, 0x4d, 0x18] => "lz4",
            [b'P', b'K', 3, 4] => "zip",
            b"PAR1" => "Parquet",
            _ => Kind::Plain.name(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Plain => "plain text",
            Kind::Gzip => "gzip",
            Kind::Zstd => "zstd",
        }
    }

    /// Decodes the file's text. Its first bytes must be those of the format that its name says.
    fn decode<'a>(self, stored: &'a mut Stored) -> io::Result<Box<dyn BufRead + 'a>> {
        let mut first = Vec::with_capacity(4);
        stored.take(4).read_to_end(&mut first)?;
        let is = Kind::of_first_bytes(&first);
        // a plain file may be empty
        if is != self.name() && !(first.is_empty() && self == Kind::Plain) {
            return Err(io::Error::other(Error::data(
                format!("`{}` is {is}, but its name says {}", stored.file.url, self.name()),
                "names of gzip files end with .gz, those of zstd files with .zst, all others are plain text",
            )));
        }
        let bytes = BufReader::with_capacity(READ_BYTES, Cursor::new(first).chain(stored));
        Ok(match self {
            Kind::Plain => Box::new(bytes),
            Kind::Gzip => {
                Box::new(BufReader::with_capacity(READ_BYTES, Members(Some(GzDecoder::new(bytes)))))
            }
            Kind::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(bytes)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Box::new(BufReader::with_capacity(READ_BYTES, decoder))
            }
        })
    }

    /// The error for a failure in line `line`, after `done` bytes of text were decoded.
    fn failed(self, url: &str, error: io::Error, line: u64, done: u64) -> Error {
        own(error).unwrap_or_else(|error| {
            let what = match error.kind() {
                io::ErrorKind::UnexpectedEof => "ends too early".to_owned(),
                _ => format!("is damaged ({error})"),
            };
            let test = match self {
                Kind::Zstd => "zstd --long=27 -t",
                Kind::Gzip | Kind::Plain => "gzip -t",
            };
            Error::data(
                format!(
                    "the {} data of `{url}` {what} in line {line}, after {done} bytes of text",
                    self.name()
                ),
                format!("`{test}` checks a file; fetch it again, or leave it out of the source's url"),
            )
        })
    }
}

/// Reads the members of a gzip file one after the other. Zeros between and behind members are skipped,
/// because tapes and `dd` fill up their blocks with them; anything else must be a member. It is `None` once
/// everything is read.
struct Members<R>(Option<GzDecoder<R>>);

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.0 {
            let bytes = member.read(out)?;
            if bytes > 0 || out.is_empty() {
                return Ok(bytes);
            }
            let Some(mut stored) = self.0.take().map(GzDecoder::into_inner) else { break };
            loop {
                let bytes = stored.fill_buf()?;
                let (zeros, all) = (bytes.iter().take_while(|byte| **byte == 0).count(), bytes.len());
                stored.consume(zeros);
                if zeros < all {
                    self.0 = Some(GzDecoder::new(stored));
                    break;
                }
                if all == 0 {
                    break;
                }
            }
        }
        Ok(0)
    }
}

/// Consecutive lines of a file, each with its `\n`.
#[derive(Debug, Default)]
pub(super) struct Lines {
    first_line: u64,
    data: Vec<u8>,
    /// Number and length of lines that are too long for any row. In `data` they are empty.
    dropped: Vec<(u64, u64)>,
}

/// The lines collected so far, and the one that is being read. The lines do not depend on the sizes in which
/// bytes are added.
struct Cutting {
    lines: Lines,
    /// The number of the line that is being read.
    number: u64,
    /// Where this line starts in `lines.data`.
    start: usize,
    /// How many bytes of this line were read. They are all in `data` or, once there are more than `limit`,
    /// none is.
    length: u64,
    limit: u64,
    layout: Layout,
    /// The first byte of this line that is not white space, for as long as the layout is being determined.
    first: Option<u8>,
}

/// How a file is laid out, as its first rows show.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    /// There was no row yet.
    Unknown,
    /// The only row so far is a list. If no other row follows, the file is that list, and its rows are in it.
    List,
    /// The first row opens a list or an object that does not end on its line.
    Spread,
    Lines,
}

impl Cutting {
    fn new(spec: &Spec) -> Self {
        // JSON writes a byte of text as up to six (`\u0007`), and a row contains more than its text
        let limit = spec.max_document_bytes.saturating_mul(6).saturating_add(64 << 10);
        let lines = Lines { first_line: 1, ..Lines::default() };
        Self { lines, number: 1, start: 0, length: 0, limit, layout: Layout::Unknown, first: None }
    }

    /// How many lines were collected.
    fn rows(&self) -> u64 {
        self.number - self.lines.first_line
    }

    fn add(&mut self, bytes: &[u8]) {
        if self.layout != Layout::Lines && self.first.is_none() {
            // the bytes of a byte order mark do not count either
            let is_text = |byte: &&u8| !byte.is_ascii_whitespace() && !BOM.contains(byte);
            self.first = bytes.iter().find(is_text).copied();
        }
        self.length += bytes.len() as u64;
        if self.length <= self.limit {
            self.lines.data.extend_from_slice(bytes);
        } else {
            self.lines.data.truncate(self.start);
        }
    }

    fn end_line(&mut self) {
        if self.length > self.limit {
            self.lines.dropped.push((self.number, self.length));
        }
        if let Some(first) = self.first.take() {
            // the line is empty if it was dropped
            let line = self.lines.data[self.start..].trim_ascii();
            self.layout = match (self.layout, first) {
                (Layout::Unknown, b'[') if line.ends_with(b"]") => Layout::List,
                (Layout::Unknown, b'[') => Layout::Spread,
                (Layout::Unknown, b'{') if line.strip_prefix(BOM).unwrap_or(line) == b"{" => Layout::Spread,
                _ => Layout::Lines,
            };
        }
        self.lines.data.push(b'\n');
        self.start = self.lines.data.len();
        self.length = 0;
        self.number += 1;
    }

    /// Passes the lines collected so far to `pieces`. To be called between two lines.
    fn flush(&mut self, pieces: &mut Pieces<'_>) -> Result<()> {
        let next_line = self.number;
        let next = Lines { first_line: next_line, ..Lines::default() };
        let lines = std::mem::replace(&mut self.lines, next);
        self.start = 0;
        if lines.data.is_empty() {
            return Ok(());
        }
        let (rows, bytes) = (next_line - lines.first_line, lines.data.len() as u64);
        pieces.push(lines, rows, bytes)
    }
}

impl Rows for Lines {
    /// Skips blank lines, which are not rows.
    fn each(&self, _: &SourceFile, spec: &Spec, domain: Cell<'_>, f: &mut Each<'_>) -> Result<()> {
        let mut unescaped = Unescaped::default();
        let mut dropped = self.dropped.iter().peekable();
        let mut start = 0;
        for (number, end) in (self.first_line..).zip(memchr_iter(b'\n', &self.data)) {
            let mut line = &self.data[start..end];
            start = end + 1;
            if let Some((_, length)) = dropped.next_if(|(dropped, _)| *dropped == number) {
                let limit = spec.max_document_bytes;
                f(number, Err(Reject::too_long("the line", *length, limit)))?;
                continue;
            }
            if number == 1 {
                line = line.strip_prefix(BOM).unwrap_or(line);
            }
            if !line.trim_ascii().is_empty() {
                f(number, row(line, spec, domain, &mut unescaped))?;
            }
        }
        Ok(())
    }
}

/// Buffers for strings with escapes, reused from line to line.
#[derive(Default)]
struct Unescaped {
    text: String,
    domain: String,
}

/// Parses a line. Only the text and the domain are kept; the rest just has to be JSON.
fn row<'a>(line: &'a [u8], spec: &'a Spec, domain: Cell<'a>, unescaped: &'a mut Unescaped) -> Outcome<'a> {
    let line = std::str::from_utf8(line).map_err(Reject::not_utf8)?;
    let mut json = serde_json::Deserializer::from_str(line);
    if !line.trim_ascii_start().starts_with('{') {
        IgnoredAny::deserialize(&mut json).and_then(|_| json.end()).map_err(not_json)?;
        return Err(Reject::new(Reason::NotAnObject, "the line is JSON, but not an object"));
    }
    let mut found =
        Columns { text: Found::new(&mut unescaped.text), domain: Found::new(&mut unescaped.domain) };
    let domain_column = spec.domain_column().map(Column::names);
    let root = Node { text: Some(spec.text.names()), domain: domain_column, found: &mut found };
    root.deserialize(&mut json).and_then(|()| json.end()).map_err(not_json)?;
    let domain = if domain_column.is_some() { found.domain.into_cell() } else { domain };
    spec.outcome(found.text.into_cell(), domain)
}

fn not_json(error: serde_json::Error) -> Reject {
    // serde_json sees only this line, so its "line 1" is wrong here
    let message = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let message = message.strip_suffix(&place).unwrap_or(&message);
    Reject::new(Reason::NotJson, format!("{message} at column {}", error.column()))
}

/// What was found at a column's path.
struct Found<'l, 'u> {
    value: Value<'l>,
    unescaped: &'u mut String,
}

enum Value<'l> {
    Missing,
    Null,
    Other(&'static str),
    /// A string without escapes, borrowed from the line.
    Borrowed(&'l str),
    /// A string with escapes, decoded into `unescaped`.
    Unescaped,
}

impl<'l, 'u> Found<'l, 'u> {
    fn new(unescaped: &'u mut String) -> Self {
        Self { value: Value::Missing, unescaped }
    }

    fn into_cell(self) -> Cell<'u>
    where
        'l: 'u,
    {
        match self.value {
            Value::Missing => Cell::Missing,
            Value::Null => Cell::Null,
            Value::Other(kind) => Cell::Other(kind),
            Value::Borrowed(text) => Cell::Text(text),
            Value::Unescaped => Cell::Text(self.unescaped),
        }
    }
}

/// The two columns of a line that are wanted.
struct Columns<'l, 'u> {
    text: Found<'l, 'u>,
    domain: Found<'l, 'u>,
}

/// Reads one JSON value, and knows the rest of each column's path from here on. An empty path ends at this
/// value; `None` is a path that does not lead here.
struct Node<'p, 'f, 'l, 'u> {
    text: Option<&'p [String]>,
    domain: Option<&'p [String]>,
    found: &'f mut Columns<'l, 'u>,
}

impl<'l, 'u> Node<'_, '_, 'l, 'u> {
    /// The columns whose paths end here.
    fn ends(&mut self) -> impl Iterator<Item = &mut Found<'l, 'u>> {
        let Columns { text, domain } = &mut *self.found;
        let ends = |path: Option<&[String]>| path.is_some_and(<[_]>::is_empty);
        [ends(self.text).then_some(text), ends(self.domain).then_some(domain)].into_iter().flatten()
    }

    /// Records that this value is not a string. That replaces the value of an earlier key of the same name.
    fn is(mut self, kind: &'static str) {
        self.ends().for_each(|found| found.value = Value::Other(kind));
    }
}

impl<'l> DeserializeSeed<'l> for Node<'_, '_, 'l, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'l>>(self, json: D) -> Result<(), D::Error> {
        // if a key occurs twice, the last one counts
        if self.text.is_some() {
            self.found.text.value = Value::Missing;
        }
        if self.domain.is_some() {
            self.found.domain.value = Value::Missing;
        }
        json.deserialize_any(self)
    }
}

impl<'l> Visitor<'l> for Node<'_, '_, 'l, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON")
    }

    fn visit_borrowed_str<E>(mut self, text: &'l str) -> Result<(), E> {
        self.ends().for_each(|found| found.value = Value::Borrowed(text));
        Ok(())
    }

    fn visit_str<E>(mut self, text: &str) -> Result<(), E> {
        for found in self.ends() {
            found.unescaped.clear();
            found.unescaped.push_str(text);
            found.value = Value::Unescaped;
        }
        Ok(())
    }

    fn visit_unit<E>(mut self) -> Result<(), E> {
        self.ends().for_each(|found| found.value = Value::Null);
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        self.is("a boolean");
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        self.is("a number");
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        self.is("a number");
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        self.is("a number");
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'l>>(self, mut list: A) -> Result<(), A::Error> {
        self.is("a list");
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'l>>(mut self, mut map: A) -> Result<(), A::Error> {
        self.ends().for_each(|found| found.value = Value::Other("an object"));
        let text = self.text.and_then(<[_]>::split_first);
        let domain = self.domain.and_then(<[_]>::split_first);
        let key = Key { text: text.map(|(name, _)| name), domain: domain.map(|(name, _)| name) };
        while let Some(leads) = map.next_key_seed(key)? {
            if leads.text || leads.domain {
                map.next_value_seed(Node {
                    text: text.filter(|_| leads.text).map(|(_, rest)| rest),
                    domain: domain.filter(|_| leads.domain).map(|(_, rest)| rest),
                    found: &mut *self.found,
                })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

/// Compares a key with the next name on each column's path.
#[derive(Clone, Copy)]
struct Key<'p> {
    text: Option<&'p String>,
    domain: Option<&'p String>,
}

/// Which columns a key leads to.
struct Leads {
    text: bool,
    domain: bool,
}

impl<'l> DeserializeSeed<'l> for Key<'_> {
    type Value = Leads;

    fn deserialize<D: Deserializer<'l>>(self, json: D) -> Result<Leads, D::Error> {
        json.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = Leads;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<Leads, E> {
        Ok(Leads {
            text: self.text.is_some_and(|name| name == key),
            domain: self.domain.is_some_and(|name| name == key),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{DomainRule, Format};
    use super::*;

    fn spec() -> Spec {
        Spec {
            origin: "test".into(),
            format: Format::Jsonl,
            text: Column::parse("text").unwrap(),
            domain: DomainRule::Column(Column::parse("meta.set").unwrap()),
            max_document_bytes: 1000,
        }
    }

    fn any_json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<f64>().prop_map(Into::into),
            "\\PC{0,4}".prop_map(Into::into),
            Just("é\n\"\\\u{1}😀".into()),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            let key = prop_oneof![Just("text"), Just("meta"), Just("set"), Just("other")];
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..3).prop_map(Into::into),
                proptest::collection::vec((key, inner), 0..4).prop_map(|pairs| {
                    serde_json::Value::Object(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn a_row_holds_what_serde_json_finds_in_it(text in any_json(), meta in any_json(), other in any_json()) {
            let value = serde_json::json!({"other": other, "text": text, "meta": meta});
            let line = serde_json::to_string(&value).unwrap();
            let spec = spec();
            let mut buffers = Unescaped::default();
            let got = row(line.as_bytes(), &spec, Cell::Missing, &mut buffers);
            let got = got.map(|d| d.map(|d| (d.domain, d.text))).map_err(|reject| reject.reason);
            let expected = match (&value["text"], &value["meta"]["set"]) {
                (serde_json::Value::Null, _) => Err(Reason::NoText),
                (text, _) if !text.is_string() => Err(Reason::TextNotAString),
                (text, _) if text == "" => Ok(None),
                (_, serde_json::Value::Null) => Err(Reason::NoDomain),
                (_, domain) if !domain.is_string() => Err(Reason::DomainNotAString),
                (_, domain) if domain == "" => Err(Reason::BadDomain),
                (text, domain) => Ok(Some((domain.as_str().unwrap(), text.as_str().unwrap()))),
            };
            prop_assert_eq!(got, expected);
        }

        #[test]
        fn lines_do_not_depend_on_the_sizes_in_which_bytes_come(
            lines in proptest::collection::vec(prop_oneof![0..40usize, 70_000..72_000usize], 0..12),
            cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let bytes: Vec<u8> = lines.iter().flat_map(|&length| [vec![b'x'; length], vec![b'\n']].concat()).collect();
            let limit = 71_536;
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.push(bytes.len());
            cuts.sort();
            let mut cutting = Cutting::new(&spec());
            prop_assert_eq!(cutting.limit, limit);
            let mut start = 0;
            for cut in cuts {
                for (i, line) in bytes[start..cut].split(|&byte| byte == b'\n').enumerate() {
                    if i > 0 {
                        cutting.end_line();
                    }
                    cutting.add(line);
                }
                start = cut;
            }
            let kept = |length: usize| if length as u64 > limit { 0 } else { length };
            let data: usize = lines.iter().map(|&length| kept(length) + 1).sum();
            prop_assert_eq!(cutting.lines.data.len(), data);
            let dropped: Vec<_> = (1..).zip(&lines).filter(|(_, length)| **length as u64 > limit).map(|(n, length)| (n, *length as u64)).collect();
            prop_assert_eq!(cutting.lines.dropped, dropped);
            prop_assert_eq!(cutting.number, lines.len() as u64 + 1);
        }
    }

    #[test]
    fn a_line_that_never_ends_takes_no_more_memory_than_the_limit() {
        let mut cutting = Cutting::new(&spec());
        let chunk = vec![b'a'; 10_000];
        (0..100_000).for_each(|_| cutting.add(&chunk));
        assert!(cutting.lines.data.capacity() <= 2 * cutting.limit as usize);
        cutting.end_line();
        assert_eq!(cutting.lines.dropped, [(1, 1_000_000_000)]);
    }
}

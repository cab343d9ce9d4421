//! What the types of a conf cannot say: ranges, names, and keys that depend on each other.

use globset::Glob;

use super::{Conf, Const, Domain, Format, Param, Shares, Source};
use crate::Result;
use crate::source::Column;

/// The longest name of a run: stores add to it, and file systems end at 255 bytes.
const NAME_BYTES: usize = 128;

pub const MIN_MEMORY: u64 = 64_000_000;

/// A part of a source's rows is up to 32 MiB and a document, and the ids of its texts, in the worst case one a byte, are
/// counted in 31 bits.
const MAX_DOCUMENT_BYTES: u64 = 2_000_000_000;

/// Below this a "sequence" is surely a slip, such as 8 for 8K.
const MIN_SEQUENCE_TOKENS: u64 = 16;

/// A sequence is in memory whole, more than once.
const MAX_SEQUENCE_TOKENS: u64 = 1 << 24;

/// A row group is in memory whole, its ids and 32 characters of doc_id for each of its documents in lists that end at 2³¹:
/// even where every document is one token.
const MAX_ROW_GROUP_TOKENS: u64 = 1 << 26;

/// Parquet numbers them in 16 bits.
const MAX_ROW_GROUPS: u64 = i16::MAX as u64;

/// A byte-level vocabulary begins with the 256 bytes.
const MIN_VOCAB: u32 = 256;

pub fn check(conf: &Conf) -> Result<()> {
    run(conf)?;
    sources(conf)?;
    tokenizer(conf)?;
    mixture(conf)?;
    pack(conf)?;
    engine(conf)
}

/// Refuses what stands at `path` unless it is `good`; `rule` completes a sentence that begins with the key.
fn ensure(conf: &Conf, good: bool, path: &[&str], rule: &str) -> Result<()> {
    match good {
        true => Ok(()),
        false => Err(conf.wrong(path, format!("`{}` {rule}", key(path)), "this value", None)),
    }
}

/// The key of a path as people write it: without the numbers of list entries.
fn key(path: &[&str]) -> String {
    let keys: Vec<_> = path.iter().copied().filter(|step| step.parse::<usize>().is_err()).collect();
    keys.join(".")
}

fn run(conf: &Conf) -> Result<()> {
    let name = &conf.run.name;
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    let good = plain && !name.is_empty() && !name.starts_with('.') && name.len() <= NAME_BYTES;
    let rule = "becomes a folder's name: 1 to 128 letters, digits, `-`, `_` and `.`, with no `.` in front";
    ensure(conf, good, &["run", "name"], rule)
}

fn sources(conf: &Conf) -> Result<()> {
    ensure(conf, !conf.source.is_empty(), &["source"], "is empty: a run needs at least one [[source]]")?;

    for (index, source) in conf.source.iter().enumerate() {
        let number = index.to_string();
        let at = |key| ["source", number.as_str(), key];

        ensure(conf, !source.name.is_empty(), &at("name"), "is empty")?;
        if conf.source[..index].iter().any(|earlier| earlier.name == source.name) {
            let help = "documents keep their source's name as `origin`; give each source its own `name`, \
                        which is its url by default";
            let message = format!("two sources are called \"{}\"", source.name);
            return Err(conf.wrong(&at("name"), message, "the second one", Some(help.to_owned())));
        }
        ensure(
            conf,
            source.format != Format::Text || source.text.is_none(),
            &at("text"),
            "is a column, and files of format text have none: the whole file is the text",
        )?;
        if let Some(column) = &source.text {
            self::column(conf, column, &at("text"))?;
        }
        domain(conf, source, &at("domain"))?;
        let share = source.max_reject_share;
        ensure(conf, (0.0..=1.0).contains(&share), &at("max_reject_share"), "must be from 0 to 1")?;
        let good = (1..=MAX_DOCUMENT_BYTES).contains(&source.max_document_bytes.0);
        ensure(conf, good, &at("max_document_bytes"), "must be more than 0, and at most 2GB")?;
    }
    Ok(())
}

fn column(conf: &Conf, column: &str, path: &[&str]) -> Result<()> {
    if Column::parse(column).is_some() {
        return Ok(());
    }
    let message = format!("`{}` must be a column's name, with dots into nested ones", key(path));
    let help = "a name that has a dot itself is quoted, as in SQL: '\"meta.set\"'";
    Err(conf.wrong(path, message, "this value", Some(help.to_owned())))
}

fn domain(conf: &Conf, source: &Source, path: &[&str; 3]) -> Result<()> {
    match &source.domain {
        Domain::Column(_) if source.format == Format::Text => {
            let help = "domain = { const = \"Book\" }, or rules on the file's path: \
                        domain = [{ glob = \"**/*.rs\", domain = \"Rust\" }]";
            let message = "files of format text have no columns to take the domain from";
            Err(conf.wrong(path, message, "a column", Some(help.to_owned())))
        }
        Domain::Column(column) => self::column(conf, column, path),
        Domain::Const(Const { domain }) => ensure(conf, !domain.is_empty(), path, "is empty"),
        Domain::Rules(rules) => {
            ensure(conf, !rules.is_empty(), path, "has no rules, so no document would have a domain")?;
            for (index, rule) in rules.iter().enumerate() {
                let number = index.to_string();
                let [table, source, key] = *path;
                let at = |inner| [table, source, key, number.as_str(), inner];
                ensure(conf, !rule.domain.is_empty(), &at("domain"), "is empty")?;
                if let Err(error) = Glob::new(&rule.glob) {
                    let message = format!("this is not a glob: {}", error.kind());
                    let help = "`*` is anything within a name, `**` any folders, `{a,b}` one of these names, \
                                `[ab]` one of these letters";
                    return Err(conf.wrong(&at("glob"), message, "in this rule", Some(help.to_owned())));
                }
            }
            Ok(())
        }
    }
}

fn tokenizer(conf: &Conf) -> Result<()> {
    let tokenizer = &conf.tokenizer;
    let either =
        "url = \"s3://bucket/tokenizer.json\", or train = { vocab = 8192 } on the run's own documents";
    let wrong =
        |path: &[&str], message, label| Err(conf.wrong(path, message, label, Some(either.to_owned())));
    match (&tokenizer.url, &tokenizer.train) {
        (None, None) => {
            wrong(&["tokenizer"], "[tokenizer] has neither `url` nor `train`", "give one of them")
        }
        (Some(_), Some(_)) => {
            wrong(&["tokenizer", "train"], "[tokenizer] has both `url` and `train`", "one of them has to go")
        }
        (Some(_), None) => Ok(()),
        (None, Some(train)) => {
            let at = |key| ["tokenizer", "train", key];
            ensure(
                conf,
                train.vocab >= MIN_VOCAB,
                &at("vocab"),
                "must be 256 or more: the bytes come first",
            )?;
            ensure(conf, train.sample.0 > 0, &at("sample"), "must be more than 0")
        }
    }
}

fn mixture(conf: &Conf) -> Result<()> {
    let mixture = &conf.mixture;
    let at = |key| ["mixture", key];
    ensure(conf, mixture.budget.0 > 0, &at("budget"), "must be more than 0")?;
    ensure(conf, (0.0..1.0).contains(&mixture.holdout), &at("holdout"), "must be 0 or more, and below 1")?;
    let counted = mixture.holdout == 0.0 || mixture.holdout >= 1e-6;
    ensure(conf, counted, &at("holdout"), "must be 0, or a millionth at least")?;
    ensure(conf, mixture.long_tokens.0 > 0, &at("long_tokens"), "must be more than 0")?;
    ensure(conf, mixture.max_span.0 > 0, &at("max_span"), "must be more than 0")?;
    // each copy has a key that is looked at
    let good = (1..=1000).contains(&mixture.max_copies);
    ensure(conf, good, &at("max_copies"), "must be 1 or more, and at most 1000")?;

    if let Shares::Table(shares) = &mixture.shares {
        for (domain, share) in shares {
            let good = share.is_finite() && *share >= 0.0;
            ensure(conf, good, &["mixture", "shares", domain], "must be a number, not negative")?;
        }
        let sum: f64 = shares.values().sum();
        let rule = "must sum to more than 0, and to a finite number";
        ensure(conf, sum > 0.0 && sum.is_finite(), &at("shares"), rule)?;
    }
    for (name, param) in &mixture.params {
        // JSON, in which manifests are written, has no other numbers.
        let good = !matches!(param, Param::Float(value) if !value.is_finite());
        ensure(conf, good, &["mixture", "params", name], "must be a finite number")?;
    }
    Ok(())
}

fn pack(conf: &Conf) -> Result<()> {
    let pack = &conf.pack;
    let at = |key| ["pack", key];
    let good = (MIN_SEQUENCE_TOKENS..=MAX_SEQUENCE_TOKENS).contains(&pack.sequence_tokens.0);
    ensure(conf, good, &at("sequence_tokens"), "must be 16 or more, and at most 16777216")?;
    ensure(conf, pack.sequences_per_file >= 1, &at("sequences_per_file"), "must be 1 or more")?;
    ensure(conf, pack.sequences_per_row_group >= 1, &at("sequences_per_row_group"), "must be 1 or more")?;
    let good = pack.sequences_per_row_group <= pack.sequences_per_file;
    let rule = format!("must be at most `sequences_per_file`, which is {}", pack.sequences_per_file);
    ensure(conf, good, &at("sequences_per_row_group"), &rule)?;
    let (sequence, group) = (pack.sequence_tokens.0, u64::from(pack.sequences_per_row_group));
    let rule = format!(
        "must be at most {} where a sequence is {sequence} tokens: a row group is in memory whole",
        MAX_ROW_GROUP_TOKENS / sequence
    );
    ensure(conf, group <= MAX_ROW_GROUP_TOKENS / sequence, &at("sequences_per_row_group"), &rule)?;
    let most = MAX_ROW_GROUPS * group;
    let rule = format!(
        "must be at most {most} where a row group has {group}: a file has at most {MAX_ROW_GROUPS} of them"
    );
    ensure(conf, u64::from(pack.sequences_per_file) <= most, &at("sequences_per_file"), &rule)
}

fn engine(conf: &Conf) -> Result<()> {
    let engine = &conf.engine;
    ensure(conf, engine.partitions != Some(0), &["engine", "partitions"], "must be 1 or more")?;
    ensure(conf, engine.recipe_seconds != Some(0), &["engine", "recipe_seconds"], "must be 1 or more")?;
    ensure(conf, engine.memory.0 >= MIN_MEMORY, &["engine", "memory"], "must be 64MB or more")?;
    let host = |url: &String| url.strip_prefix("df://").is_some_and(|host| !host.is_empty());
    let good = engine.url.as_ref().is_none_or(host);
    ensure(conf, good, &["engine", "url"], "must be a Ballista scheduler's, `df://host:50050`")
}

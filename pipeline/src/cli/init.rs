//! `lengthwise init`

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use toml_edit::{DocumentMut, InlineTable, value};

use super::{out, stores};
use crate::error::Doing;
use crate::source::{Format, list, reads};
use crate::sql::recipes;
use crate::{Error, Result};

/// The conf, over text of the project's own making.
const CONF: &str = include_str!("init/first.toml");

const CHECK: &str = include_str!("init/catalog_has_domains_with_names.sql");

#[derive(Args)]
#[command(after_help = "Examples:
  lengthwise init mixture
  lengthwise init mixture --source s3://bucket/shards/")]
pub struct InitArguments {
    /// Where the project goes; what is there already stays as it is
    folder: PathBuf,
    /// A file, a folder or a glob to read, local or in an object store; by default the project makes a small text of its own
    #[arg(long, value_name = "URL")]
    source: Option<String>,
}

pub async fn main(arguments: InitArguments) -> Result<()> {
    let folder = arguments.folder;
    let name = folder.to_str().filter(|name| !name.contains("://") && !name.contains(char::is_control));
    let Some(name) = name else {
        let message = format!("a project cannot be made in {}", folder.display());
        return Err(Error::usage(
            message,
            "name a folder of this machine, in UTF-8 and without control characters",
        ));
    };
    let mut files = vec![(".gitignore".to_owned(), "/out\n".to_owned())];
    match arguments.source {
        Some(url) => files.push(("conf/first.toml".into(), conf_of(&url).await?)),
        None => files.extend([
            ("conf/first.toml".into(), conf().to_string()),
            ("text/documents.jsonl".into(), own_text()),
        ]),
    }
    files.push(("sql/checks/catalog_has_domains_with_names.sql".into(), CHECK.into()));
    files.extend(recipes().map(|(path, text)| (path.to_owned(), text.into())));

    let is_there = |(name, _): &&(String, String)| folder.join(name).symlink_metadata().is_ok();
    if let Some((name, _)) = files.iter().find(is_there) {
        return Err(Error::usage(
            format!("{} is there already, and nothing was written", folder.join(name).display()),
            "name another folder, or move away what is in this one",
        ));
    }
    for (i, (name, text)) in files.iter().enumerate() {
        let path = folder.join(name);
        if let Err(error) = write_new(&path, text) {
            // nothing is left in the way of the next try
            for (name, _) in &files[..i] {
                let _ = std::fs::remove_file(folder.join(name));
            }
            return Err(error);
        }
    }
    tracing::info!("wrote {} files below {}; what to type next:", files.len(), folder.display());
    let enter = format!("cd {}\n", quoted(name));
    out(enter + "lengthwise preview conf/first.toml\nlengthwise run conf/first.toml\n").map(drop)
}

fn conf() -> DocumentMut {
    let mut conf: DocumentMut = CONF.parse().expect("it is TOML");
    if !cfg!(feature = "train") {
        conf.remove("train");
    }
    conf
}

/// The conf over files that somebody has, which are looked at for their format.
async fn conf_of(url: &str) -> Result<String> {
    let at = stores()?.open(url)?;
    // the format text lists all files
    let files = list(at.store.as_ref(), &at.path, &at.url(), Format::Text, &[]).await?.files;
    let names: Vec<String> = files.iter().map(|file| file.path.as_ref().to_lowercase()).collect();
    let count = |of: &dyn Fn(&str) -> bool| names.iter().filter(|name| of(name)).count();
    // a `.json` may also be a setting of what it lies beside
    let is_lines =
        |name: &str| reads(Format::Jsonl, name) && !name.contains(".json.") && !name.ends_with(".json");
    let (tables, lines) = (count(&|name| reads(Format::Parquet, name)), count(&is_lines));
    let json = count(&|name| reads(Format::Jsonl, name));
    let (format, read) = match (tables, lines) {
        (1.., 1..) => {
            let message = format!("{} has files of two formats, JSONL and Parquet", at.url());
            return Err(Error::usage(message, "name those of one format, as in `--source 'data/*.parquet'`"));
        }
        (1.., 0) => ("parquet", tables),
        (0, 1..) => ("jsonl", json),
        (0, 0) if json * 2 > names.len() => ("jsonl", json),
        (0, 0) => ("text", names.len()),
    };
    tracing::info!("{} has {read} files to be read as {format}", at.url());
    let mut conf = conf();
    let source = &mut conf["source"][0];
    source["url"] = value(at.url());
    source["format"] = value(format);
    source["domain"] = value(InlineTable::from_iter([("const", "all")]));
    Ok(conf.to_string())
}

/// Writes a file that is not there, and its folders.
fn write_new(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().unwrap_or(path);
    std::fs::create_dir_all(folder).doing(|| format!("cannot make {}", folder.display()))?;
    let file = OpenOptions::new().write(true).create_new(true).open(path);
    let written = file.and_then(|mut file| {
        file.write_all(text.as_bytes()).inspect_err(|_| drop(std::fs::remove_file(path)))
    });
    written.doing(|| format!("cannot write {}", path.display()))
}

/// A name as a shell takes it.
fn quoted(name: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_./".contains(c);
    // what begins with a dash is an option
    let name = if name.starts_with('-') { &format!("./{name}") } else { name };
    if name.chars().all(is_plain) { name.into() } else { format!("'{}'", name.replace('\'', r"'\''")) }
}

/// Documents of two domains as JSONL, the same on every call. The words are made up, and frequent words are short.
/// Half as many documents have twice the length. Letters have up to 2,500 words, and books up to 40,000.
fn own_text() -> String {
    const SYLLABLES: [&str; 16] =
        ["bi", "cor", "da", "el", "fi", "ga", "in", "ka", "lo", "mer", "no", "pi", "ra", "su", "ta", "ve"];
    let mut state = 1_u64;
    let mut next = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut lines = String::new();
    for i in 0..400 {
        let (domain, doublings) = if i % 2 == 0 { ("letters", 5) } else { ("books", 9) };
        let doublings = (next(1 << 16) + 1).trailing_zeros().min(doublings);
        let words = (40 + next(40)) << doublings;
        let mut text = String::new();
        for word in 1..=words {
            // each of up to three digits of the word's number is a syllable; small numbers are more frequent
            let most = next(1 << 12);
            let mut number = next(most + 1);
            text.push_str(SYLLABLES[(number % 16) as usize]);
            while number >= 16 {
                number /= 16;
                text.push_str(SYLLABLES[(number % 16) as usize]);
            }
            text.push_str(if word % 12 == 0 || word == words { ".\n" } else { " " });
        }
        let _ = writeln!(lines, "{}", json!({ "domain": domain, "text": text }));
    }
    lines
}

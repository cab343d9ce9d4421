//! Which files a source has, and how they are put together into units of work.

use std::path::PathBuf;

use futures::TryStreamExt;
use globset::{GlobBuilder, GlobMatcher};
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::Format;
use crate::store::whole;
use crate::{Error, Result};

/// Smaller files (as stored) are read in bundles.
pub const BUNDLE_FILE_BYTES: u64 = 4 << 20;

/// A bundle has about this to twice this many bytes, as stored.
const BUNDLE_BYTES: u64 = 16 << 20;

/// A file as it was listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Where it is in its store.
    #[serde(serialize_with = "write_path", deserialize_with = "read_path")]
    pub path: Path,
    /// What a person can paste.
    pub url: String,
    pub size: u64,
    /// The store's e_tag, or time and size where it has none: with the path it names the content.
    pub version: String,
}

/// Files that are read one after the other, as one stream of rows: one large file, or a bundle of small
/// ones, sorted by path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    pub files: Vec<SourceFile>,
}

fn write_path<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
    path.as_ref().serialize(to)
}

fn read_path<'de, D: Deserializer<'de>>(from: D) -> Result<Path, D::Error> {
    Path::parse(String::deserialize(from)?).map_err(de::Error::custom)
}

/// The version of an object, the same whether it was listed or got.
pub(super) fn version(meta: &ObjectMeta) -> String {
    match &meta.e_tag {
        // Azure quotes it in answers to GET, and does not in listings
        Some(tag) => tag.trim_matches('"').to_owned(),
        // listings have milliseconds, answers to GET have seconds
        None => format!("{}-{}", meta.last_modified.timestamp(), meta.size),
    }
}

/// Lists the files of `url`, sorted by path. `path` is the part of the url inside the store.
///
/// - A file is taken as it is.
/// - Of a folder, all files below it that have one of the format's endings (for text: all files).
/// - Of a glob (`*`, `**`, `?`, `[…]`, `{a,b}`), what it matches; where its last part is only `*` or `**`,
///   with one of the format's endings. Only the folder before the first part with a glob is listed.
///
/// Files and folders whose names start with `.` or, where they are tables, `_` are skipped, unless the url itself has a
/// part that starts so (`data/_raw`, `data/.*`).
///
/// # Errors
/// Nothing is found, the glob is wrong, the store fails, or a local name is one that it can't read.
pub async fn list(
    store: &dyn ObjectStore,
    path: &Path,
    url: &str,
    format: Format,
) -> Result<Vec<SourceFile>> {
    let base = url.strip_suffix(path.as_ref()).unwrap_or(url);
    let as_file = |meta: ObjectMeta| SourceFile {
        url: format!("{base}{}", meta.location),
        size: meta.size,
        version: version(&meta),
        path: meta.location,
    };
    let failed = |source| Error::Storage { doing: "list", url: url.to_owned(), source };

    if !path.as_ref().is_empty() {
        match store.head(path).await {
            Ok(meta) => return Ok(vec![as_file(meta)]),
            Err(object_store::Error::NotFound { .. }) => {}
            Err(source) => return Err(failed(source)),
        }
    }
    let pattern = Pattern::new(path, url, format)?;
    let listed = whole(async || {
        let (mut files, mut other) = (vec![], None::<String>);
        let mut listed = store.list(Some(&pattern.folder));
        while let Some(meta) = listed.try_next().await? {
            if pattern.takes(&meta.location) {
                files.push(as_file(meta));
            } else if other.as_deref().is_none_or(|other| meta.location.as_ref() < other) {
                other = Some(meta.location.to_string());
            }
        }
        Ok((files, other))
    });
    let (mut files, other) = listed.await.map_err(failed)?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    if url.starts_with('/')
        && let Some(unlisted) =
            unlisted(&std::path::Path::new("/").join(pattern.folder.as_ref()), &pattern.folder, &pattern)
    {
        return Err(Error::usage(
            format!(
                "`{}` cannot be read: local names that end in `#` and digits are taken for half-written files",
                unlisted.display()
            ),
            "rename it",
        ));
    }
    if files.is_empty() {
        let looked_for = match (&pattern.glob, pattern.endings) {
            (Some(_), []) => "files that match it".to_owned(),
            (_, []) => "files".to_owned(),
            (_, endings) => format!("files named *{}", endings.join(", *")),
        };
        let found = match other {
            Some(other) => format!("`{base}{other}` and what else is there does not count"),
            None => format!("there is nothing below `{base}{}`", pattern.folder),
        };
        return Err(Error::usage(
            format!("`{url}` has no files"),
            format!(
                "looked for {looked_for}; {found} (names that start with `.`, or `_` where they are tables, are skipped)"
            ),
        ));
    }
    Ok(files)
}

/// A file of a local folder that the pattern takes and that no listing of object_store's shows.
fn unlisted(at: &std::path::Path, folder: &Path, pattern: &Pattern) -> Option<PathBuf> {
    for entry in std::fs::read_dir(at).ok()?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = folder.clone().join(name.as_str());
        let staged = |digits: &str| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if let Some(found) = unlisted(&entry.path(), &path, pattern) {
                return Some(found);
            }
        } else if name.rsplit_once('#').is_some_and(|(_, digits)| staged(digits)) && pattern.takes(&path) {
            return Some(entry.path());
        }
    }
    None
}

/// Which of the listed files a url means.
struct Pattern {
    /// What is listed: everything before the first part with a glob.
    folder: Path,
    glob: Option<GlobMatcher>,
    /// What names have to end with; anything goes where there are none.
    endings: &'static [&'static str],
    /// Which of `.` and `_` names below the folder may start with.
    hidden: Vec<char>,
    /// What the names of files that are no data start with.
    private: &'static [char],
}

impl Pattern {
    fn new(path: &Path, url: &str, format: Format) -> Result<Self> {
        let is_glob = |part: &str| part.contains(['*', '?', '[', '{']);
        let parts: Vec<&str> = path.as_ref().split('/').collect();
        let folders = parts.iter().take_while(|part| !is_glob(part)).count();
        let glob = (folders < parts.len())
            .then(|| GlobBuilder::new(path.as_ref()).literal_separator(true).build())
            .transpose()
            .map_err(|error| {
                Error::usage(
                    format!("`{url}` is not a glob: {}", error.kind()),
                    "`*` matches within a name, `**` across folders, `{a,b}` either; `[*]` is a star itself",
                )
            })?;
        let names_files = glob.is_some() && parts.last().is_some_and(|last| last.contains(|c| c != '*'));
        Ok(Self {
            folder: parts[..folders].iter().copied().collect(),
            glob: glob.map(|glob| glob.compile_matcher()),
            endings: if names_files { &[] } else { endings(format) },
            hidden: parts[folders..].iter().filter_map(|part| part.chars().next()).collect(),
            // a table's writers leave `_SUCCESS` beside it; a text may well be `__init__.py`
            private: if format == Format::Text { &['.'] } else { &['.', '_'] },
        })
    }

    fn takes(&self, path: &Path) -> bool {
        let name = path.filename().unwrap_or_default();
        let is_hidden = |part: &str| part.starts_with(self.private) && !part.starts_with(&*self.hidden);
        let mut below = path.parts().skip(self.folder.parts().count());
        self.glob.as_ref().is_none_or(|glob| glob.is_match(path.as_ref()))
            && (self.endings.is_empty() || self.endings.iter().any(|ending| name.ends_with(ending)))
            && !below.any(|part| is_hidden(part.as_ref()))
    }
}

fn endings(format: Format) -> &'static [&'static str] {
    match format {
        Format::Jsonl => &[".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"],
        Format::Parquet => &[".parquet"],
        Format::Text => &[],
    }
}

/// Puts files together into units: large ones alone, small ones in bundles by a hash of their path, so that
/// a new file changes one bundle and leaves the others, and what is cached of them, alone.
///
/// The number of bundles is a power of two that follows the small files' total size: it rarely changes.
pub fn units(files: Vec<SourceFile>) -> Vec<Unit> {
    let (small, large): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| file.size < BUNDLE_FILE_BYTES);
    let total: u64 = small.iter().map(|file| file.size).sum();
    let bundles = 1u64 << (total / BUNDLE_BYTES).max(1).ilog2();
    let mut units = vec![Unit { files: Vec::new() }; bundles as usize];
    for file in small {
        units[(path_hash(&file.path) % bundles) as usize].files.push(file);
    }
    units.extend(large.into_iter().map(|file| Unit { files: vec![file] }));
    units.retain(|unit| !unit.files.is_empty());
    units
}

fn path_hash(path: &Path) -> u64 {
    let hash = blake3::hash(path.as_ref().as_bytes());
    hash.as_bytes()[..8].iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

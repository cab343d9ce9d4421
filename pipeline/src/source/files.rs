//! A source's files, and how they are put together into units of work.

use object_store::ObjectMeta;
use object_store::path::Path;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

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
    /// The store's e_tag, or the [`digest`](Self::digest) of the content where it gives none: with the path it names the
    /// content. A local file's e_tag is its inode, size and time of modification, in microseconds.
    pub version: String,
}

/// What the version of a file without an e_tag begins with.
const DIGEST: &str = "blake3:";

impl SourceFile {
    /// The version of a file whose store tells nothing of it that two contents could not have in common.
    pub(super) fn version_of(digest: blake3::Hash) -> String {
        format!("{DIGEST}{digest}")
    }

    /// The digest of the content, where its version is one.
    pub(super) fn digest(&self) -> Option<&str> {
        self.version.strip_prefix(DIGEST)
    }
}

/// Files that are read one after the other, as one stream of rows: one large file, or a bundle of small
/// ones, sorted by path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    pub files: Vec<SourceFile>,
}

impl Unit {
    /// Bytes of its files, as they are stored.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }
}

fn write_path<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
    path.as_ref().serialize(to)
}

fn read_path<'de, D: Deserializer<'de>>(from: D) -> Result<Path, D::Error> {
    Path::parse(String::deserialize(from)?).map_err(de::Error::custom)
}

/// The version of an object, the same whether it was listed or got; none where the store gives no e_tag. The time is no
/// version: answers to GET have it in seconds, and files of a size are written within one.
pub(super) fn version(meta: &ObjectMeta) -> Option<String> {
    // Azure quotes it in answers to GET, and does not in listings
    Some(meta.e_tag.as_ref()?.trim_matches('"').to_owned())
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

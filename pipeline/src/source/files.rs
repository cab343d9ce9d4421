//! A source's files, and how they are grouped into units of work.

use object_store::ObjectMeta;
use object_store::path::Path;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Files of fewer stored bytes than this are read in bundles.
pub const BUNDLE_FILE_BYTES: u64 = 4 << 20;

/// A bundle has about one to two times this many stored bytes.
const BUNDLE_BYTES: u64 = 16 << 20;

/// A file as it was listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// The file's path in its store.
    #[serde(serialize_with = "write_path", deserialize_with = "read_path")]
    pub path: Path,
    /// The file's URL, as a user can paste it.
    pub url: String,
    pub size: u64,
    /// The store's e_tag or, if it gives none, the [`digest`](Self::digest) of the content. Path and version
    /// together identify the content. A local file's e_tag is its inode, size and modification time in
    /// microseconds.
    pub version: String,
}

/// The prefix of a version that is a digest.
const DIGEST: &str = "blake3:";

impl SourceFile {
    /// The version of a file if its store gives nothing else that identifies the content.
    pub(super) fn version_of(digest: blake3::Hash) -> String {
        format!("{DIGEST}{digest}")
    }

    /// The digest of the content, if the version is one.
    pub(super) fn digest(&self) -> Option<&str> {
        self.version.strip_prefix(DIGEST)
    }
}

/// Files that are read one after the other, as one stream of rows: one large file, or a bundle of small ones,
/// sorted by path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    pub files: Vec<SourceFile>,
}

impl Unit {
    /// The size of its files in bytes, as stored.
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

/// The version of an object, which is the same in a listing and in an answer to GET; `None` if the store
/// gives no e_tag. The modification time would not do: answers to GET have it in seconds, and two files of
/// the same size may be written within one.
pub(super) fn version(meta: &ObjectMeta) -> Option<String> {
    // Azure quotes the e_tag in answers to GET, but not in listings
    Some(meta.e_tag.as_ref()?.trim_matches('"').to_owned())
}

/// Groups files into units. A large file is a unit of its own. Small files go into bundles by a hash of their
/// path, so that a new file changes one bundle and leaves the others, and what is cached of them, alone.
///
/// The number of bundles is a power of two that follows from the small files' total size, so it rarely
/// changes.
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

//! Lists the files that a URL names, and those that lie there and are not read.

use std::collections::HashSet;
use std::path::PathBuf;

use futures::{StreamExt, TryStreamExt, stream};
use globset::{GlobBuilder, GlobMatcher};
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};

use super::files::{SourceFile, version};
use super::local::{self, Found};
use super::unread::{Unread, Why};
use super::{Format, jsonl};
use crate::layout;
use crate::storage::whole;
use crate::{Error, Result};

/// How many files are looked up at a time.
const LOOKS: usize = 32;

/// What a URL names.
#[derive(Debug, Default)]
pub struct Listing {
    /// The files, sorted by path.
    pub files: Vec<SourceFile>,
    /// Files at the URL that look like data and are not read: the reason and the URL, sorted.
    pub unread: Vec<(Why, String)>,
}

/// Lists the files of `url`. `path` is the part of the URL inside the store.
///
/// - A file is taken as it is.
/// - A folder gives all files below it that have one of the format's endings (for text: all files).
/// - A glob (`*`, `**`, `?`, `[…]`, `{a,b}`) gives the files that it matches, and for a folder that it
///   matches, what the folder gives. If its last part consists of stars alone, they say how deep to go: `*`
///   takes the files of a folder, `**` all files below it, in both cases only those with one of the format's
///   endings.
///
/// A name that exists is meant literally, even if it looks like a glob: `data/br[1]/*` is about the folder
/// `br[1]`, if there is one.
///
/// Files and folders whose names start with `.` or, for JSONL and Parquet, `_` are skipped, unless the URL
/// itself has a part that starts with it (`data/_raw`, `data/.*`). What runs wrote to the outputs `own` is
/// skipped too, unless the URL names one of their folders, or one inside them.
///
/// # Errors
/// Nothing is found, the glob is invalid, the store fails, a link leads nowhere, or a local file has a name
/// that cannot be read.
pub async fn list(
    store: &dyn ObjectStore,
    path: &Path,
    url: &str,
    format: Format,
    own: &[Path],
) -> Result<Listing> {
    let base = url.strip_suffix(path.as_ref()).unwrap_or(url);
    let is_local = url.starts_with('/');
    let failed = |source| Error::Storage { doing: "list", url: url.to_owned(), source };
    let names: Vec<&str> = path.as_ref().split('/').filter(|name| !name.is_empty()).collect();
    let literal = literal(store, &names, is_local).await.map_err(failed)?;

    if literal == names.len() && !names.is_empty() {
        let is_file = match is_local {
            true => match local::look(&on_disk(path.as_ref()))? {
                Some(Found::File) => true,
                Some(Found::Folder) | None => false,
                Some(Found::Not(Why::DeadLink)) => return Err(dead_link(url)),
                Some(Found::Not(_)) => {
                    let help = "name files or folders; write what a pipe gives to a file first";
                    return Err(Error::usage(format!("`{url}` is a pipe, a socket or a device"), help));
                }
                Some(Found::Misnamed(why)) => return Err(misnamed(url, why)),
            },
            false => match store.head(path).await {
                Ok(_) => true,
                Err(object_store::Error::NotFound { .. }) => false,
                Err(source) => return Err(failed(source)),
            },
        };
        if is_file {
            let files = vec![source_file(store, base, path.clone(), None).await?];
            return Ok(Listing { files, unread: vec![] });
        }
    }
    let pattern = Pattern::new(&names, literal, url, format, own)?;
    let mut scan = if is_local {
        let mut scan = Scan::new(&pattern, base);
        let folder = on_disk(&pattern.folder);
        if folder.is_dir() {
            let enters = |path: &str| pattern.skips(path).is_none();
            local::walk(&folder, &pattern.folder, &enters, &mut |path, found| scan.see(path, found))?;
        }
        scan
    } else {
        let listed = whole(async || {
            let mut scan = Scan::new(&pattern, base);
            let mut listed = store.list(Some(&pattern.path()));
            while let Some(meta) = listed.try_next().await? {
                scan.listed(meta);
            }
            Ok(scan)
        });
        listed.await.map_err(failed)?
    };
    scan.forget_markers();
    scan.add_empty_folders();
    let found = stream::iter(std::mem::take(&mut scan.files));
    let files: Vec<SourceFile> =
        found.map(|(path, meta)| source_file(store, base, path, meta)).buffered(LOOKS).try_collect().await?;
    let (empty, mut files): (Vec<_>, Vec<_>) =
        files.into_iter().partition(|file| file.size == 0 && may_be_empty(format, &file.path));
    scan.unread.extend(empty.into_iter().map(|file| (Why::Empty, file.url)));
    scan.unread.sort();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    if files.is_empty() {
        return Err(scan.nothing(url));
    }
    if scan.passed > 0 {
        let first = scan.other.unwrap_or_default();
        tracing::debug!(
            "{url}: {} names are passed over that begin with `.` or `_`, or are no data's; the first is `{base}{first}`",
            scan.passed
        );
    }
    Ok(Listing { files, unread: scan.unread })
}

/// The file system's path of a path in the local store.
fn on_disk(path: &str) -> PathBuf {
    std::path::Path::new("/").join(path)
}

fn dead_link(url: &str) -> Error {
    Error::usage(
        format!("`{url}` is a link to what isn't there"),
        "bring back what it leads to, or remove the link",
    )
}

fn misnamed(url: &str, why: &str) -> Error {
    Error::usage(format!("`{url}` cannot be read: its name {why}"), "rename it")
}

/// How many of a path's names, from the first on, are literal: names without the characters of globs, and
/// names that exist.
async fn literal(store: &dyn ObjectStore, names: &[&str], is_local: bool) -> object_store::Result<usize> {
    for (i, name) in names.iter().enumerate() {
        if !name.contains(['*', '?', '[', '{']) {
            continue;
        }
        let path = names[..=i].join("/");
        let is_there = if is_local {
            on_disk(&path).symlink_metadata().is_ok()
        } else {
            let path = Path::parse(&path)?;
            match store.head(&path).await {
                Ok(_) => true,
                Err(object_store::Error::NotFound { .. }) => {
                    store.list(Some(&path)).try_next().await?.is_some()
                }
                Err(error) => return Err(error),
            }
        };
        if !is_there {
            return Ok(i);
        }
    }
    Ok(names.len())
}

/// A file with its size and version. The version is the e_tag from the listing or from a request for the
/// file, or else the digest of its content. A local file is always requested, so that its version is the one
/// that opening it gives later.
async fn source_file(
    store: &dyn ObjectStore,
    base: &str,
    path: Path,
    listed: Option<ObjectMeta>,
) -> Result<SourceFile> {
    let url = format!("{base}{path}");
    let failed = |source| Error::Storage { doing: "look at", url: url.clone(), source };
    let meta = match listed.filter(|meta| meta.e_tag.is_some()) {
        Some(meta) => meta,
        None => store.head(&path).await.map_err(failed)?,
    };
    let version = match version(&meta) {
        Some(version) => version,
        None => {
            let mut hasher = blake3::Hasher::new();
            let mut bytes = store.get(&path).await.map_err(failed)?.into_stream();
            while let Some(some) = bytes.try_next().await.map_err(failed)? {
                hasher.update(&some);
            }
            SourceFile::version_of(hasher.finalize())
        }
    };
    Ok(SourceFile { size: meta.size, url, version, path })
}

/// Decides which of the files below a folder a URL means.
struct Pattern<'a> {
    /// Everything before the first part with a glob.
    folder: String,
    /// The glob that paths match from there on.
    glob: Option<GlobMatcher>,
    /// Whether the glob says what files are called, and not only how deep they are.
    names_files: bool,
    format: Format,
    /// Names below the folder may start with one of these, although it is in `private`.
    hidden: Vec<char>,
    /// The first characters of names that are skipped.
    private: &'static [char],
    /// Outputs of runs whose files are skipped.
    own: Vec<&'a str>,
}

/// What a pattern says about a path.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Verdict {
    Read,
    /// It looks like data, but is not read.
    Unread(Why),
    /// It does not look like data.
    NoData,
    Hidden,
    Own,
    /// The glob doesn't match it.
    Outside,
}

impl<'a> Pattern<'a> {
    /// A pattern from a path's names. The first `literal` of them are a folder, the others a glob.
    fn new(names: &[&str], literal: usize, url: &str, format: Format, own: &'a [Path]) -> Result<Self> {
        let (folders, rest) = names.split_at(literal);
        let folder = folders.join("/");
        let glob = (!rest.is_empty())
            .then(|| GlobBuilder::new(&rest.join("/")).literal_separator(true).build())
            .transpose()
            .map_err(|error| {
                Error::usage(
                    format!("`{url}` is not a glob: {}", error.kind()),
                    "`*` matches within a name, `**` across folders, `{a,b}` either; `[*]` is a star itself",
                )
            })?;
        // a URL that names a folder of runs means what is in it
        let is_named =
            |own: &&str| below(&folder, own).is_some_and(|rest| !rest.is_empty() && layout::is_of_runs(rest));
        Ok(Self {
            own: own.iter().map(Path::as_ref).filter(|own| !is_named(own)).collect(),
            glob: glob.map(|glob| glob.compile_matcher()),
            names_files: rest.last().is_some_and(|last| last.contains(|c| c != '*')),
            format,
            hidden: rest.iter().filter_map(|part| part.chars().next()).collect(),
            // writers of tables leave `_SUCCESS` next to them; a text may well be `__init__.py`
            private: if format == Format::Text { &['.'] } else { &['.', '_'] },
            folder,
        })
    }

    fn path(&self) -> Path {
        // it is the beginning of a valid path
        Path::parse(&self.folder).unwrap_or_default()
    }

    /// The verdict on a path and everything below it, if that is skipped.
    fn skips(&self, path: &str) -> Option<Verdict> {
        let is_hidden = |part: &str| part.starts_with(self.private) && !part.starts_with(&*self.hidden);
        match () {
            () if self.own.iter().any(|own| below(path, own).is_some_and(layout::is_written_by_runs)) => {
                Some(Verdict::Own)
            }
            () if self.rest(path).split('/').any(is_hidden) => Some(Verdict::Hidden),
            () => None,
        }
    }

    fn rest<'p>(&self, path: &'p str) -> &'p str {
        below(path, &self.folder).unwrap_or(path)
    }

    fn verdict(&self, path: &str) -> Verdict {
        if let Some(skipped) = self.skips(path) {
            return skipped;
        }
        let rest = self.rest(path);
        let name = rest.rsplit('/').next().unwrap_or(rest).to_lowercase();
        let by_name = match looks_like_data(self.format, &name) {
            _ if reads(self.format, &name) => Verdict::Read,
            Some(why) => Verdict::Unread(why),
            None => Verdict::NoData,
        };
        let Some(glob) = &self.glob else { return by_name };
        match glob.is_match(rest) {
            true if self.names_files => Verdict::Read,
            true => by_name,
            false if !rest.match_indices('/').any(|(end, _)| glob.is_match(&rest[..end])) => Verdict::Outside,
            false if by_name == Verdict::Read && !self.names_files => Verdict::Unread(Why::Deeper),
            false => by_name,
        }
    }
}

/// The rest of a path behind a folder, empty for the folder itself; `None` if the path is not in the folder.
fn below<'p>(path: &'p str, folder: &str) -> Option<&'p str> {
    let rest = path.strip_prefix(folder)?;
    if folder.is_empty() || rest.is_empty() { Some(rest) } else { rest.strip_prefix('/') }
}

/// Whether a file of this lower-case name is read if only its folder is named.
pub fn reads(format: Format, name: &str) -> bool {
    let ends = |name: &str, endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    match format {
        Format::Jsonl => {
            ends(jsonl::uncompressed(name), &[".jsonl", ".ndjson", ".json"]) && !DATASETS.contains(&name)
        }
        Format::Parquet => ends(name, &[".parquet", ".parq", ".pq"]),
        Format::Text => true,
    }
}

/// Whether a file without bytes is a valid one without rows. Uncompressed lines have neither a header nor a
/// footer.
fn may_be_empty(format: Format, path: &Path) -> bool {
    let name = path.filename().unwrap_or_default().to_lowercase();
    format == Format::Jsonl && jsonl::uncompressed(&name) == name
}

/// Endings of files that people keep next to data: documents, programs, pictures, settings.
const DOCUMENTS: [&str; 24] = [
    "md", "rst", "html", "htm", "pdf", "bib", "tex", "py", "ipynb", "sh", "rs", "js", "css", "sql", "png",
    "jpg", "jpeg", "gif", "svg", "yml", "yaml", "toml", "ini", "cfg",
];

/// Lower-case names of such files that have no ending.
const PAPERS: [&str; 8] =
    ["license", "licence", "copying", "notice", "readme", "authors", "makefile", "dockerfile"];

/// Files that Hugging Face's `datasets` keeps next to data, and does not read as rows either.
const DATASETS: [&str; 4] = ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"];

/// Endings of compressed files and of archives.
const COMPRESSED: [&str; 22] = [
    "gz", "gzip", "tgz", "zst", "zstd", "xz", "txz", "lzma", "bz2", "tbz", "tbz2", "lz", "lz4", "lzo", "br",
    "sz", "snappy", "z", "zip", "7z", "rar", "tar",
];

/// Endings of files that describe other files: checksums, signatures and indexes.
const BESIDE: [&str; 10] = ["md5", "sha1", "sha256", "sha512", "crc", "crc32", "sig", "asc", "idx", "index"];

/// The reason to report a file that is not read, by its lower-case name; `None` if it does not look like
/// data. `x.jsonl.xz`, `x.jsonl-00-of-10` and a `part-00000` without an ending look like data, a README and a
/// checksum don't.
fn looks_like_data(format: Format, name: &str) -> Option<Why> {
    if DATASETS.contains(&name) {
        return None;
    }
    let ending = name.split_once('.').and_then(|(_, endings)| endings.rsplit('.').next());
    match ending {
        None => (!PAPERS.contains(&name)).then_some(Why::OtherFormat),
        Some(last) if BESIDE.contains(&last) || DOCUMENTS.contains(&last) => None,
        Some(last) if COMPRESSED.contains(&last) => {
            let is_read = format == Format::Jsonl && jsonl::uncompressed(name) != name;
            Some(if is_read { Why::OtherFormat } else { Why::Compressed })
        }
        // an unknown ending: a report too many is better than texts that are missed
        Some(_) => Some(Why::OtherFormat),
    }
}

/// What was found for a pattern.
struct Scan<'p> {
    pattern: &'p Pattern<'p>,
    base: &'p str,
    /// The files to read, with their metadata if a listing gave it.
    files: Vec<(Path, Option<ObjectMeta>)>,
    unread: Vec<(Why, String)>,
    /// Folders on the disk, or in the paths of an object store.
    folders: HashSet<String>,
    /// How many paths are neither read nor reported.
    passed: u64,
    /// The first of these paths in sorted order.
    other: Option<String>,
    /// Whether some of these paths were written by runs.
    own: bool,
}

impl<'p> Scan<'p> {
    fn new(pattern: &'p Pattern<'p>, base: &'p str) -> Self {
        let (files, unread, folders) = (vec![], vec![], HashSet::new());
        Self { pattern, base, files, unread, folders, passed: 0, other: None, own: false }
    }

    /// Takes an object from a store's listing.
    fn listed(&mut self, meta: ObjectMeta) {
        let path = meta.location.as_ref();
        for (end, _) in path.rmatch_indices('/') {
            // if a folder is known, so are those around it
            if self.folders.contains(&path[..end]) {
                break;
            }
            self.folders.insert(path[..end].to_owned());
        }
        match self.pattern.verdict(path) {
            Verdict::Read => self.files.push((meta.location.clone(), Some(meta))),
            verdict => self.leave(meta.location.as_ref(), verdict),
        }
    }

    /// Takes a path found on the disk.
    fn see(&mut self, path: &str, found: Found) -> Result<()> {
        let url = format!("{}{path}", self.base);
        match (found, self.pattern.verdict(path)) {
            (Found::Folder, verdict) => match self.pattern.skips(path) {
                Some(_) => self.leave(path, verdict),
                None => drop(self.folders.insert(path.to_owned())),
            },
            (Found::File, Verdict::Read) => match Path::parse(path) {
                Ok(path) => self.files.push((path, None)),
                Err(_) => return Err(misnamed(&url, "is none of an object")),
            },
            (Found::Misnamed(why), Verdict::Read) => return Err(misnamed(&url, why)),
            (Found::Not(Why::DeadLink), Verdict::Read) => return Err(dead_link(&url)),
            // the name of a link does not tell what it would lead to
            (Found::Not(why @ (Why::DeadLink | Why::Loop)), Verdict::NoData)
            | (Found::Not(why), Verdict::Read | Verdict::Unread(_)) => self.unread.push((why, url)),
            (_, verdict) => self.leave(path, verdict),
        }
        Ok(())
    }

    fn leave(&mut self, path: &str, verdict: Verdict) {
        if let Verdict::Unread(why) = verdict {
            self.unread.push((why, format!("{}{path}", self.base)));
            return;
        }
        self.passed += 1;
        self.own |= verdict == Verdict::Own;
        if self.other.as_deref().is_none_or(|other| path < other) {
            self.other = Some(path.to_owned());
        }
    }

    /// Forgets the markers of folders. Consoles and file systems on top of object stores write an empty
    /// object for a folder, with the folder's path; what is in the folder is listed by itself.
    fn forget_markers(&mut self) {
        let (folders, folder) = (&self.folders, &self.pattern.folder);
        let is_folder = |path: &str| folders.contains(path) || path == folder;
        let is_marker = |meta: &ObjectMeta| meta.size == 0 && is_folder(meta.location.as_ref());
        self.files.retain(|(_, meta)| !meta.as_ref().is_some_and(is_marker));
        let base = self.base;
        // a link in a circle is a folder, too, and stays
        self.unread.retain(|(why, url)| {
            *why == Why::Loop || !folders.contains(url.strip_prefix(base).unwrap_or(url))
        });
    }

    /// Reports folders without anything to read that a glob of file names matches. Such a glob means them to
    /// be read, and no file in them would be reported.
    fn add_empty_folders(&mut self) {
        let pattern = self.pattern;
        let Some(glob) = pattern.glob.as_ref().filter(|_| pattern.names_files) else { return };
        let is_meant =
            |folder: &&String| pattern.skips(folder).is_none() && glob.is_match(pattern.rest(folder));
        let mut empty: HashSet<&str> = self.folders.iter().filter(is_meant).map(String::as_str).collect();
        let unread = self.unread.iter().map(|(_, url)| url.strip_prefix(self.base).unwrap_or(url));
        for path in self.files.iter().map(|(path, _)| path.as_ref()).chain(unread) {
            for (end, _) in path.match_indices('/') {
                empty.remove(&path[..end]);
            }
        }
        let empty = empty.into_iter().map(|folder| (Why::EmptyFolder, format!("{}{folder}", self.base)));
        self.unread.extend(empty.collect::<Vec<_>>());
    }

    /// The error if there is nothing to read.
    fn nothing(self, url: &str) -> Error {
        let Self { pattern, base, .. } = self;
        let looked_for = match (&pattern.glob, pattern.format) {
            (Some(_), _) if pattern.names_files => "files that match it",
            (Some(_), Format::Text) => "files that match it",
            (_, Format::Jsonl) => "files named *.jsonl, *.ndjson or *.json, plain or with .gz or .zst behind",
            (_, Format::Parquet) => "files named *.parquet, *.parq or *.pq",
            (None, Format::Text) => "files",
        };
        let found = match self.other {
            _ if !self.unread.is_empty() => Unread::summary(&Unread::all(&self.unread)),
            Some(other) => format!("`{base}{other}` and what else is there does not count"),
            None => format!("there is nothing below `{base}{}`", pattern.folder),
        };
        let own = if self.own { "; so is what runs wrote, unless the url names its folder" } else { "" };
        Error::usage(
            format!("`{url}` has no files"),
            format!(
                "looked for {looked_for}; {found} (names that start with `.`, or `_` where they are tables, are skipped{own})"
            ),
        )
    }
}

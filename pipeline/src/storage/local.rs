//! The disk as an object store: what it has taken, a power cut does not take back, as with any other store.
//!
//! ```text
//! NAME#1     a file is written beside where it will be, and synced …
//! NAME       … gets its name, which an old one loses, or where there is none yet …
//! its folder is synced
//! ```
//!
//! object_store's own reads, lists and deletes. It waits for no disk, and neither copies nor creates where a file can't have
//! two names (hard links): file systems that know none, other disks, files of other users.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Location;
use object_store::{
    CopyMode, CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

/// The whole disk, from `/` on.
#[derive(Debug, Default)]
pub struct Local(LocalFileSystem);

impl fmt::Display for Local {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("the disk")
    }
}

#[async_trait]
impl ObjectStore for Local {
    async fn put_opts(&self, to: &Location, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let new = match options.mode {
            PutMode::Overwrite => false,
            PutMode::Create => true,
            // which it says that it can't
            PutMode::Update(_) => return self.0.put_opts(to, payload, options).await,
        };
        let path = self.0.path_to_filesystem(to)?;
        blocking(to, move || {
            let (staged, mut file) = stage(&path, |staged| File::create_new(staged))?;
            let written = payload.iter().try_for_each(|bytes| file.write_all(bytes));
            let synced = written.and_then(|()| file.sync_all());
            // some file systems upload at this point
            drop(file);
            name(&staged, &path, new, synced)
        })
        .await?;
        Ok(PutResult { e_tag: None, version: None })
    }

    async fn put_multipart_opts(
        &self,
        to: &Location,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let path = self.0.path_to_filesystem(to)?;
        let path_of_it = path.clone();
        blocking(to, move || make_folder_of(&path_of_it)).await?;
        let inner = self.0.put_multipart_opts(to, options).await?;
        Ok(Box::new(Upload { inner, to: to.clone(), path }))
    }

    async fn copy_opts(&self, from: &Location, to: &Location, options: CopyOptions) -> Result<()> {
        let (from, path) = (self.0.path_to_filesystem(from)?, self.0.path_to_filesystem(to)?);
        let new = matches!(options.mode, CopyMode::Create);
        blocking(to, move || copy(&from, &path, new)).await
    }

    async fn get_opts(&self, from: &Location, options: GetOptions) -> Result<GetResult> {
        self.0.get_opts(from, options).await
    }

    async fn get_ranges(&self, from: &Location, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.0.get_ranges(from, ranges).await
    }

    fn delete_stream(
        &self,
        all: BoxStream<'static, Result<Location>>,
    ) -> BoxStream<'static, Result<Location>> {
        self.0.delete_stream(all)
    }

    fn list(&self, prefix: Option<&Location>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.0.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Location>) -> Result<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }
}

/// A large file, a piece at a time.
#[derive(Debug)]
struct Upload {
    inner: Box<dyn MultipartUpload>,
    to: Location,
    path: PathBuf,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, part: PutPayload) -> UploadPart {
        self.inner.put_part(part)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let done = self.inner.complete().await?;
        let path = self.path.clone();
        blocking(&self.to, move || {
            File::open(&path)?.sync_all()?;
            sync_folder_of(&path)
        })
        .await?;
        Ok(done)
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

/// Does what waits for the disk on a thread that may wait.
async fn blocking(to: &Location, work: impl FnOnce() -> io::Result<()> + Send + 'static) -> Result<()> {
    let done = tokio::task::spawn_blocking(work).await?;
    done.map_err(|source| {
        let (kind, source) = (source.kind(), source.into());
        match kind {
            ErrorKind::AlreadyExists => Error::AlreadyExists { path: to.to_string(), source },
            ErrorKind::NotFound => Error::NotFound { path: to.to_string(), source },
            _ => Error::Generic { store: "disk", source },
        }
    })
}

/// Has `make` make a file beside `to` under a name that no listing shows, and the folder for it.
fn stage<T>(to: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<(PathBuf, T)> {
    let (mut number, mut has_folder) = (1, false);
    loop {
        let mut staged = to.as_os_str().to_owned();
        staged.push(format!("#{number}"));
        match make(staged.as_ref()) {
            Ok(made) => return Ok((staged.into(), made)),
            // of another run, or of one that was killed
            Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
            // another one may be at just this
            Err(error) if error.kind() == ErrorKind::NotFound && !has_folder => {
                make_folder_of(to)?;
                has_folder = true;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Gives a staged file the name that it is for, if it is `whole`; there is to be none of that name where it is `new`.
fn name(staged: &Path, to: &Path, new: bool, whole: io::Result<()>) -> io::Result<()> {
    let named = whole.and_then(|()| if new { name_new(staged, to) } else { fs::rename(staged, to) });
    if named.is_err() {
        // it may be gone
        let _ = fs::remove_file(staged);
    }
    named?;
    sync_folder_of(to)
}

/// Gives a staged file a name that no other one has, in the first of three ways that the file system knows.
fn name_new(staged: &Path, to: &Path) -> io::Result<()> {
    let mut named = Err(ErrorKind::Unsupported.into());
    for way in [rename_new, link_new, fill_new] {
        named = way(staged, to);
        if named.as_ref().err().is_none_or(|error| error.kind() == ErrorKind::AlreadyExists) {
            break;
        }
    }
    named
}

#[cfg(target_os = "linux")]
fn rename_new(staged: &Path, to: &Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let path = |path: &Path| std::ffi::CString::new(path.as_os_str().as_bytes());
    let (from, to) = (path(staged)?, path(to)?);
    // Safety: both are texts that end, and outlive the call
    let done = unsafe {
        libc::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), libc::RENAME_NOREPLACE)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
fn rename_new(_: &Path, _: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

fn link_new(staged: &Path, to: &Path) -> io::Result<()> {
    fs::hard_link(staged, to)?;
    // the file has its name, whatever becomes of the other one
    let _ = fs::remove_file(staged);
    Ok(())
}

/// The last resort: who is killed here leaves a part of a file. What is created once has its digest in it (see
/// [`crate::storage::sealed`]), so that half of it is none, and the next one takes its place.
fn fill_new(staged: &Path, to: &Path) -> io::Result<()> {
    let mut from = File::open(staged)?;
    let mut file = File::create_new(to)?;
    let filled = io::copy(&mut from, &mut file).and_then(|_| file.sync_all());
    if filled.is_err() {
        let _ = fs::remove_file(to);
    }
    let _ = fs::remove_file(staged);
    filled
}

/// Another name for the same file, or, where it can't have two, another file of the same bytes.
fn copy(from: &Path, to: &Path, new: bool) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    let own = identity(from)?;
    // a rename over itself would leave the other name behind
    if !new && identity(to).is_ok_and(|other| other == own) {
        return Ok(());
    }
    let link = |staged: &Path| fs::hard_link(from, staged);
    let (staged, whole) = match stage(to, link) {
        Ok((staged, ())) => (staged, Ok(())),
        Err(_) => {
            let (staged, mut file) = stage(to, |path| File::create_new(path))?;
            let copied = File::open(from).and_then(|mut from| io::copy(&mut from, &mut file));
            (staged, copied.and_then(|_| file.sync_all()))
        }
    };
    name(&staged, to, new, whole)
}

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// Makes the folder that a file is to be in, and those around it; each is synced where it is new.
fn make_folder_of(path: &Path) -> io::Result<()> {
    let folder = folder_of(path);
    if folder.is_dir() {
        return Ok(());
    }
    make_folder_of(folder)?;
    match fs::create_dir(folder) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            // another one was faster, unless it is a link to nowhere
            if !folder.is_dir() {
                return Err(ErrorKind::NotADirectory.into());
            }
        }
        made => made?,
    }
    sync_folder_of(folder)
}

/// Has the disk know which names a folder has.
fn sync_folder_of(path: &Path) -> io::Result<()> {
    match File::open(folder_of(path)).and_then(|folder| folder.sync_all()) {
        // not every file system can, and who may write into a folder need not be allowed to read it
        Err(error)
            if [ErrorKind::InvalidInput, ErrorKind::Unsupported, ErrorKind::PermissionDenied]
                .contains(&error.kind()) =>
        {
            Ok(())
        }
        synced => synced,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let names =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn each_way_to_a_new_name_takes_none_from_another_file() {
        let dir = tempfile::tempdir().unwrap();
        let (staged, to) = (dir.path().join("x#1"), dir.path().join("x"));
        for way in [rename_new, link_new, fill_new, name_new] {
            fs::write(&staged, "first").unwrap();
            way(&staged, &to).unwrap();
            assert_eq!(names(dir.path()), ["x"]);
            fs::write(&staged, "second").unwrap();
            assert_eq!(way(&staged, &to).unwrap_err().kind(), ErrorKind::AlreadyExists);
            assert_eq!(fs::read(&to).unwrap(), b"first");
            fs::remove_file(&to).unwrap();
        }
    }

    #[tokio::test]
    async fn what_can_not_be_linked_is_copied() {
        let here = tempfile::tempdir().unwrap();
        // memory, where there is a disk too
        let Ok(other) = tempfile::tempdir_in("/dev/shm") else { return eprintln!("skipped: no /dev/shm") };
        if fs::metadata(here.path()).unwrap().dev() == fs::metadata(other.path()).unwrap().dev() {
            return eprintln!("skipped: all is on one disk");
        }
        let at = |folder: &tempfile::TempDir, name| {
            Location::from_absolute_path(folder.path().join(name)).unwrap()
        };
        let (from, to) = (at(&here, "a/from"), at(&other, "b/c/to"));
        let local = Local::default();
        for text in ["one", "another"] {
            local.put_opts(&from, text.into(), PutMode::Overwrite.into()).await.unwrap();
            local.copy_opts(&from, &to, CopyOptions::default()).await.unwrap();
            assert_eq!(fs::read(other.path().join("b/c/to")).unwrap(), text.as_bytes());
            assert_eq!(names(&other.path().join("b/c")), ["to"]);
        }
        let new = CopyOptions { mode: CopyMode::Create, ..Default::default() };
        let there = local.copy_opts(&from, &to, new).await.unwrap_err();
        assert!(matches!(there, Error::AlreadyExists { .. }), "{there}");
        let missing = local.copy_opts(&at(&here, "missing"), &to, CopyOptions::default()).await.unwrap_err();
        assert!(matches!(missing, Error::NotFound { .. }), "{missing}");
    }

    #[tokio::test]
    async fn a_folder_that_is_none_is_no_file_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        for folder in ["link", "file", "file/below"] {
            let at = Location::from_absolute_path(dir.path().join(folder)).unwrap().join("x");
            let refused =
                Local::default().put_opts(&at, "x".into(), PutMode::Create.into()).await.unwrap_err();
            let why = refused.to_string();
            assert!(why.contains("not a directory") || why.contains("Not a directory"), "{folder}: {why}");
        }
        assert_eq!(names(dir.path()), ["file", "link"]);
    }

    #[tokio::test]
    async fn a_large_file_comes_in_pieces_into_a_new_folder() {
        let dir = tempfile::tempdir().unwrap();
        let at = Location::from_absolute_path(dir.path().join("new/folder/x")).unwrap();
        let mut upload = Local::default().put_multipart_opts(&at, Default::default()).await.unwrap();
        upload.put_part("one ".into()).await.unwrap();
        upload.put_part("two".into()).await.unwrap();
        upload.complete().await.unwrap();
        assert_eq!(fs::read(dir.path().join("new/folder/x")).unwrap(), b"one two");
    }
}

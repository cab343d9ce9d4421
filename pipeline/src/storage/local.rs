//! The local disk as an object store. As with any other store, a power cut does not lose what was written.
//!
//! ```text
//! NAME#1     1. the bytes are written to a file next to the final one, and synced
//! NAME       2. that file gets the final name: it replaces an old file, or fails if there must be none
//!            3. the folder is synced
//! ```
//!
//! Reads, listings and deletes are those of object_store's local store. Its writes are not used as they are:
//! they do not sync, and its copy and create need hard links, which fail on file systems without them, across
//! disks, and for files of other users.

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

/// The whole disk; paths are relative to `/`.
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
            // object_store answers that it does not support this
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

/// A large file, written piece by piece.
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

/// Runs work that waits for the disk on a thread that may block.
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

/// Calls `make` to create a file next to `to`, under a name that no listing shows. Creates the folder if it
/// is missing.
fn stage<T>(to: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<(PathBuf, T)> {
    let (mut number, mut has_folder) = (1, false);
    loop {
        let mut staged = to.as_os_str().to_owned();
        staged.push(format!("#{number}"));
        match make(staged.as_ref()) {
            Ok(made) => return Ok((staged.into(), made)),
            // the name is taken by another run, or left over from one that was killed
            Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
            // the folder is missing; another process may be creating it at this moment
            Err(error) if error.kind() == ErrorKind::NotFound && !has_folder => {
                make_folder_of(to)?;
                has_folder = true;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Gives a staged file its final name if it is complete (`whole`). With `new`, there must be no file of that
/// name yet.
fn name(staged: &Path, to: &Path, new: bool, whole: io::Result<()>) -> io::Result<()> {
    let named = whole.and_then(|()| if new { name_new(staged, to) } else { fs::rename(staged, to) });
    if named.is_err() {
        // the file may be gone already
        let _ = fs::remove_file(staged);
    }
    named?;
    sync_folder_of(to)
}

/// Gives a staged file a name that no other file has. Of three ways, the first that the file system supports
/// is used.
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
    // Safety: both are NUL-terminated strings that outlive the call
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
    // the file has its final name, even if the staged one cannot be removed
    let _ = fs::remove_file(staged);
    Ok(())
}

/// The last resort: a process that is killed here leaves an incomplete file. Files that are created once
/// contain their own digest (see [`crate::storage::sealed`]), so an incomplete one counts as none, and the
/// next writer replaces it.
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

/// Copies a file: as a hard link if possible, otherwise its bytes.
fn copy(from: &Path, to: &Path, new: bool) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    let own = identity(from)?;
    // renaming one link of a file over another does nothing, and would leave the staged name behind
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

/// Creates the folder of a file, and those around it. Each new one is synced.
fn make_folder_of(path: &Path) -> io::Result<()> {
    let folder = folder_of(path);
    if folder.is_dir() {
        return Ok(());
    }
    make_folder_of(folder)?;
    match fs::create_dir(folder) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            // another process was faster, unless this is a link to nowhere
            if !folder.is_dir() {
                return Err(ErrorKind::NotADirectory.into());
            }
        }
        made => made?,
    }
    sync_folder_of(folder)
}

/// Syncs the folder of a file, so that the names in it survive a power cut.
fn sync_folder_of(path: &Path) -> io::Result<()> {
    match File::open(folder_of(path)).and_then(|folder| folder.sync_all()) {
        // not every file system can sync a folder, and a user who may write into a folder may not be allowed
        // to open it
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
        // a file system in memory, and so not on the disk of `here`
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

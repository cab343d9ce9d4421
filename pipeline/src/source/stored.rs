//! Reads the stored bytes of a file once, from whatever store, and hashes them on the way.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use bytes::{Buf, Bytes};
use futures::StreamExt;
use object_store::{GetOptions, GetResultPayload, ObjectStore};
use tokio::sync::mpsc;

use super::files::{BUNDLE_FILE_BYTES, SourceFile, version};
use crate::error::Doing;
use crate::stop::check_stop;
use crate::{Error, Result};

/// How many chunks of a remote file are fetched ahead. Stores deliver some 16 KiB to 1 MiB at a time.
const CHUNKS_AHEAD: usize = 8;

/// How many bytes are read at a time if the reader does not decide.
pub(super) const READ_BYTES: usize = 256 << 10;

/// A file being read. Its [`Read`] implementation gives the stored bytes. Its I/O errors contain an [`Error`]
/// of this crate, which [`own`] takes out.
pub(super) struct Stored {
    pub file: Arc<SourceFile>,
    stop: Arc<AtomicBool>,
    bytes: Backing,
    hasher: blake3::Hasher,
    read: u64,
}

enum Backing {
    /// A small file, read as a whole.
    Whole(Bytes),
    Local(Local),
    Remote {
        chunks: mpsc::Receiver<object_store::Result<Bytes>>,
        chunk: Bytes,
    },
}

/// An open local file, with its modification time when it was opened.
pub(super) struct Local {
    pub file: File,
    pub size: u64,
    modified: Option<SystemTime>,
}

/// A file whose bytes can be read in any order, as Parquet requires.
pub(super) enum RandomAccess {
    Whole(Bytes),
    File(Local),
}

/// The error of this crate that an I/O error carries, or the I/O error itself.
pub(super) fn own(error: io::Error) -> Result<Error, io::Error> {
    error.downcast::<Error>()
}

fn changed(file: &SourceFile, how: &str) -> Error {
    Error::data(
        format!("`{}` changed while it was read: {how}", file.url),
        "let what writes it finish, then run again",
    )
}

/// Opens a file that was listed before, and checks that it is still the same.
pub(super) async fn open(store: &dyn ObjectStore, file: SourceFile, stop: Arc<AtomicBool>) -> Result<Stored> {
    let failed = |source| Error::Storage { doing: "read", url: file.url.clone(), source };
    if file.size == 0 {
        // An empty file has nothing to read. It may also be an object store's marker of an empty folder,
        // which cannot be read.
        let bytes = Backing::Whole(Bytes::new());
        return Ok(Stored { file: Arc::new(file), stop, bytes, hasher: blake3::Hasher::new(), read: 0 });
    }
    let got = store.get_opts(&file.path, GetOptions::default()).await.map_err(failed)?;
    // This is as good as the store's own `if_match`, and works even if there is no e_tag, or if a listing
    // writes it differently. If the transfer breaks off, object_store continues with the same version only. A
    // version that is a digest is compared once everything is read.
    let same = file.digest().is_some() || version(&got.meta).as_ref() == Some(&file.version);
    if !same || got.meta.size != file.size {
        return Err(changed(&file, &format!("listed with {} bytes, it is another version now", file.size)));
    }
    let bytes = match got.payload {
        _ if file.size < BUNDLE_FILE_BYTES => Backing::Whole(got.bytes().await.map_err(failed)?),
        GetResultPayload::File(open, _) => Backing::Local(Local::new(open, file.size)),
        GetResultPayload::Stream(mut stream) => {
            let (send, chunks) = mpsc::channel(CHUNKS_AHEAD);
            tokio::spawn(async move {
                while let Some(chunk) = stream.next().await {
                    if send.send(chunk).await.is_err() {
                        return;
                    }
                }
            });
            Backing::Remote { chunks, chunk: Bytes::new() }
        }
    };
    Ok(Stored { file: Arc::new(file), stop, bytes, hasher: blake3::Hasher::new(), read: 0 })
}

impl Read for Stored {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        check_stop(&self.stop).map_err(io::Error::other)?;
        let bytes = match &mut self.bytes {
            Backing::Whole(bytes) => take(bytes, out),
            Backing::Local(local) => {
                let bytes = local.file.read(out).doing(|| format!("cannot read {}", self.file.url));
                bytes.map_err(io::Error::other)?
            }
            Backing::Remote { chunks, chunk } => {
                while chunk.is_empty() {
                    match chunks.blocking_recv() {
                        Some(Ok(next)) => *chunk = next,
                        Some(Err(source)) => {
                            let url = self.file.url.clone();
                            return Err(io::Error::other(Error::Storage { doing: "read", url, source }));
                        }
                        None => break,
                    }
                }
                take(chunk, out)
            }
        };
        self.hasher.update(&out[..bytes]);
        self.read += bytes as u64;
        Ok(bytes)
    }
}

/// Moves as many bytes as fit, and returns how many.
fn take(from: &mut Bytes, to: &mut [u8]) -> usize {
    let bytes = from.len().min(to.len());
    from.copy_to_slice(&mut to[..bytes]);
    bytes
}

impl Stored {
    /// Reads what is left, and returns the hash of all bytes.
    ///
    /// # Errors
    /// The file has changed since it was listed.
    pub fn finish(mut self) -> Result<blake3::Hash> {
        self.copy_to(&mut io::sink())?;
        let digest = self.checked()?;
        if let Backing::Local(local) = &self.bytes {
            local.check(&self.file)?;
        }
        Ok(digest)
    }

    /// Reads and hashes everything, and keeps it for reading in any order. A small or local file is kept as
    /// it is; a remote one is copied to an unnamed file in the folder `spool`.
    pub fn keep(mut self, spool: &std::path::Path) -> Result<(RandomAccess, blake3::Hash)> {
        let there = match &self.bytes {
            Backing::Whole(bytes) => Some(RandomAccess::Whole(bytes.clone())),
            Backing::Local(local) => {
                let file = local.file.try_clone().doing(|| format!("cannot read {}", self.file.url))?;
                Some(RandomAccess::File(Local { file, ..*local }))
            }
            Backing::Remote { .. } => None,
        };
        let access = match there {
            Some(access) => {
                self.copy_to(&mut io::sink())?;
                access
            }
            None => {
                let mut copy = std::fs::create_dir_all(spool)
                    .and_then(|()| tempfile::tempfile_in(spool))
                    .doing(|| format!("cannot make a file in {}", spool.display()))?;
                self.copy_to(&mut copy)?;
                RandomAccess::File(Local::new(copy, self.file.size))
            }
        };
        let digest = self.checked()?;
        Ok((access, digest))
    }

    fn copy_to(&mut self, to: &mut impl Write) -> Result<()> {
        let url = self.file.url.clone();
        let mut buffer = vec![0; READ_BYTES];
        let failed = |error| {
            own(error).unwrap_or_else(|source| Error::Io { doing: format!("cannot keep {url}"), source })
        };
        loop {
            match self.read(&mut buffer).map_err(failed)? {
                0 => return Ok(()),
                bytes => to.write_all(&buffer[..bytes]).map_err(failed)?,
            }
        }
    }

    /// The hash of all bytes, after a check that they are those that were listed.
    fn checked(&self) -> Result<blake3::Hash> {
        if self.read != self.file.size {
            let how = format!("{} bytes were listed, {} came", self.file.size, self.read);
            return Err(changed(&self.file, &how));
        }
        let digest = self.hasher.finalize();
        match self.file.digest() {
            Some(listed) if *listed != *digest.to_hex() => Err(changed(&self.file, "it has other bytes now")),
            _ => Ok(digest),
        }
    }
}

impl Local {
    fn new(file: File, size: u64) -> Self {
        let modified = file.metadata().and_then(|meta| meta.modified()).ok();
        Self { file, size, modified }
    }

    /// Checks that the open file has not changed since it was opened. An object in a store cannot change
    /// under a reader; a file can.
    pub fn check(&self, file: &SourceFile) -> Result<()> {
        let meta = self.file.metadata().doing(|| format!("cannot look at {}", file.url))?;
        if meta.len() == self.size && meta.modified().ok() == self.modified {
            return Ok(());
        }
        Err(changed(file, "it was written to"))
    }
}

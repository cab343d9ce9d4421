//! What lies in a folder of this machine. object_store's own listing passes over what it can't read without a word, and
//! ends at a link that leads back to where it lies.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::unread::Why;
use crate::Result;
use crate::error::Doing;

/// What a name stands for.
pub(super) enum Found {
    File,
    Folder,
    /// Nothing that can be read.
    Not(Why),
    /// A file whose name is none in a store; this says why.
    Misnamed(&'static str),
}

/// What stands at a path; None where nothing does.
pub(super) fn look(at: &Path) -> Result<Option<Found>> {
    let meta = match fs::metadata(at) {
        Ok(meta) => meta,
        Err(error) if leads_nowhere(&error) => {
            return Ok(at.is_symlink().then_some(Found::Not(Why::DeadLink)));
        }
        error => error.doing(|| format!("cannot look at {}", at.display()))?,
    };
    Ok(Some(match misnamed(at) {
        _ if meta.is_dir() => Found::Folder,
        _ if !meta.is_file() => Found::Not(Why::NoFile),
        Some(why) => Found::Misnamed(why),
        None => Found::File,
    }))
}

fn leads_nowhere(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
        || error.raw_os_error() == Some(libc::ELOOP)
}

/// Why object_store has no such file.
fn misnamed(at: &Path) -> Option<&'static str> {
    let Some(path) = at.to_str() else { return Some("is not UTF-8") };
    let end = path.rsplit('/').next().and_then(|name| name.split_once('#'));
    let is_number = |end: &str| !end.is_empty() && end.bytes().all(|byte| byte.is_ascii_digit());
    match end {
        _ if path.chars().any(|c| c.is_ascii_control()) => Some("has a control character"),
        Some((_, end)) if is_number(end) => Some("ends in `#` and digits, as half-written files do"),
        _ => None,
    }
}

/// Gives all that lies below a folder to `found`, by its path, which begins with `path`, folders before what is in them.
/// `enters` says which of them are entered. Links are followed.
pub(super) fn walk(
    folder: &Path,
    path: &str,
    enters: &dyn Fn(&str) -> bool,
    found: &mut dyn FnMut(&str, Found) -> Result<()>,
) -> Result<()> {
    Walk { enters, found, above: vec![] }.folder(folder, path)
}

struct Walk<'a> {
    enters: &'a dyn Fn(&str) -> bool,
    found: &'a mut dyn FnMut(&str, Found) -> Result<()>,
    /// Device and inode of the folders that this one lies in.
    above: Vec<(u64, u64)>,
}

impl Walk<'_> {
    fn folder(&mut self, at: &Path, path: &str) -> Result<()> {
        let doing = || format!("cannot list {}", at.display());
        let meta = fs::metadata(at).doing(doing)?;
        let this = (meta.dev(), meta.ino());
        if self.above.contains(&this) {
            return (self.found)(path, Found::Not(Why::Loop));
        }
        self.above.push(this);
        for entry in fs::read_dir(at).doing(doing)? {
            let at = entry.doing(doing)?.path();
            let name = at.file_name().unwrap_or_default().to_string_lossy();
            let path = if path.is_empty() { name.into_owned() } else { format!("{path}/{name}") };
            match look(&at)? {
                Some(Found::Folder) => {
                    (self.found)(&path, Found::Folder)?;
                    if (self.enters)(&path) {
                        self.folder(&at, &path)?;
                    }
                }
                Some(found) => (self.found)(&path, found)?,
                // it has gone meanwhile
                None => {}
            }
        }
        self.above.pop();
        Ok(())
    }
}

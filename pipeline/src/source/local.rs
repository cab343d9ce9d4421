//! Lists local folders. object_store's own listing silently skips what it cannot read, and ends at a link
//! that leads back to a folder around it.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::unread::Why;
use crate::Result;
use crate::error::Doing;

/// What a path leads to.
pub(super) enum Found {
    File,
    Folder,
    /// Something that cannot be read as a file.
    Not(Why),
    /// A file whose name object_store does not accept, and why.
    Misnamed(&'static str),
}

/// What is at a path; `None` if nothing is.
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

/// Why object_store does not accept a file's name; `None` if it does.
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

/// Calls `found` for everything below a folder, with its path, which begins with `path`. Folders come before
/// what is in them. `enters` decides which folders are entered. Links are followed.
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
    /// Device and inode of the folders that this one is in, by which loops of links are found.
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
                // it was removed in the meantime
                None => {}
            }
        }
        self.above.pop();
        Ok(())
    }
}

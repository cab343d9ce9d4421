//! The stop flag. SIGTERM and SIGINT set it, and every hot loop checks it.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, Result};

/// Returns an error once a stop was requested, so that a computation ends at the next place where it can.
///
/// # Errors
/// [`Error::Stopped`] if the flag is set.
pub fn check_stop(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) { Err(Error::Stopped) } else { Ok(()) }
}

//! A stop that was asked for: a flag that SIGTERM and SIGINT set, and that every hot loop looks at.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, Result};

/// Ends a computation at the next good place.
///
/// # Errors
/// [`Error::Stopped`] once the flag is set.
pub fn check_stop(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) { Err(Error::Stopped) } else { Ok(()) }
}

//! lengthwise: from documents to packed sequences of a chosen length mixture.
pub mod error;
pub use error::{Error, Result};

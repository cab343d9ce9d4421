//! The stages, one file each, in the order data flows.

pub mod catalog;
pub mod domains;
pub mod draw;
#[cfg(feature = "train")]
pub mod eval;
pub mod mixture;
pub mod pack;
pub mod shuffle;
pub mod sources;
pub mod tokenizer;
pub mod tokens;
#[cfg(feature = "train")]
pub mod train;

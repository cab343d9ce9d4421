//! Llama, its trainer and its checkpoints, fed by packed Parquet.

/// What can go wrong in the model crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {}

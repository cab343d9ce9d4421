//! lengthwise: from documents to packed sequences of a chosen length mixture.
//!
//! ```text
//! conf ─▶ run ─▶ flow ─▶ stages ─▶ publish ─▶ report
//!                         │ a stage is found by the hash of its ingredients, or computed (run, stage)
//!                         │ SQL stages run on the embedded engine (engine, sql, recipe)
//!                         │ sources are read and tokenised a part at a time (source, tokenizer)
//!                         └ everything is in object storage (store)
//! ```

mod cards;
pub mod cli;
#[cfg(feature = "cluster")]
pub mod cluster;
pub mod compare;
pub mod conf;
pub mod engine;
mod environment;
pub mod error;
pub mod flow;
pub mod functions;
pub mod gc;
pub mod hash;
pub mod preview;
pub mod progress;
pub mod publish;
pub mod recipe;
pub mod report;
pub mod run;
mod seal;
pub mod source;
pub mod sources;
pub mod sql;
pub mod stage;
pub mod stages;
pub mod store;
pub mod tables;
pub mod task;
pub mod tokenizer;
pub mod verify;
mod watch;

pub use error::{Error, Result};

//! lengthwise: from documents to packed sequences of a chosen length mixture.
//!
//! A module uses only modules below it:
//!
//! ```text
//! cli            one file per command: parses arguments, prints results
//! dataflow       goes through the stages in order; publish, directory, report: what a run publishes
//! stages         one file per stage, with its inputs, key, tasks, accounts and checks
//! run            a run's conf, goal and clock; finds or computes a stage's output
//! executor       performs tasks, in this process or on Ballista's executors
//! tasks          work that any machine can do: tokenize, distinct, a pass of the draw, scatter, pack
//! algorithms     without I/O: the tokenizer, division of budgets, the planner of sequences, sums over strata
//! source · sql   rows of the sources' files; engine, statements, functions, recipes
//! output         begins, finds and publishes a stage's output; stage, tables: the stages and the tables
//! storage        locations, stores, secrets, checksummed JSON; hash: digests
//! ```

pub mod algorithms;
mod cards;
pub mod cli;
pub mod compare;
pub mod conf;
pub mod dataflow;
pub mod directory;
pub mod error;
pub mod executor;
pub mod gc;
pub mod hash;
mod layout;
pub mod output;
pub mod preview;
pub mod progress;
pub mod publish;
pub mod report;
pub mod run;
mod secret;
pub mod source;
pub mod sql;
pub mod stage;
pub mod stages;
mod stop;
pub mod storage;
pub mod tables;
pub mod tasks;
pub mod verify;
mod watch;

pub use error::{Error, Result};

//! lengthwise: from documents to packed sequences of a chosen length mixture.
//!
//! Arrows point down only: a module uses those below it.
//!
//! ```text
//! cli            one file a command: arguments in, printing out
//! dataflow       the one function that goes through the stages in order; directory, report: what is published of it
//! stages         plan: a stage's inputs, key, tasks, accounts, checks; one file a stage
//! run            a run's conf, goal, clock; where a stage's output is found or computed
//! executor       who performs tasks: here, or Ballista's executors
//! tasks          work, on any machine: tokenize, distinct, a pass of the draw, scatter, pack
//! algorithms     no I/O: the tokenizer, cuts of budgets, the planner of sequences, sums over strata
//! source · sql   rows of the sources' files; engine, statements, functions, recipes
//! output         how a stage's output is begun, found and published; stage, tables: what there is
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

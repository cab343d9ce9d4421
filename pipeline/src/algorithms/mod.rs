//! Algorithms over values and streams of rows. None of them reads or writes storage, or knows of a run.

pub mod cut;
pub mod expected;
pub mod sequences;
pub mod spans;
pub mod strata;
pub mod tokenizer;

//! Algorithms over values and streams of rows. They neither read nor write storage, and do not depend on a
//! run.

pub mod cut;
pub mod expected;
pub mod sequences;
pub mod spans;
pub mod strata;
pub mod tokenizer;

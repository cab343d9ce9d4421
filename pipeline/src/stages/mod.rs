//! The stages, one file each, in the order data flows.

pub mod catalog;
pub mod domains;
pub mod draw;
#[cfg(feature = "train")]
pub mod eval;
pub mod expected;
pub mod mixture;
pub mod pack;
pub mod places;
pub mod shuffle;
pub mod tokenizer;
pub mod tokens;
#[cfg(feature = "train")]
pub mod train;

/// The stages whose outputs a stage reads, by name.
pub fn upstream(stage: &str) -> &'static [&'static str] {
    match stage {
        "catalog" => &["tokens"],
        "domains" => &["catalog"],
        "mixture" => &["catalog", "domains"],
        "draw" => &["mixture"],
        "shuffle" => &["tokens", "catalog", "draw"],
        "pack" => &["shuffle"],
        "train" => &["pack"],
        stage if stage.starts_with("eval ") => &["train", "pack"],
        _ => &[],
    }
}

//! The stages as one table: name, version, inputs. [`crate::tables::SEEN`] has the tables that each gives to SQL.

use clap::builder::PossibleValue;
use serde::{Deserialize, Serialize};

/// A stage. They are in the order data flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    Tokenizer,
    Tokens,
    Catalog,
    Domains,
    Mixture,
    Draw,
    Shuffle,
    Pack,
    Train,
    Eval,
}

/// What a stage is.
pub struct About {
    pub stage: Stage,
    /// Its name in commands, manifests and storage.
    pub name: &'static str,
    /// Raised when the same inputs give another output; it is part of the stage's key. The golden test
    /// `a_stage_s_rows_change_only_with_its_version` tells when it is forgotten.
    pub version: u32,
    /// The stages whose outputs it reads.
    pub reads: &'static [Stage],
    /// What it makes, in a line.
    pub makes: &'static str,
}

/// All stages, in order.
pub const STAGES: [About; 10] = [
    About {
        stage: Stage::Tokenizer,
        name: "tokenizer",
        version: 1,
        reads: &[],
        makes: "The tokenizer, which is trained where the conf asks for it",
    },
    About {
        stage: Stage::Tokens,
        name: "tokens",
        version: 3,
        reads: &[Stage::Tokenizer],
        makes: "Documents, their ids and the rejected rows, a part at a time",
    },
    About {
        stage: Stage::Catalog,
        name: "catalog",
        version: 3,
        reads: &[Stage::Tokens],
        makes: "One row a distinct document, and those that are held out",
    },
    About {
        stage: Stage::Domains,
        name: "domains",
        version: 1,
        reads: &[Stage::Catalog],
        makes: "One row a domain, and the target shares",
    },
    About {
        stage: Stage::Mixture,
        name: "mixture",
        version: 3,
        reads: &[Stage::Catalog, Stage::Domains],
        makes: "The recipe's result: one row a span to draw from",
    },
    About {
        stage: Stage::Draw,
        name: "draw",
        version: 2,
        reads: &[Stage::Mixture],
        makes: "Whole copies of spans, to the token",
    },
    About {
        stage: Stage::Shuffle,
        name: "shuffle",
        version: 1,
        reads: &[Stage::Tokens, Stage::Catalog, Stage::Draw],
        makes: "The place of each copy in the dataset",
    },
    About {
        stage: Stage::Pack,
        name: "pack",
        version: 2,
        reads: &[Stage::Shuffle],
        makes: "The packed sequences",
    },
    About {
        stage: Stage::Train,
        name: "train",
        version: 5,
        reads: &[Stage::Pack],
        makes: "The trained checkpoint",
    },
    About {
        stage: Stage::Eval,
        name: "eval",
        version: 3,
        reads: &[Stage::Train, Stage::Pack],
        makes: "What the checkpoint makes of long texts",
    },
];

impl Stage {
    pub fn about(self) -> &'static About {
        &STAGES[self as usize]
    }

    pub fn name(self) -> &'static str {
        self.about().name
    }

    /// The stage of a step of a run: of an evaluation, the step's name is `eval NAME`.
    pub fn of_step(step: &str) -> Option<Self> {
        let name = step.split(' ').next()?;
        STAGES.iter().find(|about| about.name == name).map(|about| about.stage)
    }
}

impl clap::ValueEnum for Stage {
    fn value_variants<'a>() -> &'a [Self] {
        const ALL: [Stage; STAGES.len()] = {
            let mut all = [Stage::Tokenizer; STAGES.len()];
            let mut i = 0;
            while i < all.len() {
                all[i] = STAGES[i].stage;
                i += 1;
            }
            all
        };
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let value = PossibleValue::new(self.name()).help(self.about().makes);
        // documents are made in the same pass
        Some(if *self == Stage::Tokens { value.alias("documents") } else { value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_stand_in_the_order_in_which_they_read_each_other() {
        for (i, about) in STAGES.iter().enumerate() {
            assert_eq!(about.stage as usize, i, "{}", about.name);
            assert!(about.reads.iter().all(|read| *read < about.stage), "{}", about.name);
        }
    }
}

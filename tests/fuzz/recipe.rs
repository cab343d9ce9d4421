//! The recipe check: any SQL is either refused or has a key.
#![no_main]

use lengthwise::sql::recipe::Recipe;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(recipe) = Recipe::parse("recipe.sql", text) {
        assert!(!recipe.key.is_empty());
    }
});

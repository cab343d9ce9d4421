//! The cards that Hugging Face's tools look for beside data and models: a dataset card and a model card. They
//! state what the dataset and the model were made from.

use std::path::Path;

use crate::directory::RunManifest;
use crate::preview::NAMED;
use crate::stages::domains::Domain;

/// The cards of a run's directory, as pairs of file name and text.
pub fn cards(manifest: &RunManifest) -> Vec<(&'static str, String)> {
    let has = |folder: &str| manifest.files.iter().any(|file| file.name.starts_with(folder));
    let mut cards = vec![("README.md", dataset(manifest, has("heldout/")))];
    if has("checkpoint/") {
        cards.push(("checkpoint/README.md", model(manifest)));
    }
    cards
}

fn recipe(manifest: &RunManifest) -> String {
    Path::new(&manifest.conf.mixture.recipe).file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// The commit in words, such as "commit `1234567`", or that there is none.
fn commit(manifest: &RunManifest) -> String {
    match (&manifest.commit, manifest.dirty) {
        (Some(commit), false) => format!("commit `{commit}`"),
        (Some(commit), true) => format!("commit `{commit}`, with changes that are not in it"),
        (None, _) => "no commit: its folder is no git repository".to_owned(),
    }
}

/// A name as plain text in a sentence or a table cell: characters that Markdown would interpret are escaped.
fn plain(name: &str) -> String {
    let mut plain = String::new();
    for c in name.chars() {
        if r"\`*_[]<>|~&$".contains(c) {
            plain.push('\\');
        }
        plain.push(if c.is_control() { ' ' } else { c });
    }
    plain
}

/// A name as inline code, fenced with more backticks than it has in a row.
fn code(name: &str) -> String {
    let name = name.replace(char::is_control, " ");
    let most = name.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(most + 1);
    let space = if name.starts_with('`') || name.ends_with('`') { " " } else { "" };
    format!("{fence}{space}{name}{space}{fence}")
}

/// The lines on the run, the commit, the conf and the recipe that both cards have.
fn made_of(manifest: &RunManifest) -> String {
    let mixture = &manifest.conf.mixture;
    format!(
        "- run {} of lengthwise {}\n- {}\n- conf {}, recipe {}: {} tokens drawn\n",
        code(&manifest.run),
        manifest.build.lengthwise,
        commit(manifest),
        code(&manifest.conf_file),
        code(&mixture.recipe),
        manifest.summary.counts.get("drawn_tokens").copied().unwrap_or(0),
    )
}

/// The dataset card. Hugging Face's `datasets` finds the files by its header.
fn dataset(manifest: &RunManifest, heldout: bool) -> String {
    let mut card =
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.parquet\n"
            .to_owned();
    if heldout {
        card += "  - split: heldout\n    path: heldout/*.parquet\n";
    }
    card += "---\n\n";
    let pack = &manifest.conf.pack;
    card += &format!(
        "# {}\n\nPacked sequences of {} tokens, length-engineered with the recipe {}.\n\n{}\n\
         `input_ids` are the tokens, `labels` the one after them, `source` the documents: each with its domain, `doc_id`, and\n\
         where it starts and ends in the sequence.\n\n| domain | documents | tokens | share of the corpus |\n|---|---|---|---|\n",
        manifest.run,
        pack.sequence_tokens.0,
        code(&recipe(manifest)),
        made_of(manifest),
    );
    let mut domains: Vec<&Domain> = manifest.summary.domains.iter().collect();
    if domains.len() > NAMED {
        domains.sort_by(|a, b| b.tokens.cmp(&a.tokens).then_with(|| a.domain.cmp(&b.domain)));
    }
    for domain in domains.iter().take(NAMED) {
        card += &format!(
            "| {} | {} | {} | {:.4} |\n",
            plain(&domain.domain),
            domain.documents,
            domain.tokens,
            domain.share
        );
    }
    if let Some(others @ [_, ..]) = domains.get(NAMED..) {
        card += &format!(
            "| {} others | {} | {} | {:.4} |\n",
            others.len(),
            others.iter().map(|d| d.documents).sum::<u64>(),
            others.iter().map(|d| d.tokens).sum::<u64>(),
            others.iter().map(|d| d.share).sum::<f64>(),
        );
    }
    card
}

/// The model card, for whoever loads the checkpoint.
fn model(manifest: &RunManifest) -> String {
    let base = manifest
        .conf
        .train
        .as_ref()
        .and_then(|train| train.get("checkpoint")?.as_str())
        .map_or("a fresh model".to_owned(), code);
    let mut card = format!(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- llama\n- long-context\n---\n\n\
         # {}\n\nA Llama trained from {base} on sequences of {} tokens, length-engineered with the recipe {}.\n\n{}\n",
        manifest.run,
        manifest.conf.pack.sequence_tokens.0,
        code(&recipe(manifest)),
        made_of(manifest),
    );
    for name in manifest.summary.evaluations.keys() {
        if let Some(score) = manifest.summary.score(name) {
            card += &format!("- {name}: {:.1} %\n", 100.0 * score);
        }
    }
    card
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_itself_in_a_table_and_as_code() {
        assert_eq!(plain("RedPajamaBook"), "RedPajamaBook");
        assert_eq!(plain("a|b\n| c `d` <b>&amp; [x](y) \\"), r"a\|b \| c \`d\` \<b\>\&amp; \[x\](y) \\");
        for (name, shown) in
            [("conf/x.toml", "`conf/x.toml`"), ("a`b``c", "```a`b``c```"), ("`a\n", "`` `a  ``")]
        {
            assert_eq!(code(name), shown);
        }
    }
}

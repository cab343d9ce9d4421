//! `${VAR}` and `${VAR:-default}` in the conf's urls.

use super::tree::{Node, Tree, Value};
use crate::Result;
use crate::secret;

/// The keys whose values are urls or paths. Nothing is expanded anywhere else: a recipe's parameter that
/// contains `${` is text.
const URLS: [&[&str]; 11] = [
    &["run", "output"],
    &["source", "*", "url"],
    &["tokenizer", "url"],
    &["mixture", "recipe"],
    &["engine", "spill"],
    &["train", "checkpoint"],
    &["eval", "needle", "haystack"],
    &["eval", "retrieval", "haystack"],
    &["eval", "bookqa", "file"],
    &["eval", "choices", "file"],
    &["eval", "choices", "examples"],
];

/// Expands every url of the conf, and refuses those that are empty or carry credentials.
pub fn urls(tree: &mut Tree, env: &dyn Fn(&str) -> Option<String>) -> Result<()> {
    let mut root = tree.root.clone();
    for path in URLS {
        for node in root.all_mut(path) {
            url(tree, node, env)?;
        }
    }
    tree.root = root;
    Ok(())
}

fn url(tree: &Tree, node: &mut Node, env: &dyn Fn(&str) -> Option<String>) -> Result<()> {
    // A value of another type is refused when the conf is read.
    let Value::Text(text) = &mut node.value else { return Ok(()) };

    let expanded = expand(text, env).map_err(|Unset { at, message, help }| {
        // Point at the variable alone where the text stands in the conf as it is, without escapes.
        let found = tree.raw(&node.place).find(text.as_str());
        let place = found.map_or(node.place.clone(), |start| {
            let end = text[at..].find([':', '}']).map_or(text.len(), |length| at + length);
            node.place.part(start + at..start + end)
        });
        tree.wrong(&place, message, "in this url", Some(help))
    })?;
    if expanded.trim().is_empty() {
        return Err(tree.wrong(&node.place, "this url is empty", "expected a url or a path", None));
    }
    // The text as it is written too: it may be the source's name, and defaults count even if not used.
    if secret::in_url(text) || secret::in_url(&expanded) {
        let label = "a user, password, key or signature";
        let help = "give credentials in the environment, as the SDKs read them (AWS_ACCESS_KEY_ID, \
                    GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY, …): what is in a conf \
                    ends up in manifests";
        return Err(tree.wrong(&node.place, "this url carries a credential", label, Some(help.to_owned())));
    }
    *text = expanded;
    Ok(())
}

/// Why a text could not be expanded, and the byte at which its `${` stands.
struct Unset {
    at: usize,
    message: String,
    help: String,
}

fn expand(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<String, Unset> {
    let mut expanded = String::new();
    let mut done = 0;
    while let Some(at) = text[done..].find("${").map(|start| done + start) {
        expanded.push_str(&text[done..at]);
        let Some(end) = closing_brace(text, at + 2) else {
            let message = "this `${` is never closed".to_owned();
            return Err(Unset { at, message, help: "write ${VAR} or ${VAR:-default}".to_owned() });
        };
        let inside = &text[at + 2..end];
        let (name, default) = match inside.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (inside, None),
        };
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            let message = format!("`{name}` is not the name of an environment variable");
            return Err(Unset { at, message, help: "write ${VAR} or ${VAR:-default}".to_owned() });
        }
        // An empty variable counts as unset, as `:-` has it in a shell: `s3:///data` is what nobody means.
        match (env(name).filter(|value| !value.is_empty()), default) {
            (Some(value), _) => expanded.push_str(&value),
            (None, Some(default)) => {
                let inner = expand(default, env);
                let before = end - default.len();
                expanded.push_str(&inner.map_err(|unset| Unset { at: unset.at + before, ..unset })?);
            }
            (None, None) => {
                let message = format!("the environment variable `{name}` is not set");
                return Err(Unset {
                    at,
                    message,
                    help: format!("set it, or give a default: ${{{name}:-…}}"),
                });
            }
        }
        done = end + 1;
    }
    Ok(expanded + &text[done..])
}

/// The brace that closes the one before `start`. Braces nest, as in `${CARGO_HOME:-${HOME}/.cargo}`.
fn closing_brace(text: &str, start: usize) -> Option<usize> {
    let mut depth = 0;
    for (at, c) in text[start..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => return Some(start + at),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

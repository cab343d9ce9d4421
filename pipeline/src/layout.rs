//! The layout of an output: what runs write where. Somebody else's files may lie in folders of the same names.

use crate::hash::is_hex;
use crate::stage::STAGES;

/// The folder that a file is looked at with; `None` where it is none of ours.
pub fn folder_of(path: &str) -> Option<String> {
    let parts: Vec<&str> = path.split('/').collect();
    let depth = match parts[..] {
        ["stages", stage, key, _, ..] if is_stage(stage) && is_hex(key, 32) => 3,
        ["runs", run, _, ..] if run.rsplit_once('-').is_some_and(|(_, key)| is_hex(key, 12)) => 2,
        ["tasks", file] if file.strip_suffix(".json").is_some_and(|key| is_hex(key, 32)) => 1,
        _ => return None,
    };
    Some(parts[..depth].join("/"))
}

fn is_stage(name: &str) -> bool {
    STAGES.iter().any(|stage| stage.name == name)
}

/// Whether a path in an output lies in one of the folders that runs write to.
pub fn is_of_runs(path: &str) -> bool {
    let first = path.split('/').next().unwrap_or_default();
    ["stages", "runs", "latest", "reproduced", "tokenizers", "tasks"].contains(&first)
}

/// Whether a path in an output is what runs write there: somebody else's files may lie in folders of the same names.
pub fn is_written_by_runs(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    match parts[..] {
        ["stages", _, key, ..] => is_hex(key, 32),
        ["runs", run, ..] => run.rsplit_once('-').is_some_and(|(_, key)| is_hex(key, 12)),
        ["latest", file] => file.ends_with(".json"),
        ["tokenizers", file] => file.strip_suffix(".json").is_some_and(|key| is_hex(key, 64)),
        ["tasks", file] => file.strip_suffix(".json").is_some_and(|key| is_hex(key, 32)),
        ["reproduced", .., _] => is_written_by_runs(&path["reproduced/".len()..]),
        _ => false,
    }
}

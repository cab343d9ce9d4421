//! The layout of an output: which paths runs write to. Folders of the same names may hold files that other
//! people put there.

use crate::hash::is_hex;
use crate::stage::STAGES;

/// The folder, relative to the output, that `gc` treats as one unit with the file `path`; `None` if no run
/// writes such a path.
pub fn folder_of(path: &str) -> Option<String> {
    let parts: Vec<&str> = path.split('/').collect();
    let depth = match parts[..] {
        ["stages", stage, key, _, ..] if is_stage(stage) && is_hex(key, 32) => 3,
        ["runs", run, _, ..] if is_run(run) => 2,
        ["tasks", file] if is_json(file, 32) => 1,
        _ => return None,
    };
    Some(parts[..depth].join("/"))
}

fn is_stage(name: &str) -> bool {
    STAGES.iter().any(|stage| stage.name == name)
}

/// Whether a folder has the name of a run's directory.
fn is_run(name: &str) -> bool {
    name.rsplit_once('-').is_some_and(|(_, key)| is_hex(key, 12))
}

/// Whether a file is JSON that is named by so many hexadecimal digits.
fn is_json(file: &str, digits: usize) -> bool {
    file.strip_suffix(".json").is_some_and(|key| is_hex(key, digits))
}

/// Whether a path in an output lies in one of the folders that runs write to. The file itself may be somebody
/// else's.
pub fn is_of_runs(path: &str) -> bool {
    let first = path.split('/').next().unwrap_or_default();
    ["stages", "runs", "latest", "reproduced", "tokenizers", "tasks"].contains(&first)
}

/// Whether a path in an output has the form of a file that runs write, and is not somebody else's file in a
/// folder of the same name.
pub fn is_written_by_runs(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    match parts[..] {
        ["stages", _, key, ..] => is_hex(key, 32),
        ["runs", run, ..] => is_run(run),
        ["latest", file] => file.ends_with(".json"),
        ["tokenizers", file] => is_json(file, 64),
        ["tasks", file] => is_json(file, 32),
        ["reproduced", .., _] => is_written_by_runs(&path["reproduced/".len()..]),
        _ => false,
    }
}

//! Reads a run's directory with Hugging Face's own packages, where they are installed: `transformers` (4 and
//! 5), `safetensors`, `datasets`, and with `torch` the model itself. `TRANSFORMERS_4` and `TRANSFORMERS_5`
//! name Pythons that have them.

use std::process::Command;

use serde_json::{Value, json};

use crate::project::Project;

const TRAIN: &str = "train={ shape = { hidden_size = 16, intermediate_size = 24, layers = 2, heads = 2, kv_heads = 1 }, \
                     steps = 2, rope_theta = 50000.0, rope_scaling = { rope_type = \"yarn\", factor = 4.0 } }";

fn pythons() -> Vec<String> {
    let named = ["TRANSFORMERS_4", "TRANSFORMERS_5"].map(std::env::var);
    named.into_iter().flatten().collect()
}

#[test]
fn transformers_and_datasets_read_a_run_s_directory() {
    let pythons = pythons();
    if pythons.is_empty() {
        eprintln!("skipped: neither TRANSFORMERS_4 nor TRANSFORMERS_5 names a Python");
        return;
    }
    let project = Project::new(3);
    let run = project.run(&["--set", TRAIN]);
    let run = run.to_str().unwrap();
    let text = "The sea was calm and wide, until dawn.";
    let checkpoint = format!("{run}/checkpoint");
    let ours = project.say(&["generate", &checkpoint, "--prompt", text, "--tokens", "8", "--ids"]);
    assert_eq!(ours.code, 0, "{ours:?}");
    let ours: Vec<i64> = ours.out.lines().map(|id| id.parse().unwrap()).collect();
    for python in pythons {
        let script = format!("{}/../tests/e2e/ecosystem.py", env!("CARGO_MANIFEST_DIR"));
        let cache = project.path("cache");
        let mut command = Command::new(&python);
        command.args([&script, run, text]).arg(&cache).env("HF_HUB_OFFLINE", "1").env("HF_HOME", &cache);
        let done = command.output().unwrap();
        assert!(done.status.success(), "{python}: {}", String::from_utf8_lossy(&done.stderr));
        let found: Value = serde_json::from_slice(&done.stdout).unwrap();
        eprintln!("{python}: transformers {}", found["transformers"]);
        for (key, want) in [
            ("config", json!("LlamaConfig")),
            ("rope_theta", json!(50000.0)),
            ("rope_type", json!("yarn")),
            ("factor", json!(4.0)),
            ("decoded", json!(text)),
            ("tensors", json!(21)),
            ("do_sample", json!(false)),
        ] {
            assert_eq!(found[key], want, "{key} of {found}");
        }
        assert_eq!(found["embedding"][1], 16, "{found}");
        if let Some(splits) = found["splits"].as_object() {
            assert!(splits["train"].as_u64() > Some(100) && splits["heldout"].as_u64() > Some(0), "{found}");
            assert_eq!(found["sequence"], 256);
        }
        if let Some(continued) = found["continued"].as_array() {
            assert_eq!(found["loading"], json!([]), "{found}");
            assert_eq!(json!(continued), json!(ours), "{python}");
        }
    }
}

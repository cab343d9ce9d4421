//! Training by the program: stops, kills, several processes, and their results.

use std::path::Path;
use std::time::Duration;

use crate::project::{Project, said, tree};

/// The settings of a small training, as a value of `--set`.
pub fn train(settings: &str) -> String {
    let shape = "{ hidden_size = 16, intermediate_size = 16, layers = 1, heads = 2 }";
    format!("train={{ shape = {shape}, {settings} }}")
}

/// Whether a file belongs to a checkpoint that training can resume from.
fn saved(path: &Path) -> bool {
    path.to_string_lossy().contains("/checkpoints/step-")
}

/// The steps of a run's training with their losses.
fn losses(run: &Path) -> Vec<(u64, f64)> {
    let lines = std::fs::read_to_string(run.join("checkpoint/metrics.jsonl")).unwrap();
    let step = |line: &str| {
        let step: serde_json::Value = serde_json::from_str(line).unwrap();
        (step["step"].as_u64().unwrap(), step["loss"].as_f64().unwrap())
    };
    lines.lines().map(step).collect()
}

#[test]
fn sigterm_is_a_stop_that_goes_on() {
    let project = Project::new(3);
    let train = train("steps = 300, ranks = 2");
    let undisturbed = Project::new(3);
    let want = losses(&undisturbed.run(&["--set", &train]));

    let child = project.command(&["run", "conf.toml", "--set", &train]).spawn().unwrap();
    // training starts once the packed files exist
    while !tree(&project.path("out/stages/pack")).iter().any(|path| path.ends_with("manifest.json")) {
        std::thread::sleep(Duration::from_millis(20));
    }
    crate::project::terminate(&child);
    let said = said(child.wait_with_output().unwrap());
    assert_eq!(said.code, 75, "{said:?}");
    assert!(said.err.contains("stopped by a signal") && said.out.is_empty(), "{said:?}");
    if said.err.contains("stopping after this step") {
        assert!(tree(&project.path("out/stages/train")).iter().any(|path| saved(path)));
    }

    let run = project.run(&["--set", &train]);
    assert_eq!(losses(&run), want);
    assert!(
        !tree(&project.path("out/stages/train")).iter().any(|path| saved(path)),
        "a finished training leaves none"
    );
    assert_eq!(project.say(&["verify", run.to_str().unwrap()]).code, 0);
}

#[test]
fn a_killed_training_goes_on_from_its_last_checkpoint_with_the_same_losses() {
    let train = train("steps = 60, checkpoint_every = 3");
    let undisturbed = Project::new(3);
    undisturbed.run(&[]);
    let started = std::time::Instant::now();
    let want = losses(&undisturbed.run(&["--set", &train]));
    let training = started.elapsed();
    let project = Project::new(3);
    project.run(&[]);
    for i in 0..10u32 {
        let mut child = project.command(&["train", "conf.toml", "--set", &train]).spawn().unwrap();
        std::thread::sleep(training.mul_f64(f64::from(3 + (i * 5) % 7) / 12.0));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!(losses(&project.run(&["--set", &train])), want);
}

#[test]
fn two_trainings_at_once_leave_a_run_that_is_whole() {
    let project = Project::new(3);
    project.run(&[]);
    let train = train("steps = 12, checkpoint_every = 5");
    for _ in 0..3 {
        let both = [(); 2].map(|()| project.command(&["run", "conf.toml", "--set", &train]).spawn().unwrap());
        let both = both.map(|child| said(child.wait_with_output().unwrap()));
        assert!(both.iter().all(|said| said.code == 0), "{both:?}");
        assert_eq!(both[0].out, both[1].out);
        let verified = project.say(&["verify", both[0].out.trim()]);
        assert_eq!(verified.code, 0, "{verified:?}");
        std::fs::remove_dir_all(project.path("out/stages/train")).unwrap();
        std::fs::remove_dir_all(project.path("out/runs")).unwrap();
    }
}

#[test]
fn a_reader_of_the_log_may_go_away() {
    let project = Project::new(3);
    let mut child = project.command(&["run", "conf.toml"]).spawn().unwrap();
    drop(child.stderr.take());
    let said = said(child.wait_with_output().unwrap());
    assert!(said.code == 0 && said.out.contains("/runs/"), "{said:?}");
}

#[test]
fn processes_without_libtorch_say_what_they_need() {
    let project = Project::new(3);
    let train = train("steps = 3");
    let said = project.say(&["train", "conf.toml", "--set", &train, "--nproc", "2"]);
    assert!(said.code == 6 && said.err.contains("build with --features libtorch"), "{said:?}");
    let said = project.say(&["train", "conf.toml"]);
    assert!(said.code == 2 && said.err.contains("the conf has no [train] table"), "{said:?}");
}

#[test]
fn a_checkpoint_goes_on_with_a_text() {
    let project = Project::new(3);
    let train = train("steps = 3");
    let run = project.run(&["--set", &train]);
    let checkpoint = run.join("checkpoint");
    let ask = |more: &[&str]| {
        let mut all = vec!["generate", checkpoint.to_str().unwrap(), "--prompt", "the sea", "--tokens", "5"];
        all.extend(more);
        project.say(&all)
    };
    let (one, three) = (ask(&[]), ask(&["--ranks", "3"]));
    assert_eq!((one.code, &one.out), (0, &three.out), "{one:?} {three:?}");
    assert!(!one.out.trim().is_empty());
    let wrong = ask(&["--device", "gpu"]);
    assert!(wrong.code == 2 && wrong.err.contains("there is no device `gpu`"), "{wrong:?}");
    let nowhere = project.say(&["generate", "nowhere", "--prompt", "a", "--tokens", "1"]);
    assert!(nowhere.err.contains("there is no") && nowhere.err.contains("tokenizer.json"), "{nowhere:?}");
}

#[cfg(not(feature = "libtorch"))]
#[test]
fn devices_of_another_build_are_planned_with_and_refused_before_any_work() {
    let project = Project::new(3);
    let train = train("steps = 3, devices = [\"libtorch-cuda:0\", \"libtorch-cuda:1\"]");
    let said = project.say(&["run", "conf.toml", "--set", &train]);
    assert!(said.code == 2 && said.err.contains("`libtorch-cuda:0` needs LibTorch"), "{said:?}");
    assert!(!project.path("out").exists());
    let said = project.say(&["plan", "conf.toml", "--set", &train]);
    assert!(said.code == 0 && said.out.contains("2 ranks (2 a sequence)"), "{said:?}");
    project.run(&["--set", &train, "--until", "pack"]);
}

#[test]
fn from_is_for_one_process() {
    let project = Project::new(3);
    let train = train("steps = 3");
    let mut command = project.command(&["train", "conf.toml", "--set", &train, "--from", "pack"]);
    let environment =
        [("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")];
    let said = said(command.envs(environment).output().unwrap());
    assert!(said.code == 2 && said.err.contains("--from is for one process"), "{said:?}");
}

/// Training with one process per rank, in builds that support it.
#[cfg(feature = "libtorch")]
mod processes {
    use super::*;

    /// A training of two processes that has written its first checkpoint, and the pid of rank 1.
    fn started(project: &Project, train: &str) -> (std::process::Child, u32) {
        let child = project.command(&["train", "conf.toml", "--nproc", "2", "--set", train]).spawn().unwrap();
        while !tree(&project.path("out/stages/train")).iter().any(|path| saved(path)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let rank_1 = std::fs::read_dir("/proc").unwrap().find_map(|entry| {
            let process = entry.unwrap().path();
            let status = std::fs::read_to_string(process.join("status")).ok()?;
            let parent =
                status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse::<u32>().ok()?;
            let environment = std::fs::read(process.join("environ")).ok()?;
            let second = environment.split(|byte| *byte == 0).any(|variable| variable == b"RANK=1");
            (parent == child.id() && second).then(|| process.file_name()?.to_str()?.parse().ok())?
        });
        (child, rank_1.expect("the second process"))
    }

    #[test]
    fn processes_train_as_threads_do_and_print_the_run_alone() {
        let train = |ranks| train(&format!("steps = 12, devices = [\"libtorch-cpu\"]{ranks}"));
        let threads = Project::new(3);
        let want = losses(&threads.run(&["--set", &train(", ranks = 2")]));
        let project = Project::new(3);
        let said = project.say(&["train", "conf.toml", "--nproc", "2", "--set", &train("")]);
        assert_eq!(said.code, 0, "{said:?}");
        assert_eq!(said.out.lines().count(), 1, "{said:?}");
        let got = losses(Path::new(said.out.trim()));
        assert_eq!(got.len(), want.len());
        for ((step, got), (_, want)) in got.into_iter().zip(want) {
            assert!((got - want).abs() < 1e-4 * want, "step {step}: {got} {want}");
        }
    }

    #[test]
    fn a_killed_process_ends_the_others_with_its_name_and_training_goes_on() {
        let project = Project::new(3);
        let train = train("steps = 400, checkpoint_every = 5, devices = [\"libtorch-cpu\"]");
        let (child, rank_1) = started(&project, &train);
        let killed = std::time::Instant::now();
        std::process::Command::new("kill").args(["-9", &rank_1.to_string()]).status().unwrap();
        let said = said(child.wait_with_output().unwrap());
        assert!(killed.elapsed() < Duration::from_secs(60));
        assert_eq!(said.code, 6, "{said:?}");
        assert!(said.err.contains("rank 1 ended with signal: 9"), "{said:?}");
        assert!(said.err.contains("rank 0") && said.out.is_empty(), "{said:?}");
        let again = project.say(&["train", "conf.toml", "--nproc", "2", "--set", &train]);
        assert!(again.code == 0 && again.err.contains("training goes on from"), "{again:?}");
    }

    #[test]
    fn a_signal_stops_all_processes_after_a_step() {
        let project = Project::new(3);
        let train = train("steps = 400, checkpoint_every = 5, devices = [\"libtorch-cpu\"]");
        let (child, _) = started(&project, &train);
        crate::project::terminate(&child);
        let said = said(child.wait_with_output().unwrap());
        assert!(said.code == 75 && said.out.is_empty(), "{said:?}");
        let again = project.say(&["train", "conf.toml", "--nproc", "2", "--set", &train]);
        assert!(again.code == 0 && again.err.contains("training goes on from"), "{again:?}");
    }
}

#[test]
fn a_longer_training_says_that_it_begins_anew() {
    let project = Project::new(3);
    let short = project.run(&["--set", &train("steps = 3")]);
    let said = project.say(&["run", "conf.toml", "--set", &train("steps = 5")]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.err.contains("a training of 3 steps with the same settings is finished"), "{said:?}");
    let checkpoint =
        said.err.split("set train.checkpoint to ").nth(1).unwrap().split_whitespace().next().unwrap();
    assert!(Path::new(checkpoint).join("model.safetensors").exists(), "{checkpoint}");
    assert_eq!(losses(&short).len(), 3);
    let mut child = project
        .command(&["run", "conf.toml", "--set", &train("steps = 3000, checkpoint_every = 2")])
        .spawn()
        .unwrap();
    while !tree(&project.path("out/stages/train"))
        .iter()
        .any(|path| saved(path) && path.ends_with("manifest.json"))
    {
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let said = project.say(&["run", "conf.toml", "--set", &train("steps = 6")]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(
        said.err.contains("a training of another length with the same settings was stopped after step"),
        "{said:?}"
    );
    // with other settings it is another training, and the warning is not given
    let said = project.say(&["run", "conf.toml", "--set", &train("steps = 5, learning_rate = 1e-3")]);
    assert!(said.code == 0 && !said.err.contains("with the same settings"), "{said:?}");
}

#[test]
fn what_goes_between_documents_is_asked_for_by_name_and_nothing_is_said_aloud() {
    let project = Project::new(3);
    project.keep_tokenizer();
    let said = project.say(&["run", "conf.toml", "--until", "tokenizer", "--set", "tokenizer.bos=false"]);
    assert!(said.code == 0 && said.err.contains("there is no token between documents"), "{said:?}");
    let said = project.say(&["run", "conf.toml", "--until", "tokenizer"]);
    assert!(said.code == 0 && !said.err.contains("there is no token between documents"), "{said:?}");
    let none = [
        "run",
        "conf.toml",
        "--until",
        "tokenizer",
        "--set",
        "tokenizer.bos=false",
        "--set",
        "tokenizer.eos=false",
    ];
    let said = project.say(&none);
    assert!(said.code == 0 && !said.err.contains("there is no token between documents"), "{said:?}");
    for wrong in ["tokenizer.eos=70000", "tokenizer.eos=<eos>"] {
        let said = project.say(&["run", "conf.toml", "--set", wrong]);
        assert!(said.code == 2 && said.err.contains("special tokens are"), "{said:?}");
        assert!(!project.path("out/stages/tokens").exists(), "it is said before anything is computed");
    }
    let run = project.run(&["--set", "tokenizer.eos=</s>"]);
    let asked = project.run(&["--set", "tokenizer.eos=true"]);
    let data = |run: &Path| {
        std::fs::read(run.join("data").read_dir().unwrap().next().unwrap().unwrap().path()).unwrap()
    };
    assert!(data(&run) == data(&asked));
    assert!(data(&run) != data(&project.run(&[])));
}

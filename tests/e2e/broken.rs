//! Kills, damaged files, and concurrent runs.

use std::path::Path;

use crate::project::{Project, flip, packed, rewrite, said, tree};

fn cut(bytes: &mut Vec<u8>) {
    bytes.truncate(bytes.len() / 2);
}

/// Kills runs at times spread over their duration, and then lets one finish.
fn kills(seed: u64, count: u32) {
    let project = Project::new(seed);
    let undisturbed = Project::new(seed);
    let started = std::time::Instant::now();
    let want = packed(&undisturbed.run(&[]));
    let whole = started.elapsed();
    for i in 0..count {
        let mut child = project.command(&["run", "conf.toml"]).spawn().unwrap();
        // from the start to just before the end, in a scrambled order
        std::thread::sleep(whole.mul_f64(f64::from((i * 7 + 3) % count) / f64::from(count)));
        child.kill().unwrap();
        child.wait().unwrap();
        if i % 3 == 2 {
            // some runs start from an empty output
            std::fs::remove_dir_all(project.path("out")).ok();
        }
    }
    let run = project.run(&[]);
    assert!(packed(&run) == want);
    assert_eq!(project.say(&["verify", run.to_str().unwrap()]).code, 0);
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    kills(1, 6);
}

/// The slow proof: `cargo test --release --test e2e -- --ignored twenty_kills`
#[test]
#[ignore = "a slow proof: run it by name"]
fn twenty_kills_leave_the_same_bytes() {
    kills(2, 20);
}

#[test]
fn a_clock_that_goes_backwards_changes_nothing() {
    let Ok(library) = std::env::var("LIBFAKETIME") else {
        return eprintln!("skipped: LIBFAKETIME names no libfaketime.so.1 (pip install libfaketime)");
    };
    let project = Project::new(6);
    let want = packed(&project.run(&["--set", "run.output=alone"]));
    let clock = project.path("clock");
    let run = |more: &[&str]| {
        let mut command = project.command(&[&["run", "conf.toml"], more].concat());
        command.env("LD_PRELOAD", &library).env("FAKETIME_TIMESTAMP_FILE", &clock);
        // the time is read from the file at every call, and the monotonic clock, which waits use, stays real
        command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        command.spawn().unwrap()
    };
    std::fs::write(&clock, "+3d").unwrap();
    assert_eq!(said(run(&["--until", "catalog"]).wait_with_output().unwrap()).code, 0);
    // the files written so far now date from the future, and during the run the clock goes back an hour
    std::fs::write(&clock, "+0").unwrap();
    let running = run(&[]);
    std::thread::sleep(std::time::Duration::from_millis(30));
    std::fs::write(&clock, "-1h").unwrap();
    let said = said(running.wait_with_output().unwrap());
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.err.contains("done in ") && !said.err.contains("done in -"), "{said:?}");
    assert!(packed(Path::new(said.out.trim())) == want);
    assert_eq!(project.say(&["verify", said.out.trim()]).code, 0);
    let gone = project.say(&["gc", "conf.toml"]);
    assert!(gone.code == 0 && gone.out.contains("0 files"), "{gone:?}");
}

#[test]
fn two_runs_at_once_do_not_disturb_each_other() {
    let project = Project::new(4);
    let children: Vec<_> = (0..2).map(|_| project.command(&["run", "conf.toml"]).spawn().unwrap()).collect();
    let runs: Vec<_> = children.into_iter().map(|child| said(child.wait_with_output().unwrap())).collect();
    for said in &runs {
        assert_eq!(said.code, 0, "{}", said.err);
    }
    assert_eq!(runs[0].out, runs[1].out);
    let verdict = project.say(&["verify", runs[0].out.trim()]);
    assert_eq!(verdict.code, 0, "{verdict:?}");
}

#[test]
fn a_damaged_file_is_found_by_verify_and_computed_again_by_run() {
    let project = Project::new(5);
    let run = project.run(&[]);
    let url = run.to_str().unwrap().to_owned();
    let want = packed(&run);
    let files = tree(&project.path("out"));
    let damaged = ["catalog-00000", "tokens-", "drawn-00000", "mixture-00000", "domains-00000", "runs/"];
    for name in damaged {
        let mine = |path: &&std::path::PathBuf| {
            let text = path.to_string_lossy();
            text.contains(name) && (text.ends_with(".parquet") || text.ends_with(".bin"))
        };
        let path = files.iter().find(mine).unwrap_or_else(|| panic!("no {name}"));
        rewrite(path, |bytes| if name == "drawn-00000" { cut(bytes) } else { flip(bytes) });
        let verdict = project.say(&["verify", &url]);
        assert_eq!(verdict.code, 5, "{name}: {verdict:?}");
        let shown = path.file_name().unwrap().to_string_lossy();
        assert!(
            verdict.out.contains(&*shown) && verdict.out.contains("withdrawn"),
            "{name}: {}",
            verdict.out
        );
        assert!(packed(&project.run(&[])) == want, "{name}");
        let verdict = project.say(&["verify", &url]);
        assert_eq!(verdict.code, 0, "{name}: {verdict:?}");
    }
}

#[test]
fn a_file_that_breaks_before_the_first_run_has_ended_is_computed_again() {
    let project = Project::new(6);
    let whole = Project::new(6);
    let want = packed(&whole.run(&[]));
    for name in ["tokenizer.json", "tokens-", "domains-00000"] {
        project.run(&["--until", "domains"]);
        let files = tree(&project.path("out"));
        let path = files
            .iter()
            .find(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name)));
        rewrite(path.unwrap_or_else(|| panic!("no {name}")), |bytes| flip(bytes));
        assert!(packed(&project.run(&[])) == want, "{name}");
        std::fs::remove_dir_all(project.path("out")).unwrap();
    }
}

/// The slow proof: `cargo test --release --test e2e -- --ignored every_file`
#[test]
#[ignore = "a slow proof: run it by name"]
fn every_file_flipped_cut_short_or_gone_is_computed_again() {
    let project = Project::new(8);
    let url = project.run(&[]).to_str().unwrap().to_owned();
    let want = packed(project.path(&url).as_path());
    let sound = Project::empty();
    let copy = |from: &Project, to: &Project| {
        let _ = std::fs::remove_dir_all(to.path("out"));
        let copied =
            std::process::Command::new("cp").arg("-a").args([from.path("out"), to.path("out")]).status();
        assert!(copied.unwrap().success());
    };
    copy(&project, &sound);
    let files = tree(&project.path("out"));
    assert!(files.len() > 30, "{files:?}");
    for file in files {
        for harm in ["flipped", "cut", "gone"] {
            copy(&sound, &project);
            match harm {
                "flipped" => rewrite(&file, |bytes| flip(bytes)),
                "cut" => rewrite(&file, cut),
                _ => std::fs::remove_file(&file).unwrap(),
            }
            project.say(&["verify", &url]);
            assert!(packed(&project.run(&[])) == want, "{harm}: {}", file.display());
            let verdict = project.say(&["verify", &url]);
            assert_eq!(verdict.code, 0, "{harm}: {}: {verdict:?}", file.display());
        }
    }
}

#[test]
fn scattered_ids_that_rotted_between_two_attempts_are_not_packed() {
    let project = Project::new(6);
    let want = packed(&project.run(&[]));
    // as if the run had been killed between shuffle and pack
    for folder in ["out/stages/pack", "out/runs"] {
        std::fs::remove_dir_all(project.path(folder)).unwrap();
    }
    let ids = tree(&project.path("out/stages/shuffle"))
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "bin"));
    let ids = ids.unwrap();
    let mut bytes = std::fs::read(&ids).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&ids, bytes).unwrap();
    assert!(packed(&project.run(&[])) == want);
}

/// A file of a stage's table, by a part of its path.
fn file_of(project: &Project, part: &str) -> std::path::PathBuf {
    let all = tree(&project.path("out"));
    all.into_iter().find(|path| path.to_string_lossy().contains(part)).unwrap_or_else(|| panic!("no {part}"))
}

#[test]
fn what_rotted_between_two_runs_is_computed_again_before_anything_is_made_of_it() {
    let sets = ["--set", "mixture.holdout=0.02"];
    let want = packed(&Project::new(9).run(&sets));
    for part in ["documents-", "catalog-00000.parquet", "domains-00000.parquet"] {
        let project = Project::new(9);
        project.run(&[]);
        rewrite(&file_of(&project, part), |bytes| flip(bytes));
        let run = project.run(&sets);
        assert!(packed(&run) == want, "{part}");
        let verdict = project.say(&["verify", run.to_str().unwrap()]);
        assert_eq!(verdict.code, 0, "{part}: {verdict:?}");
    }
}

#[test]
fn a_manifest_that_says_something_else_than_was_written_is_no_manifest() {
    let project = Project::new(10);
    let run = project.run(&[]);
    let want = packed(&run);
    let url = run.to_str().unwrap();
    for (part, text) in
        [("/mixture/", "\"budget\": "), ("/runs/", "\"seed\": "), ("/catalog/", "\"documents\": ")]
    {
        let all = tree(&project.path("out"));
        let is_manifest = |path: &std::path::PathBuf| {
            path.to_string_lossy().contains(part) && path.ends_with("manifest.json")
        };
        let at = all.into_iter().find(is_manifest).unwrap();
        let before = std::fs::read_to_string(&at).unwrap();
        let place = before.find(text).unwrap() + text.len();
        let mut after = before.clone().into_bytes();
        after[place] = if after[place] == b'9' { b'8' } else { after[place] + 1 };
        std::fs::write(&at, after).unwrap();
        let verdict = project.say(&["verify", url]);
        assert_eq!(verdict.code, 5, "{part}: {verdict:?}");
        assert!(packed(&project.run(&[])) == want, "{part}");
        assert_eq!(std::fs::read_to_string(&at).unwrap(), before, "{part}");
        assert_eq!(project.say(&["verify", url]).code, 0, "{part}");
    }
}

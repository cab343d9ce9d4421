//! Output that cannot be printed: the reader has gone away, or the disk is full.

use std::process::Stdio;

use crate::project::{Project, Said, flip, rewrite, said};
use crate::training::train;

/// Runs a command whose stdout has no reader any more.
fn unread(project: &Project, arguments: &[&str]) -> Said {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    said(project.command(arguments).stdout(writer).output().unwrap())
}

/// Runs a command that prints to a full disk.
fn to_a_full_disk(project: &Project, arguments: &[&str]) -> Said {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    said(project.command(arguments).stdout(Stdio::from(full)).output().unwrap())
}

#[test]
fn a_reader_that_goes_away_is_no_failure_and_a_full_stdout_is_said_to_be_full() {
    let project = Project::new(3);
    let train = train("steps = 2");
    let run = project.run(&["--set", &train]);
    let (run, checkpoint) = (run.to_str().unwrap(), run.join("checkpoint"));
    let checkpoint = checkpoint.to_str().unwrap();
    project.write("essays/a.txt", "The sea was calm and wide. ".repeat(200));
    let commands: [&[&str]; 19] = [
        &["run", "conf.toml"],
        &["run", "conf.toml", "--json"],
        &["train", "conf.toml", "--set", &train],
        &["plan", "conf.toml"],
        &["preview", "conf.toml", "--json"],
        &["preview", "conf.toml", "--against", "conf.toml"],
        &["sql", "conf.toml", "select * from catalog"],
        &["sql", "conf.toml", "select * from catalog", "--json"],
        &["report", run],
        &["verify", run],
        &["gc", "out", "--dry-run"],
        &["compare", run, run],
        &["reproduce", run],
        &["sweep", "conf.toml", "--recipes", &crate::project::recipe("per_source"), "--json"],
        &["eval", "loss", run],
        &["generate", checkpoint, "--prompt", "the sea", "--tokens", "100000"],
        &["generate", checkpoint, "--prompt", "the sea", "--tokens", "3", "--ids"],
        &["completions", "bash"],
        &["--help"],
    ];
    for command in commands.into_iter().chain([&["run", "--help"][..], &["--version"]]) {
        let unread = unread(&project, command);
        assert_eq!(unread.code, 0, "{command:?}: {unread:?}");
        assert!(!unread.err.contains("Broken pipe") && !unread.err.contains("panicked"), "{unread:?}");
        let full = to_a_full_disk(&project, command);
        assert_eq!(full.code, 4, "{command:?}: {full:?}");
        assert!(
            full.err.contains("cannot write to stdout") && full.err.contains("No space left"),
            "{full:?}"
        );
        assert!(!full.err.contains("engine.spill"), "{full:?}");
    }
}

#[test]
fn what_is_wrong_is_told_by_the_exit_code_to_whom_nothing_can_be_printed() {
    let project = Project::new(3);
    let run = project.run(&[]);
    let data = crate::project::tree(&run.join("data"));
    rewrite(&data[0], |bytes| flip(bytes));
    let verdict = unread(&project, &["verify", run.to_str().unwrap()]);
    assert_eq!(verdict.code, 5, "{verdict:?}");
}

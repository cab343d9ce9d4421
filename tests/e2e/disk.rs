//! What a run leaves on disk: after a power failure, on file systems with fewer features, and in folders with
//! unusual names.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::project::{PROGRAM, Project, Said, packed, said, tree};

/// Runs the command under strace, which writes its system calls to `log`. Without strace it returns `None`
/// and says that the test is skipped.
fn traced(project: &Project, calls: &[&str], log: &Path, arguments: &[&str]) -> Option<Said> {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-y", "-qq", "-s", "4096", "--seccomp-bpf", "-o"]).arg(log).args(calls).arg("--");
    strace.arg(PROGRAM).args(arguments).current_dir(project.dir.path());
    match strace.stdout(Stdio::piped()).stderr(Stdio::piped()).output() {
        Ok(output) => Some(said(output)),
        Err(_) => {
            eprintln!("skipped: there is no strace (apt-get install strace)");
            None
        }
    }
}

/// A path as strace writes it, without the suffix of a file that has no name yet.
fn named(path: &str) -> PathBuf {
    let name = path.rsplit_once('#').filter(|(_, digits)| digits.parse::<u32>().is_ok());
    name.map_or(path, |(name, _)| name).into()
}

/// The files that were synced or got their names, in the order of the calls.
fn syncs_and_names(log: &Path) -> Vec<(&'static str, PathBuf)> {
    let text = std::fs::read_to_string(log).unwrap();
    let (mut calls, mut begun) = (vec![], BTreeMap::new());
    for line in text.lines() {
        let (process, rest) = line.split_once(' ').unwrap();
        let rest = rest.trim_start();
        if rest.ends_with("<unfinished ...>") {
            // a call that another thread's call interrupts in the log
            begun.insert(process, rest);
            continue;
        }
        let whole = if rest.starts_with("<... ") { begun.remove(process).unwrap() } else { rest };
        if !rest.ends_with("= 0") {
            continue;
        }
        if whole.starts_with("fsync(") || whole.starts_with("fdatasync(") {
            let path = whole.split_once('<').unwrap().1.split_once('>').unwrap().0;
            calls.push(("synced", named(path)));
        } else {
            let path = whole.rsplit('"').nth(1).unwrap_or_else(|| panic!("{whole}"));
            calls.push(("named", named(path)));
        }
    }
    calls
}

/// The paths of the files that a manifest names.
fn files_of(manifest: &Path) -> Vec<PathBuf> {
    fn files(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                if let (Some(name), Some(_)) =
                    (fields.get("name").and_then(Value::as_str), fields.get("blake3"))
                {
                    found.push(name.to_owned());
                }
                fields.values().for_each(|value| files(value, found));
            }
            Value::Array(all) => all.iter().for_each(|value| files(value, found)),
            _ => {}
        }
    }
    let mut found = vec![];
    files(&serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap(), &mut found);
    found.iter().map(|name| manifest.parent().unwrap().join(name)).collect()
}

#[test]
fn what_a_manifest_names_is_on_the_disk_before_the_manifest_has_its_name() {
    let project = Project::new(3);
    let log = project.path("strace.log");
    let calls = ["-e", "trace=fsync,fdatasync,link,linkat,rename,renameat,renameat2"];
    let train = crate::training::train("steps = 2");
    let Some(said) = traced(&project, &calls, &log, &["run", "conf.toml", "--set", &train]) else { return };
    assert_eq!(said.code, 0, "{said:?}");
    let calls = syncs_and_names(&log);
    let out = project.path("out").canonicalize().unwrap();
    let place = |what: &str, path: &Path| calls.iter().position(|(did, of)| *did == what && of == path);
    // a hard link has the inode of the file that was synced under its first name
    let inode = |path: &Path| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    let manifests: Vec<PathBuf> =
        tree(&out).into_iter().filter(|path| path.ends_with("manifest.json")).collect();
    assert!(manifests.len() > 8, "{manifests:?}");
    let mut files = 0;
    for manifest in &manifests {
        let name = place("named", manifest).unwrap_or_else(|| panic!("{} got no name", manifest.display()));
        let before: BTreeSet<_> = calls[..name].iter().filter(|(did, _)| *did == "synced").collect();
        let inodes: BTreeSet<_> = before.iter().filter_map(|(_, path)| inode(path)).collect();
        let is_synced = |path: &Path| before.iter().any(|(_, synced)| synced == path);
        assert!(is_synced(manifest), "{} is not on the disk before it has its name", manifest.display());
        for file in files_of(manifest) {
            files += 1;
            assert!(inode(&file).is_some_and(|own| inodes.contains(&own)), "{}", file.display());
            // the folder that holds its name is synced, and so are all folders above it up to the output
            for folder in file.ancestors().skip(1).take_while(|folder| folder.starts_with(&out)) {
                assert!(is_synced(folder), "{}: {}", manifest.display(), folder.display());
            }
        }
        let after = &calls[name..];
        let folder = manifest.parent().unwrap();
        assert!(after.iter().any(|(did, path)| *did == "synced" && path == folder), "{}", manifest.display());
    }
    assert!(files > 15, "{files}");
    assert!(place("synced", out.parent().unwrap()).is_some(), "the output's own name");
}

/// Runs and verifies, leaves what a killed run would leave, and runs again.
fn is_at_home(project: &Project, run: impl Fn(&[&str]) -> Said) {
    let alone = Project::new(3);
    let want = packed(&alone.run(&[]));
    let first = run(&["run", "conf.toml"]);
    assert_eq!(first.code, 0, "{first:?}");
    let folder = project.path(first.out.trim());
    assert!(packed(&folder) == want);
    let verdict = run(&["verify", folder.to_str().unwrap()]);
    assert_eq!(verdict.code, 0, "{verdict:?}");
    // a process that is killed while it writes a manifest leaves a part of it
    for manifest in tree(&project.path("out")).iter().filter(|path| path.ends_with("manifest.json")) {
        let text = std::fs::read(manifest).unwrap();
        std::fs::write(manifest, &text[..text.len() / 2]).unwrap();
    }
    let again = run(&["run", "conf.toml"]);
    assert_eq!((again.code, &again.out), (0, &first.out), "{again:?}");
    let verdict = run(&["verify", folder.to_str().unwrap()]);
    assert_eq!(verdict.code, 0, "{verdict:?}");
    assert!(packed(&folder) == want);
}

#[test]
fn a_file_system_that_knows_neither_links_nor_renames_that_spare_is_one_to_run_on() {
    let project = Project::new(3);
    let log = project.path("strace.log");
    let calls = ["-e", "trace=link,linkat,renameat2", "-e", "inject=link,linkat:error=EPERM", "-e"];
    let calls = [&calls[..], &["inject=renameat2:error=EINVAL"]].concat();
    if traced(&project, &calls, &log, &["--version"]).is_none() {
        return;
    }
    is_at_home(&project, |arguments| {
        let said = traced(&project, &calls, &log, arguments).unwrap();
        let text = std::fs::read_to_string(&log).unwrap();
        let refused = |error| text.lines().any(|line| line.contains(error) && line.contains("(INJECTED)"));
        assert!(arguments[0] != "run" || refused("EPERM") && refused("EINVAL"), "{text}");
        said
    });
}

/// An exFAT file system for a folder, mounted by FUSE until the value is dropped.
struct ExFat {
    device: String,
    at: PathBuf,
}

impl ExFat {
    /// `None`, with a message, if it cannot be mounted.
    fn mount(project: &Project, at: &str) -> Option<Self> {
        let (image, at) = (project.path("exfat.img"), project.path(at));
        std::fs::File::create(&image).unwrap().set_len(256 << 20).unwrap();
        std::fs::create_dir(&at).unwrap();
        let ask = |program: &str, arguments: &[&std::ffi::OsStr]| {
            let output = Command::new(program).args(arguments).stderr(Stdio::null()).output().ok()?;
            output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let mounted = (|| {
            ask("mkfs.exfat", &[image.as_ref()])?;
            let device = ask("losetup", &["-f".as_ref(), "--show".as_ref(), image.as_ref()])?;
            let mounted = Self { device, at };
            ask("mount.exfat-fuse", &[mounted.device.as_ref(), mounted.at.as_ref()])?;
            Some(mounted)
        })();
        if mounted.is_none() {
            eprintln!(
                "skipped: exFAT can't be mounted here (as root: apt-get install exfat-fuse exfatprogs)"
            );
        }
        mounted
    }
}

impl Drop for ExFat {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.at).status();
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

#[test]
fn a_run_goes_to_exfat_which_knows_no_links() {
    let project = Project::new(3);
    let Some(_mounted) = ExFat::mount(&project, "out") else { return };
    let refused = std::fs::hard_link(project.path("conf.toml"), project.path("out/link")).unwrap_err();
    assert!(refused.raw_os_error().is_some(), "{refused}");
    is_at_home(&project, |arguments| project.say(arguments));
}

#[test]
fn a_run_whose_folder_is_on_another_disk_has_copies_there() {
    let project = Project::new(3);
    let Ok(other) = tempfile::tempdir_in("/dev/shm") else { return eprintln!("skipped: no /dev/shm") };
    std::fs::create_dir(project.path("out")).unwrap();
    std::os::unix::fs::symlink(other.path(), project.path("out/runs")).unwrap();
    is_at_home(&project, |arguments| project.say(arguments));
}

#[test]
fn an_output_may_be_called_anything() {
    let project = Project::new(3);
    let plain = packed(&project.run(&["--set", "run.output=plain"]));
    let name = "out ü%20#1/語 {a}*?";
    let set = format!("run.output={name}");
    let sets = ["--set", set.as_str()];
    let folder = project.run(&sets);
    assert!(folder.starts_with(project.path(name)), "{}", folder.display());
    assert!(packed(&folder) == plain);
    let run = folder.to_str().unwrap();
    let again = project.say(&[&["run", "conf.toml"][..], &sets].concat());
    assert!(again.code == 0 && again.err.contains("done in") && again.err.contains(": 0 of "), "{again:?}");
    let verdict = project.say(&["verify", run]);
    assert_eq!(verdict.code, 0, "{verdict:?}");
    assert_eq!(project.sql("select count(*) as n from documents", &sets)[0]["n"], 240);
    let reproduced = project.say(&["reproduce", run]);
    assert!(reproduced.code == 0 && reproduced.out.contains("the same bytes"), "{reproduced:?}");
    assert!(project.path(name).join("reproduced/runs").is_dir());
    let report = project.say(&["report", run]);
    assert!(report.code == 0 && report.out.contains("<html"), "{report:?}");

    // a dead run may leave files with unusual names
    let dead = project.path(name).join("stages/tokens/deaddeaddeaddeaddeaddeaddeaddead/jobs/é %41#b.json");
    std::fs::create_dir_all(dead.parent().unwrap()).unwrap();
    let file = std::fs::File::create(&dead).unwrap();
    file.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(3600)).unwrap();
    let gone = project.say(&["gc", name, "--older-than", "30m"]);
    assert!(gone.code == 0 && gone.out.contains("é %41#b.json") && !dead.exists(), "{gone:?}");
    assert_eq!(project.say(&["verify", run]).code, 0);
    // and nothing was written beside the output
    let beside: BTreeSet<String> = std::fs::read_dir(project.dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(beside, ["conf.toml", "in", "out ü%20#1", "plain"].map(str::to_owned).into());
}

//! A first project of a user who has the program, but no clone of this repository.

use std::path::Path;

use crate::project::{PROGRAM, Project, corpus, said, tree};

/// Runs the lines that `init` printed in a shell.
fn typed(project: &Project, printed: &str) -> crate::project::Said {
    std::os::unix::fs::symlink(PROGRAM, project.path("lengthwise")).unwrap();
    let path = format!("{}:{}", project.dir.path().display(), std::env::var("PATH").unwrap_or_default());
    let mut shell = std::process::Command::new("sh");
    shell.args(["-ec", printed]).current_dir(project.dir.path()).env("PATH", path);
    said(shell.output().unwrap())
}

#[test]
fn what_it_prints_is_what_to_type_next() {
    let project = Project::empty();
    let printed = project.say(&["init", "a first/project"]);
    assert_eq!(printed.code, 0, "{printed:?}");
    let ran = typed(&project, &printed.out);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(!ran.err.contains("WARN"), "{ran:?}");
    let run = Path::new(ran.out.lines().last().unwrap());
    let manifest = std::fs::read_to_string(run.join("manifest.json")).unwrap();
    assert!(manifest.contains("catalog_has_domains_with_names"), "its own check runs");
    assert!(run.join("checkpoint/model.safetensors").is_file());
}

#[test]
fn its_recipes_are_those_of_the_repository() {
    let project = Project::empty();
    assert_eq!(project.say(&["init", "project"]).code, 0);
    let texts = |folder: &Path| -> Vec<_> {
        let text = |path: &std::path::PathBuf| {
            (path.file_name().unwrap().to_owned(), std::fs::read_to_string(path).unwrap())
        };
        tree(folder).iter().map(text).collect()
    };
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sql/mixtures");
    assert_eq!(texts(&project.path("project/sql/mixtures")), texts(&repository));
}

#[test]
fn it_never_overwrites() {
    let project = Project::empty();
    project.write("project/sql/mixtures/global.sql", "mine");
    let refused = project.say(&["init", "project"]);
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(refused.err.contains("project/sql/mixtures/global.sql is there already"), "{refused:?}");
    assert_eq!(tree(&project.path("project")), [project.path("project/sql/mixtures/global.sql")]);

    // existing files with other names do not matter
    project.write("other/notes.txt", "mine");
    assert_eq!(project.say(&["init", "other"]).code, 0);
    assert_eq!(project.say(&["init", "other"]).code, 2);
    assert_eq!(std::fs::read_to_string(project.path("other/notes.txt")).unwrap(), "mine");
}

#[test]
fn a_source_that_is_named_is_read_as_what_it_is() {
    let project = Project::empty();
    let rows = corpus(3, 240);
    project.jsonl("tables/a.jsonl.zst", &rows);
    for (i, (_, text)) in rows.iter().enumerate() {
        project.write(&format!("texts/{i}.md"), text);
    }
    project.write("texts/package.json", "{\n}\n");
    // what people keep beside a shard
    project.jsonl("shard/a.jsonl", &rows);
    project.write("shard/README.md", "# A shard\n");
    project.write("shard/dataset_infos.json", "{\n}\n");
    let sources =
        [("tables", "jsonl"), ("tables/*.jsonl.zst", "jsonl"), ("texts", "text"), ("shard", "jsonl")];
    for (i, (source, format)) in sources.into_iter().enumerate() {
        let folder = format!("of-{i}");
        let made = project.say(&["init", &folder, "--source", source]);
        assert_eq!(made.code, 0, "{source}: {made:?}");
        assert!(!project.path(&folder).join("text").exists());
        let mut command = project.command(&["run", "conf/first.toml", "--until", "pack", "--json"]);
        let ran = said(command.current_dir(project.path(&folder)).output().unwrap());
        assert_eq!(ran.code, 0, "{source}: {ran:?}");
        let conf = std::fs::read_to_string(project.path(&folder).join("conf/first.toml")).unwrap();
        assert!(conf.contains(&format!("format = \"{format}\"")), "{conf}");
    }
    project.write("shard/b.parquet", "");
    let mixed = project.say(&["init", "mixed", "--source", "shard"]);
    assert!(mixed.code == 2 && mixed.err.contains("two formats"), "{mixed:?}");
    let nowhere = project.say(&["init", "nowhere", "--source", "not/there"]);
    assert!(nowhere.code == 2 && nowhere.err.contains("not/there"), "{nowhere:?}");
    assert!(!project.path("nowhere").exists());
}

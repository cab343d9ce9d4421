//! Runs whose heavy tasks are performed by a cluster: real schedulers and executors, some of which are
//! killed.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use project::{PROGRAM, Project, corpus, flip, packed, random, rewrite, said, tree};
use servers::{Process, S3, SECRET, free_ports, quiet};

// shared with the other end-to-end tests
#[allow(dead_code)]
#[path = "e2e/project.rs"]
mod project;
#[path = "e2e/servers.rs"]
mod servers;

/// A scheduler, and executors with one slot each.
struct Cluster {
    port: u16,
    scheduler: Process,
    executors: Vec<Process>,
}

impl Cluster {
    fn start(executors: usize, with: impl Fn(&mut Command)) -> Self {
        let [port] = free_ports();
        let mut cluster = Self { port, scheduler: schedule(port), executors: vec![] };
        for _ in 0..executors {
            cluster.add(&with);
        }
        cluster
    }

    /// Starts one more executor.
    fn add(&mut self, with: impl Fn(&mut Command)) {
        let ([port], scheduler) = (free_ports(), format!("localhost:{}", self.port));
        let mut command = Command::new(PROGRAM);
        command.args(["cluster", "executor", "--scheduler", &scheduler, "--slots", "1"]);
        command.args(["--port", &port.to_string()]);
        with(&mut command);
        self.executors.push(Process(quiet(&mut command).spawn().unwrap()));
    }

    /// Kills the scheduler with SIGKILL, and starts it again.
    fn restart(&mut self) {
        self.scheduler.kill();
        self.scheduler = schedule(self.port);
    }

    /// Kills the oldest executor with SIGKILL.
    fn kill(&mut self) {
        drop(self.executors.remove(0));
    }

    /// The value of `--set` that makes a run use this cluster.
    fn set(&self) -> String {
        format!("engine.url=df://localhost:{}", self.port)
    }
}

fn schedule(port: u16) -> Process {
    let mut command = Command::new(PROGRAM);
    command.args(["cluster", "scheduler", "--port", &port.to_string()]);
    Process(quiet(&mut command).spawn().unwrap())
}

/// A corpus of several units, each of which is a task. A run over it packs many files.
fn project() -> Project {
    let project = Project::empty();
    for seed in 0..6 {
        // a file of more than 4 MB is a unit of its own
        let rows = corpus(seed, 60).into_iter().cycle().take(2400);
        let rows: Vec<_> =
            rows.enumerate().map(|(i, (domain, text))| (domain, format!("{i} {text}"))).collect();
        project.jsonl(&format!("in/{seed}.jsonl"), &rows);
    }
    project.conf("in/*", "jsonl", "");
    project.keep_tokenizer();
    project.change("conf.toml", "budget = \"40K\"", "budget = \"2M\"");
    project
}

#[test]
fn a_cluster_makes_the_bytes_of_a_run_without_one() {
    let project = project();
    let want = packed(&project.run(&["--set", "run.output=alone"]));
    let cluster = Cluster::start(2, |_| ());
    let said = project.say(&["run", "conf.toml", "--set", &cluster.set(), "--set", "run.output=together"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(packed(Path::new(said.out.trim())) == want);
    assert_eq!(project.say(&["verify", said.out.trim()]).code, 0);
    // a run without the cluster finds the outputs of a run with it
    let plan = project.say(&["plan", "conf.toml", "--set", "run.output=together"]);
    assert!(plan.out.lines().filter(|line| line.contains("cached")).count() >= 6, "{}", plan.out);
    // tasks that were passed through storage have been removed
    assert_eq!(tree(&project.path("together/tasks")), Vec::<std::path::PathBuf>::new());
}

/// Kills an executor as soon as a stage has begun to write, and starts another.
fn killed_in(stage: &str) {
    let project = project();
    let want = packed(&project.run(&["--set", "run.output=alone"]));
    let mut cluster = Cluster::start(2, |_| ());
    let running = project.command(&["run", "conf.toml", "--set", &cluster.set()]).spawn().unwrap();
    let (folder, began) = (project.path("out/stages").join(stage), Instant::now());
    while tree(&folder).is_empty() {
        assert!(began.elapsed() < Duration::from_secs(100), "{stage} did not begin");
        std::thread::sleep(Duration::from_millis(5));
    }
    cluster.kill();
    cluster.add(|_| ());
    let said = said(running.wait_with_output().unwrap());
    assert_eq!(said.code, 0, "{said:?}");
    // the rows of every stage add up, and the bytes are the same
    assert!(packed(Path::new(said.out.trim())) == want, "{stage}");
    assert_eq!(project.say(&["verify", said.out.trim()]).code, 0);
}

#[test]
fn an_executor_killed_while_it_tokenises_changes_nothing() {
    killed_in("tokens");
}

#[test]
fn an_executor_killed_while_it_makes_the_catalog_changes_nothing() {
    killed_in("catalog");
}

#[test]
fn an_executor_killed_while_it_draws_changes_nothing() {
    killed_in("draw");
}

#[test]
fn an_executor_killed_while_it_scatters_changes_nothing() {
    killed_in("shuffle");
}

#[test]
fn an_executor_killed_while_it_packs_changes_nothing() {
    killed_in("pack");
}

#[test]
fn what_an_executor_finds_broken_is_computed_again() {
    let project = project();
    let want = packed(&project.run(&["--set", "run.output=alone"]));
    let cluster = Cluster::start(1, |_| ());
    let arguments = ["run", "conf.toml", "--set", &cluster.set()];
    let broken = [
        ("tokens", "documents-", false),
        ("catalog", "tokens-", false),
        ("mixture", "mixture-", false),
        ("tokens", "documents-", true),
    ];
    for (until, table, seen_whole) in broken {
        assert_eq!(project.say(&[&arguments[..], &["--until", until]].concat()).code, 0);
        if seen_whole {
            assert_eq!(project.say(&[&arguments[..], &["--until", "catalog"]].concat()).code, 0);
            std::fs::remove_dir_all(project.path("out/stages/catalog")).unwrap();
        }
        let files = tree(&project.path("out/stages"));
        let name = |file: &Path| file.file_name().unwrap().to_string_lossy().starts_with(table);
        rewrite(files.iter().find(|file| name(file)).unwrap(), |bytes| flip(bytes));
        let said = project.say(&arguments);
        assert_eq!(said.code, 0, "{table}: {said:?}");
        assert!(said.err.contains("is broken") && said.err.contains(table), "{table}: {said:?}");
        assert!(packed(Path::new(said.out.trim())) == want, "{table}");
        std::fs::remove_dir_all(project.path("out")).unwrap();
    }
}

#[test]
fn two_runs_at_once_share_a_cluster() {
    let project = Project::empty();
    // the tasks are passed through storage, because they name thousands of files
    for (i, row) in corpus(9, 2000).into_iter().enumerate() {
        project.jsonl(&format!("in/{i:05}.jsonl"), &[row]);
    }
    project.conf("in/*", "jsonl", "");
    project.keep_tokenizer();
    let cluster = Cluster::start(1, |_| ());
    let arguments = ["run", "conf.toml", "--set", &cluster.set(), "--set", "run.output=together"];
    let runs: Vec<_> = (0..2)
        .map(|_| {
            let child = project.command(&arguments).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(200));
            child
        })
        .collect();
    let done: Vec<_> = runs.into_iter().map(|run| said(run.wait_with_output().unwrap())).collect();
    assert!(done.iter().all(|said| said.code == 0), "{done:?}");
    assert_eq!(done[0].out, done[1].out);
}

#[test]
fn what_a_task_finds_wrong_is_said_as_without_a_cluster() {
    let project = Project::new(3);
    let cluster = Cluster::start(1, |_| ());
    project.keep_tokenizer();
    project.write("in/b.jsonl.zst", b"this is not zstd");
    let alone = project.say(&["run", "conf.toml"]);
    let together = project.say(&["run", "conf.toml", "--set", &cluster.set()]);
    assert_eq!((alone.code, together.code), (3, 3), "{alone:?} {together:?}");
    assert!(alone.err.contains("b.jsonl.zst") && together.err.contains("b.jsonl.zst"), "{together:?}");
}

#[test]
fn a_cluster_that_is_not_there_is_said_and_nothing_is_lost() {
    let project = Project::new(3);
    let [port] = free_ports();
    let said = project.say(&["run", "conf.toml", "--set", &format!("engine.url=df://localhost:{port}")]);
    assert_eq!(said.code, 4, "{said:?}");
    assert!(said.err.contains("lengthwise cluster scheduler"), "{said:?}");
    project.run(&[]);
    let odd = project.say(&["run", "conf.toml", "--set", "engine.url=http://localhost"]);
    assert!(odd.code == 2 && odd.err.contains("df://"), "{odd:?}");
}

#[test]
fn a_cluster_on_s3_makes_the_same_bytes_and_leaks_no_secret() {
    let Some(server) = S3::start() else { return };
    let project = Project::new(3);
    let want = packed(&project.run(&[]));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(server.put_first("corpus/a.jsonl", std::fs::read(project.path("in/a.jsonl")).unwrap()));
    let cluster = Cluster::start(2, |command| _ = server.credentials(command, SECRET));
    let sets = ["--set", "source.0.url=s3://bucket/corpus/*", "--set", "run.output=s3://bucket/out"];
    let mut command = project.command(&[&["run", "conf.toml", "--set", &cluster.set()], &sets[..]].concat());
    let done = said(server.credentials(&mut command, SECRET).output().unwrap());
    assert_eq!(done.code, 0, "{done:?}");
    let run = done.out.trim().strip_prefix("s3://bucket/").unwrap();
    runtime.block_on(async {
        use object_store::ObjectStoreExt;
        for (name, bytes) in &want {
            let at = object_store::path::Path::from(format!("{run}/{name}"));
            let there = server.store.get(&at).await.unwrap().bytes().await.unwrap();
            assert!(there == bytes[..], "{name}");
        }
    });
    assert!(!done.err.contains(SECRET));
}

/// The slow proof: `cargo test --release --features cluster --test cluster -- --ignored a_hundred_random_kills --nocapture`
#[test]
#[ignore = "a slow proof: run it by name"]
fn a_hundred_random_kills_change_nothing() {
    let mut server = S3::start().expect("this proof needs `weed`");
    let project = project();
    let want = packed(&project.run(&["--set", "run.output=alone"]));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for seed in 0..6 {
        let text = std::fs::read(project.path(&format!("in/{seed}.jsonl"))).unwrap();
        runtime.block_on(server.put_first(&format!("corpus/{seed}.jsonl"), text));
    }
    let with = |server: &S3, command: &mut Command| _ = server.credentials(command, SECRET);
    let mut cluster = Cluster::start(2, |command| with(&server, command));
    let kills: usize = std::env::var("KILLS").map_or(100, |kills| kills.parse().unwrap());
    let mut next = random(1);
    // counts by (what was killed, exit code of the run at that time)
    let mut outcomes = std::collections::BTreeMap::<(&str, i32), usize>::new();
    let (mut done, mut runs) = (0, 0);
    while done < kills {
        let output = format!("run.output=s3://bucket/out-{runs}");
        let arguments = ["run", "conf.toml", "--set", &cluster.set(), "--set", &output];
        let arguments = [&arguments[..], &["--set", "source.0.url=s3://bucket/corpus/*"]].concat();
        // repeats the same command until it succeeds
        let run = loop {
            let mut command = project.command(&arguments);
            with(&server, &mut command);
            let mut running = command.spawn().unwrap();
            let mut killed = "nothing";
            while running.try_wait().unwrap().is_none() && done < kills && killed == "nothing" {
                std::thread::sleep(Duration::from_millis(next(4000)));
                if running.try_wait().unwrap().is_some() {
                    break;
                }
                killed = ["driver", "executor", "scheduler", "storage"][next(4) as usize];
                match killed {
                    "driver" => running.kill().unwrap(),
                    "executor" => {
                        cluster.kill();
                        cluster.add(|command| with(&server, command));
                    }
                    "scheduler" => cluster.restart(),
                    _ => server.restart(),
                }
                done += 1;
            }
            let said = said(running.wait_with_output().unwrap());
            *outcomes.entry((killed, said.code)).or_default() += 1;
            // finished, killed (-1), or an error whose help says that the same command continues
            assert!([0, 4, -1].contains(&said.code), "{killed}: {said:?}");
            if said.code == 0 {
                break said.out.trim().to_owned();
            }
        };
        let mut verify = project.command(&["verify", &run]);
        with(&server, &mut verify);
        assert_eq!(verify.output().unwrap().status.code(), Some(0));
        let folder = run.strip_prefix("s3://bucket/").unwrap();
        runtime.block_on(async {
            use object_store::ObjectStoreExt;
            for (name, bytes) in &want {
                let at = object_store::path::Path::from(format!("{folder}/{name}"));
                assert!(server.store.get(&at).await.unwrap().bytes().await.unwrap() == bytes[..], "{name}");
            }
        });
        runs += 1;
        eprintln!("{done} kills, {runs} runs with the same bytes");
    }
    for ((killed, code), times) in outcomes {
        eprintln!("{killed} killed: exit {code}, {times} times");
    }
}

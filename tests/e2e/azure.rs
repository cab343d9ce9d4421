//! A run on Azure's blob storage, with Microsoft's emulator azurite from npm.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};

use crate::project::{Project, corpus, packed, said};
use crate::servers::{Process, free_ports, quiet};

/// Creates the container. All emulators have the same account and key.
const MAKE: &str = r"
const [url, account, key] = process.argv.slice(1);
const date = new Date().toUTCString(), version = '2021-08-06';
const text = `PUT${'\n'.repeat(12)}x-ms-date:${date}\nx-ms-version:${version}\n/${account}/${account}/bucket\nrestype:container`;
const sign = require('crypto').createHmac('sha256', Buffer.from(key, 'base64')).update(text, 'utf8').digest('base64');
fetch(`${url}/${account}/bucket?restype=container`, { method: 'PUT', headers: {
    'x-ms-date': date, 'x-ms-version': version, Authorization: `SharedKey ${account}:${sign}` } })
    .then(answer => process.exit(answer.ok ? 0 : 1), () => process.exit(1));
";
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

#[test]
fn a_run_on_azure_gives_the_bytes_of_a_local_run() {
    let Ok(azurite) = std::env::var("AZURITE") else {
        return eprintln!("skipped: AZURITE names no azurite-blob (npm install azurite)");
    };
    let project = Project::empty();
    project.jsonl("in/a.jsonl", &corpus(1, 240));
    project.conf("in/*", "jsonl", "");
    let want = packed(&project.run(&[]));

    let ([port], dir) = (free_ports(), tempfile::tempdir().unwrap());
    let mut server = Command::new(azurite);
    server.args(["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--inMemoryPersistence"]);
    server.current_dir(&dir).args(["--blobPort", &port.to_string()]);
    let _server = Process(quiet(&mut server).spawn().unwrap());
    let url = format!("http://127.0.0.1:{port}");
    let began = Instant::now();
    loop {
        let made =
            Command::new("node").args(["-e", MAKE, &url, ACCOUNT, KEY]).stderr(Stdio::inherit()).status();
        if made.unwrap().success() {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "the container can't be made");
        std::thread::sleep(Duration::from_millis(300));
    }
    let store = MicrosoftAzureBuilder::new()
        .with_account(ACCOUNT)
        .with_access_key(KEY)
        .with_endpoint(format!("{url}/{ACCOUNT}"))
        .with_allow_http(true)
        .with_container_name("bucket")
        .build()
        .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let text = std::fs::read(project.path("in/a.jsonl")).unwrap();
    runtime.block_on(store.put(&Path::from("corpus/a.jsonl"), PutPayload::from(text))).unwrap();

    let arguments = [
        "run",
        "conf.toml",
        "--set",
        "source.0.url=az://bucket/corpus/*",
        "--set",
        "run.output=az://bucket/out",
    ];
    let run = |key: &str| {
        let mut command = project.command(&arguments);
        command.env("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT).env("AZURE_STORAGE_ACCOUNT_KEY", key);
        command.env("AZURE_STORAGE_ENDPOINT", format!("{url}/{ACCOUNT}")).env("AZURE_ALLOW_HTTP", "true");
        said(command.output().unwrap())
    };
    let wrong = run("cGxhbnRlZC1zZWNyZXQ=");
    assert!(wrong.code == 4 && wrong.err.contains("AZURE_STORAGE_ACCOUNT_KEY"), "{wrong:?}");
    let done = run(KEY);
    assert_eq!(done.code, 0, "{}", done.err);
    let folder = done.out.trim().strip_prefix("az://bucket/").unwrap();
    runtime.block_on(async {
        let all: Vec<_> = store.list(None).try_collect().await.unwrap();
        assert!(all.len() > 20);
        for meta in &all {
            let bytes = store.get(&meta.location).await.unwrap().bytes().await.unwrap();
            assert!(!bytes.windows(KEY.len()).any(|window| window == KEY.as_bytes()), "{}", meta.location);
        }
        for (name, bytes) in &want {
            let there =
                store.get(&Path::from(format!("{folder}/{name}"))).await.unwrap().bytes().await.unwrap();
            assert!(*bytes == there, "{name}");
        }
    });
    // the same run again finds all of its outputs
    assert_eq!(run(KEY).out, done.out);
}

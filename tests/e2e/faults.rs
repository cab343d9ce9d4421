//! A store that fails at its k-th operation, for every k: the run ends with an error, never with a wrong
//! result, and the next run continues.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use lengthwise::conf::Conf;
use lengthwise::dataflow::Flow;
use lengthwise::run::{Goal, Run};
use lengthwise::sql::Files;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use crate::project::{Project, packed};

/// A store that counts down with every operation, and fails the operation at which it reaches zero.
#[derive(Debug)]
struct Failing {
    inner: LocalFileSystem,
    left: Arc<AtomicI64>,
}

impl Failing {
    fn operation(&self, what: &'static str) -> Result<()> {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            return Err(object_store::Error::Generic {
                store: "failing",
                source: format!("{what} failed").into(),
            });
        }
        Ok(())
    }
}

impl fmt::Display for Failing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("failing")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Failing {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.operation("put")?;
        self.inner.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.operation("put")?;
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.operation("get")?;
        self.inner.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.operation("get ranges")?;
        self.inner.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        match self.operation("delete") {
            Ok(()) => self.inner.delete_stream(locations),
            Err(error) => futures::stream::once(async { Err(error) }).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.operation("list") {
            Ok(()) => self.inner.list(prefix),
            Err(error) => futures::stream::once(async { Err(error) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.operation("list")?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.operation("copy")?;
        self.inner.copy_opts(from, to, options).await
    }
}

/// Runs to the end in this process, on a store that fails at its `left`-th operation (never, if 0). Returns
/// the run's directory, and the number of operations.
async fn run(project: &Project, left: i64) -> (lengthwise::Result<PathBuf>, i64) {
    let text = std::fs::read_to_string(project.path("conf.toml")).unwrap();
    let conf = Conf::parse(&text, "conf.toml", &[], &|_| None).unwrap();
    let files = Files { root: project.dir.path().to_owned(), ..Files::default() };
    let mut run = Run::new(conf, "conf.toml", files, Goal::Compute { from: None }).unwrap();
    let counter = Arc::new(AtomicI64::new(left));
    run.stores.replace("/", Arc::new(Failing { inner: LocalFileSystem::new(), left: counter.clone() }));
    run.output = run.stores.open("out").unwrap();
    let mut flow = Flow::default();
    let gone = async {
        flow.go(&run, None).await?;
        let folder = flow.dataset().expect("it went to the end").publish(&run).await?;
        Ok(PathBuf::from(folder.url()))
    };
    let result = gone.await;
    (result, left - counter.load(Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_fails_at_any_operation_ends_in_an_error_and_the_next_run_in_the_same_bytes() {
    let undisturbed = Project::new(1);
    let (folder, operations) = run(&undisturbed, 0).await;
    let want = packed(&folder.unwrap());
    assert!(operations > 50, "{operations}");

    // a fresh start each time: every operation of a whole run fails once
    for k in 1..=operations {
        let project = Project::new(1);
        let (result, _) = run(&project, k).await;
        match result {
            // the operation may be one that is allowed to fail; then the result is right
            Ok(folder) => assert!(packed(&folder) == want, "operation {k}"),
            Err(error) => assert_eq!(error.exit_code(), 4, "operation {k}: {error:?}"),
        }
        let (folder, _) = run(&project, 0).await;
        assert!(packed(&folder.unwrap()) == want, "after operation {k}");
    }
}

//! A Ballista cluster that performs a run's heavy tasks. The scheduler and the executors are this binary,
//! too.
//!
//! ```text
//! run ── select lengthwise_task('{…}') ──▶ scheduler ──▶ executor ── reads and writes ──▶ object storage
//!  ▲                                                        │
//!  └────────────── {"ok": what was written} ◀───────────────┘
//! ```
//!
//! A task is a query of one stage with one partition and no shuffle, so that a lost executor cannot make its
//! result wrong: Ballista 55 hangs or miscounts if an executor is lost during a shuffle. The files that a
//! task writes have names that belong to it alone, and its answer contains their digests. A task may
//! therefore be performed twice, even at the same time, and whatever was running when an executor died is
//! performed again. The driver sees no document and no id.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arrow::array::AsArray;
use arrow::datatypes::DataType;
use ballista::prelude::SessionContextExt;
use ballista_core::config::TaskSchedulingPolicy;
use ballista_core::registry::BallistaFunctionRegistry;
use ballista_core::utils::default_session_builder;
use ballista_executor::executor_process::{ExecutorProcessConfig, start_executor_process};
use ballista_scheduler::cluster::BallistaCluster;
use ballista_scheduler::config::{SchedulerConfig, TaskDistributionPolicy};
use ballista_scheduler::scheduler_process::start_server;
use datafusion::common::ScalarValue;
use datafusion::error::DataFusionError;
use datafusion::execution::{FunctionRegistry, SessionStateBuilder};
use datafusion::logical_expr::{ColumnarValue, ScalarUDF, Signature, SimpleScalarUDF, Volatility, lit};
use datafusion::prelude::SessionContext;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::OnceCell;

use crate::hash::Digest;
use crate::output::Output;
use crate::progress::{Progress, Rarely};
use crate::sql::engine::Engine;
use crate::storage::{Location, Stores};
use crate::tasks::{Task, Worker};
use crate::{Error, Result};

/// How many tasks the scheduler has at a time. It gives them to executors as these have free slots.
pub const TASKS_AT_A_TIME: usize = 256;

/// A task of more bytes is passed through storage.
const MESSAGE_BYTES: usize = 64 << 10;

/// How many times a task is given to the cluster before the run fails.
const ATTEMPTS: u32 = 5;

/// If no task at all ends for this long, those that are running are given out again.
const STALLED: Duration = Duration::from_secs(30 * 60);

/// In seconds. The scheduler forgets an executor that has sent no heartbeat for this long, and gives its
/// tasks to others.
const EXECUTOR_TIMEOUT: u64 = 15;
/// In seconds: how often an executor sends a heartbeat, and how often the scheduler looks for lost ones.
const HEARTBEAT: u64 = 3;

/// The name of the SQL function that performs a task.
const FUNCTION: &str = "lengthwise_task";

/// What an executor answers.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Ok(Output),
    /// A file that the task needs was broken, and is withdrawn.
    Withdrawn {
        url: String,
    },
    Err {
        code: u8,
        message: String,
        help: Option<String>,
    },
}

/// Identifies the sources that this program was built from. Another build may perform a task differently.
const BUILD: &str = env!("LENGTHWISE_SOURCES");

/// A message, and the build that sent it.
#[derive(Serialize, Deserialize)]
struct Sent<M> {
    build: String,
    message: M,
}

/// How a task is sent.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Message<T> {
    Task(T),
    /// The task is in storage, at this URL.
    At(String),
}

/// A run's connection to its cluster.
pub struct Cluster {
    url: String,
    output: Location,
    stop: Arc<AtomicBool>,
    session: OnceCell<SessionContext>,
    /// When a task ended last.
    ended: Mutex<Instant>,
    /// Limits warnings: if many tasks fail at once, only one is reported.
    warnings: Rarely,
}

impl Cluster {
    /// A connection to the scheduler at `df://host:port`. It is opened by the first task.
    pub fn new(url: &str, output: &Location, stop: &Arc<AtomicBool>) -> Self {
        Self {
            url: url.to_owned(),
            output: output.clone(),
            stop: stop.clone(),
            session: OnceCell::new(),
            ended: Mutex::new(Instant::now()),
            warnings: Rarely::new(Duration::from_secs(1)),
        }
    }

    /// Performs a task on an executor, and on another one if that is lost.
    ///
    /// # Errors
    /// The task's own error, or [`Error::Cluster`] if the cluster fails to perform it again and again.
    pub async fn perform(&self, task: &Task) -> Result<Output> {
        let text = json(task);
        let stored = (text.len() > MESSAGE_BYTES).then(|| {
            // a name of this process alone: another run may have the same task
            let (task, now) = (Digest::of(text.as_bytes()), std::time::SystemTime::now());
            let name = format!("{task} {} {now:?}", std::process::id());
            self.output.join("tasks").join(&format!("{}.json", Digest::of(name.as_bytes()).short()))
        });
        let message = match &stored {
            Some(at) => {
                at.put(text).await?;
                Message::At(at.url())
            }
            None => Message::Task(task),
        };
        let message = json(&Sent { build: BUILD.to_owned(), message });
        let mut attempt = 1;
        let output = loop {
            let failed = match self.attempt(&message).await {
                Ok(Answer::Ok(output)) => break output,
                Ok(Answer::Withdrawn { url }) => Error::Withdrawn { url },
                Ok(Answer::Err { code, message, help }) => Error::Remote { code, message, help },
                Err(message) => Error::Cluster { url: self.url.clone(), message },
            };
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Stopped);
            }
            // storage or the cluster may recover (4), and an executor that was told to stop is not the only
            // one (75)
            if attempt == ATTEMPTS || !matches!(failed.exit_code(), 4 | 75) {
                return Err(failed);
            }
            if self.warnings.is_time() {
                tracing::warn!("a task failed, and is given out again: {failed}");
            }
            tokio::time::sleep(Duration::from_secs(1 << attempt)).await;
            attempt += 1;
        };
        *self.ended.lock().expect("no panic while held") = Instant::now();
        if let Some(at) = stored {
            at.delete().await?;
        }
        Ok(output)
    }

    /// Sends a task and waits for its answer, but no longer than [`Self::stalled`] allows.
    async fn attempt(&self, message: &str) -> Result<Answer, String> {
        let began = Instant::now();
        tokio::select! {
            answer = self.ask(message) => answer.map_err(|e| e.to_string()),
            () = self.stalled(began) => Err(format!("nothing was done for {} minutes", STALLED.as_secs() / 60)),
        }
    }

    /// Returns when no task has ended for too long.
    async fn stalled(&self, began: Instant) {
        loop {
            let since = began.max(*self.ended.lock().expect("no panic while held"));
            match STALLED.checked_sub(since.elapsed()) {
                Some(left) => tokio::time::sleep(left).await,
                None => return,
            }
        }
    }

    async fn ask(&self, message: &str) -> Result<Answer, DataFusionError> {
        let connect = async || {
            let state = SessionStateBuilder::new().with_default_features().build();
            SessionContext::remote_with_state(&self.url, state).await
        };
        let session = self.session.get_or_try_init(connect).await?;
        let asked = session.read_empty()?.select(vec![function(None).call(vec![lit(message)])])?;
        let rows = asked.collect().await?;
        let answers: Vec<&str> = rows
            .iter()
            .filter_map(|batch| batch.column(0).as_string_opt::<i32>())
            .flat_map(|column| column.iter().flatten())
            .collect();
        // there must be one answer: a lost executor may have caused none, or two
        let [answer] = answers[..] else {
            return Err(DataFusionError::Execution(format!("a task gave {} answers", answers.len())));
        };
        serde_json::from_str(answer).map_err(|e| DataFusionError::Execution(e.to_string()))
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain values")
}

/// The SQL function that performs a task. Only the executor that calls it needs a worker.
fn function(here: Option<(Arc<Worker>, Handle)>) -> ScalarUDF {
    let call = move |arguments: &[ColumnarValue]| {
        let Some((worker, runtime)) = &here else {
            return Err(DataFusionError::Execution(format!("{FUNCTION} is for executors")));
        };
        let [ColumnarValue::Scalar(ScalarValue::Utf8(Some(message)))] = arguments else {
            return Err(DataFusionError::Execution(format!("{FUNCTION} takes one text")));
        };
        let (message, worker, runtime) = (message.clone(), worker.clone(), runtime.clone());
        // a thread of its own: this one belongs to the runtime in which executors run queries
        let work = std::thread::spawn(move || runtime.block_on(answer_to(&message, &worker)));
        let answer = work.join().map_err(|_| DataFusionError::Execution("a task panicked".into()))?;
        Ok(ColumnarValue::Scalar(ScalarValue::Utf8(Some(json(&answer)))))
    };
    // volatile, so that it is not called while the query is planned
    let signature = Signature::exact(vec![DataType::Utf8], Volatility::Volatile);
    SimpleScalarUDF::new_with_signature(FUNCTION, signature, DataType::Utf8, Arc::new(call)).into()
}

/// Returns when this process is to stop.
async fn stopped(stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn answer_to(message: &str, worker: &Worker) -> Answer {
    let work = async {
        let unknown = |e: serde_json::Error| {
            let help = "run, scheduler and executors have to be the same version of lengthwise";
            Error::data(format!("a task that this executor doesn't know: {e}"), help)
        };
        let sent: Sent<serde_json::Value> = serde_json::from_str(message).map_err(unknown)?;
        if sent.build != BUILD {
            // an error that is retried: the next executor may be of the run's build
            let url = "an executor".to_owned();
            let message = "it is another build of lengthwise than the run; their tasks may differ".to_owned();
            return Err(Error::Cluster { url, message });
        }
        let task: Task = match serde_json::from_value(sent.message).map_err(unknown)? {
            Message::Task(task) => task,
            Message::At(url) => {
                serde_json::from_slice(&worker.stores.open(&url)?.read().await?).map_err(unknown)?
            }
        };
        task.perform(worker, &Progress::none().stage("task", 0)).await
    };
    let done = tokio::select! {
        done = work => done,
        () = stopped(&worker.stop) => Err(Error::Stopped),
    };
    match done {
        Ok(output) => Answer::Ok(output),
        Err(Error::Withdrawn { url }) => Answer::Withdrawn { url },
        Err(error) => {
            let help = miette::Diagnostic::help(&error).map(|help| help.to_string());
            Answer::Err { code: error.exit_code(), message: error.in_a_line(), help }
        }
    }
}

/// Where a scheduler or an executor listens.
pub struct Address {
    /// The host by which others reach it.
    pub host: String,
    pub port: u16,
}

impl Address {
    fn name(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// The address to listen on: the loopback interface if the host is local, so that only this machine can
    /// connect; otherwise all interfaces.
    fn bind(&self) -> &'static str {
        if self.host == "localhost" || self.host == "127.0.0.1" { "127.0.0.1" } else { "0.0.0.0" }
    }
}

/// Runs a scheduler until a signal says to stop.
pub async fn schedule(place: Address) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::Cluster { url: place.name(), message: e.to_string() };
    let config = SchedulerConfig {
        external_host: place.host.clone(),
        bind_host: place.bind().to_owned(),
        bind_port: place.port,
        scheduling_policy: TaskSchedulingPolicy::PushStaged,
        task_distribution: TaskDistributionPolicy::RoundRobin,
        executor_timeout_seconds: EXECUTOR_TIMEOUT,
        no_executors_grace_period_seconds: EXECUTOR_TIMEOUT,
        expire_dead_executor_interval_seconds: HEARTBEAT,
        finished_job_data_clean_up_interval_seconds: 60,
        finished_job_state_clean_up_interval_seconds: 60,
        override_session_builder: Some(Arc::new(|config| {
            let mut state = default_session_builder(config)?;
            state.register_udf(Arc::new(function(None)))?;
            Ok(state)
        })),
        ..Default::default()
    };
    let address = format!("{}:{}", place.bind(), place.port).parse().map_err(|e| failed(&e))?;
    tracing::info!("scheduler at {}", place.name());
    let cluster = BallistaCluster::new_from_config(&config).await.map_err(|e| failed(&e))?;
    start_server(cluster, address, Arc::new(config)).await.map_err(|e| failed(&e))
}

/// Runs an executor until a signal says to stop. It performs as many tasks at a time as `engine` has
/// partitions. When it stops, running tasks end early, and other executors perform them. `spool` is a folder
/// with room for source files.
pub async fn execute(
    place: Address,
    scheduler: Address,
    stores: Stores,
    engine: Engine,
    spool: Option<&str>,
    stop: Arc<AtomicBool>,
) -> Result<()> {
    let failed = |message: String| Error::Cluster { url: scheduler.name(), message };
    let slots = engine.partitions;
    tracing::info!("executor at {} for {}: {slots} tasks at a time", place.name(), scheduler.name());
    let engine = Arc::new(engine);
    let work_dir = tempfile::tempdir()
        .map_err(|source| Error::Io { doing: "cannot make a temporary folder".into(), source })?;
    let worker = Arc::new(Worker::new(stores, spool, engine.clone(), stop));
    let mut functions = BallistaFunctionRegistry::default();
    let own = Arc::new(function(Some((worker, Handle::current()))));
    functions.scalar_functions.insert(FUNCTION.into(), own);
    let config = ExecutorProcessConfig {
        bind_host: place.bind().to_owned(),
        external_host: Some(place.host.clone()),
        port: place.port,
        grpc_port: place.port + 1,
        scheduler_host: scheduler.host.clone(),
        scheduler_port: scheduler.port,
        scheduler_connect_timeout_seconds: EXECUTOR_TIMEOUT as u16,
        vcores: slots,
        task_scheduling_policy: TaskSchedulingPolicy::PushStaged,
        work_dir: work_dir.path().to_str().map(str::to_owned),
        executor_heartbeat_interval_seconds: HEARTBEAT,
        override_function_registry: Some(Arc::new(functions)),
        ..Default::default()
    };
    start_executor_process(Arc::new(config)).await.map_err(|e| failed(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_executor_of_another_build_leaves_a_task_to_others() {
        let stores = Stores::new("/");
        let engine = Arc::new(Engine::new(1, 1 << 20, None).unwrap());
        let worker = Worker::new(stores, None, engine, Arc::default());
        // the message is not a task, to show that the build is checked first
        for (build, code, says) in [("another", 4, "another build"), (BUILD, 3, "doesn't know")] {
            let sent = Sent { build: build.to_owned(), message: "a task" };
            let Answer::Err { code: got, message, .. } = answer_to(&json(&sent), &worker).await else {
                panic!("{build}: it was done");
            };
            assert_eq!(got, code);
            assert!(message.contains(says), "{message}");
        }
    }
}

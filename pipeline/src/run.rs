//! One run: its conf, the places where it reads and writes, and the function that finds or computes a stage's
//! output.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use arrow::util::pretty::pretty_format_batches;
use datafusion::prelude::SessionContext;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::conf::Conf;
use crate::executor::Executor;
#[cfg(feature = "cluster")]
use crate::executor::ballista::Cluster;
use crate::output::{self, Draft, Ingredients, Manifest, Output, Published};
use crate::progress::Progress;
use crate::sql::engine::{Engine, query};
use crate::sql::{Files, StageSql};
use crate::stage::Stage;
use crate::stop::check_stop;
use crate::storage::{Location, Stores};
use crate::tasks::Worker;
use crate::{Error, Result};

/// What to do about a stage whose output does not exist.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Compute it. From the stage `from` on, compute it even if it exists, and compare.
    Compute { from: Option<Stage> },
    /// Compute nothing: return [`Error::Absent`].
    Look,
}

/// What a run did about one stage, for the run's manifest and the report.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Step {
    /// The stage's name; of an evaluation, `eval NAME`.
    pub stage: String,
    /// The stage's key.
    pub key: String,
    /// Whether its output was there already.
    pub cached: bool,
    /// How long it took.
    pub seconds: f64,
    /// The time when the stage ended, in RFC 3339.
    #[serde(default)]
    pub ended: String,
    /// What was counted.
    pub counts: BTreeMap<String, u64>,
    #[serde(skip)]
    pub ingredients: Ingredients,
}

/// A run under way.
pub struct Run {
    pub conf: Conf,
    /// The path of the conf, for messages.
    pub conf_file: String,
    pub files: Files,
    /// Paths of the checks, by stage.
    checks: BTreeMap<&'static str, Vec<String>>,
    pub stores: Stores,
    pub output: Location,
    /// Locations that are not read as sources even if a source's URL covers them: the output, and the output
    /// of a run that is reproduced.
    pub outputs: Vec<Location>,
    pub engine: Arc<Engine>,
    pub executor: Executor,
    pub progress: Progress,
    /// The stop flag: SIGTERM and SIGINT set it, and hot loops check it.
    pub stop: Arc<AtomicBool>,
    /// Whether the run is training, so that a stop waits for a checkpoint.
    pub training: AtomicBool,
    pub goal: Goal,
    /// When the run began, by the machine's clock.
    pub started: jiff::Timestamp,
    /// When the run began, by the monotonic clock.
    clock: Instant,
    pub steps: Mutex<Vec<Step>>,
    /// The SQL texts that were used, by path.
    pub sql: Mutex<BTreeMap<String, String>>,
}

impl Run {
    pub fn new(conf: Conf, conf_file: &str, files: Files, goal: Goal) -> Result<Self> {
        let checks = files.checks()?;
        let stores = Stores::new(std::path::absolute(&files.root).unwrap_or(files.root.clone()));
        let output = stores.open(&conf.run.output);
        let output = output.map_err(|e| conf.names_wrong(&["run", "output"], e))?;
        if output.store_url().scheme() == "memory" {
            let help = "name a folder, or storage: s3://bucket/…, gs://…, az://…".to_owned();
            let message = "what is written to memory is gone when this command ends";
            return Err(conf.wrong(&["run", "output"], message, "written here", Some(help)));
        }
        if let (Goal::Compute { .. }, Some(all)) = (goal, machine_memory(Path::new("/")))
            && conf.engine.memory.0 > all
        {
            let message =
                format!("queries may take more memory than the {} MB that there are", all / 1_000_000);
            let help = "what doesn't fit spills to disk; leave room for what isn't a query, too".to_owned();
            return Err(conf.wrong(&["engine", "memory"], message, "set here", Some(help)));
        }
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let engine = Engine::new(
            conf.engine.partitions.unwrap_or(cores),
            conf.engine.memory.0,
            conf.engine.spill.as_deref(),
        )
        .map_err(|e| match &conf.engine.spill {
            Some(_) => {
                conf.wrong(&["engine", "spill"], e.to_string(), "a folder that can be written to", None)
            }
            None => e,
        })?;
        let engine = Arc::new(engine);
        let stop: Arc<AtomicBool> = Arc::default();
        let executor = Executor {
            here: Worker::new(stores.clone(), conf.engine.spill.as_deref(), engine.clone(), stop.clone()),
            #[cfg(feature = "cluster")]
            cluster: conf.engine.url.as_deref().map(|url| Cluster::new(url, &output, &stop)),
        };
        #[cfg(not(feature = "cluster"))]
        if conf.engine.url.is_some() {
            let help = "build with the feature `cluster`, or leave the key out";
            let message = "this build of lengthwise knows no clusters";
            return Err(conf.wrong(&["engine", "url"], message, "asked for here", Some(help.into())));
        }
        Ok(Self {
            conf,
            conf_file: conf_file.to_owned(),
            files,
            checks,
            stores,
            outputs: vec![output.clone()],
            output,
            engine,
            executor,
            progress: Progress::stderr(),
            stop,
            training: AtomicBool::new(false),
            goal,
            started: jiff::Timestamp::now(),
            clock: Instant::now(),
            steps: Mutex::default(),
            sql: Mutex::default(),
        })
    }

    /// Returns an error once a stop was requested.
    ///
    /// # Errors
    /// [`Error::Stopped`] if the stop flag is set.
    pub fn check_stop(&self) -> Result<()> {
        check_stop(&self.stop)
    }

    /// Lets the run begin now rather than when its conf was read.
    pub fn begin(&mut self) {
        (self.started, self.clock) = (jiff::Timestamp::now(), Instant::now());
        self.steps = Mutex::default();
    }

    /// The seconds since the run began.
    pub fn seconds(&self) -> f64 {
        self.clock.elapsed().as_secs_f64()
    }

    /// Reads and parses a stage's SQL, and records its text.
    pub fn stage_sql(&self, name: &str) -> Result<StageSql> {
        let file = format!("sql/stages/{name}.sql");
        let text = self.files.stage(&file)?;
        let sql = StageSql::parse(&file, &text)?;
        self.sql.lock().expect("no panic while held").insert(file, text);
        Ok(sql)
    }

    /// The parameters that checks may use, by name.
    fn parameters_of_checks(&self) -> BTreeMap<&'static str, i64> {
        let mixture = &self.conf.mixture;
        BTreeMap::from([
            ("budget", mixture.budget.0 as i64),
            ("long_tokens", mixture.long_tokens.0 as i64),
            ("max_span", mixture.max_span.0 as i64),
            ("max_copies", mixture.max_copies as i64),
        ])
    }

    /// Runs a stage's checks over the tables of a session. Each check is a SELECT that returns the wrong
    /// rows, so it has to return none.
    ///
    /// # Errors
    /// [`Error::Data`] if a check returns rows; the stage is not published then.
    pub async fn check(&self, stage: Stage, session: &SessionContext) -> Result<()> {
        let parameters = self.parameters_of_checks();
        for file in self.checks.get(stage.name()).into_iter().flatten() {
            let sql = StageSql::parse(file, &self.files.stage(file)?)?;
            let doing = format!("cannot run the check {file}");
            let frame = sql.plan(session, &parameters).await?;
            let frame = frame.limit(0, Some(5)).map_err(|e| query(&doing, e))?;
            let wrong = frame.collect().await.map_err(|e| query(&doing, e))?;
            if wrong.iter().any(|batch| batch.num_rows() > 0) {
                let rows =
                    pretty_format_batches(&wrong).map_or_else(|e| e.to_string(), |table| table.to_string());
                let message = format!("{file} found rows that should not be:\n{rows}");
                return Err(Error::data(
                    message,
                    "the file says what its rows are; the stage was not published",
                ));
            }
        }
        Ok(())
    }

    /// The key of a stage's output and its folder; adds the stage's checks to its ingredients.
    pub fn place(&self, stage: Stage, ingredients: &mut Ingredients) -> Result<(String, Location)> {
        // other checks or other parameters give another key, because the existing output has not passed them
        let parameters = self.parameters_of_checks();
        let mut checks = vec![];
        for file in self.checks.get(stage.name()).into_iter().flatten() {
            let text = self.files.stage(file)?;
            let sql = StageSql::parse(file, &text)?;
            let used = sql.parameters();
            let values: BTreeMap<_, _> =
                parameters.iter().filter(|(name, _)| used.contains(**name)).collect();
            checks.push(serde_json::json!([sql.key, values]));
            self.sql.lock().expect("no panic while held").insert(file.clone(), text);
        }
        if !checks.is_empty() {
            ingredients.insert("checks".into(), serde_json::json!(checks));
        }
        let key = output::key(stage.name(), ingredients);
        let folder = self.output.join("stages").join(stage.name()).join(&key);
        Ok((key, folder))
    }

    /// Finds the output of a stage by the hash of its ingredients, or computes and publishes it.
    pub async fn obtain(
        &self,
        stage: Stage,
        mut ingredients: Ingredients,
        compute: impl AsyncFnOnce(&Draft) -> Result<Output>,
    ) -> Result<Published> {
        let place = self.place(stage, &mut ingredients)?;
        let before = self.steps.lock().expect("no panic while held").len();
        let mut published = obtain(stage, self.goal, &self.stop, place, ingredients, compute).await?;
        // stages that this one needed have recorded their own seconds
        let within = |steps: &[Step]| steps.iter().map(|step| step.seconds).sum::<f64>();
        published.seconds -= within(&self.steps.lock().expect("no panic while held")[before..]);
        self.did(stage.name(), &published);
        Ok(published)
    }

    /// Records what the run did about a stage.
    pub fn did(&self, name: &str, published: &Published) {
        let Published { manifest, cached, seconds, .. } = published;
        self.steps.lock().expect("no panic while held").push(Step {
            stage: name.to_owned(),
            key: manifest.key.clone(),
            cached: *cached,
            seconds: *seconds,
            ended: jiff::Timestamp::now().to_string(),
            counts: manifest.counts.clone(),
            ingredients: manifest.ingredients.clone(),
        });
    }
}

/// Finds the output of a stage by its key and folder, or computes and publishes it.
///
/// # Errors
/// [`Error::Absent`] if it does not exist and `goal` is [`Goal::Look`]; [`Error::Stopped`] if a stop was
/// requested.
pub async fn obtain(
    stage: Stage,
    goal: Goal,
    stop: &AtomicBool,
    (key, folder): (String, Location),
    ingredients: Ingredients,
    compute: impl AsyncFnOnce(&Draft) -> Result<Output>,
) -> Result<Published> {
    let started = Instant::now();
    let again = matches!(goal, Goal::Compute { from: Some(from) } if stage >= from);
    let found = output::find(&folder).await?;
    let (manifest, cached) = match (found, goal) {
        (Some(manifest), _) if !again => (manifest, true),
        (_, Goal::Look) => return Err(Error::Absent { stage: stage.name(), key, ingredients }),
        _ => {
            check_stop(stop)?;
            tracing::info!("{}: computing {key}", stage.name());
            let draft = Draft::begin(folder.clone(), again).await?;
            let Output { tables, counts, notes } = compute(&draft).await?;
            let manifest = Manifest { stage: stage.name().into(), key, ingredients, tables, counts, notes };
            output::publish(&folder, &manifest).await?;
            (manifest, false)
        }
    };
    let seconds = started.elapsed().as_secs_f64();
    Ok(Published { manifest: Arc::new(manifest), folder, cached, seconds })
}

/// How many bytes of memory this process may use: the machine's memory or the limit of its cgroup, whichever
/// is smaller. `root` is `/`; tests pass another folder.
pub fn machine_memory(root: &Path) -> Option<u64> {
    // on a system without these files no limit is known, and nothing is refused
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    let kilobytes = read("proc/meminfo")?
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok())?;
    let limits = ["sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limits = limits.into_iter().filter_map(|path| read(path)?.trim().parse().ok());
    limits.chain([kilobytes << 10]).min()
}

/// A stage's ingredients: its version and the given pairs of name and value.
pub fn ingredients<const N: usize>(stage: Stage, list: [(&str, Value); N]) -> Ingredients {
    let version = ("version", stage.about().version.into());
    list.into_iter().chain([version]).map(|(name, value)| (name.to_owned(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_that_there_is_is_the_machine_s_or_what_a_container_may_have() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert_eq!(machine_memory(root.path()), None);
        write("proc/meminfo", "MemTotal:       1000 kB\nMemFree:        10 kB\n");
        assert_eq!(machine_memory(root.path()), Some(1_024_000));
        write("sys/fs/cgroup/memory.max", "max\n");
        assert_eq!(machine_memory(root.path()), Some(1_024_000));
        write("sys/fs/cgroup/memory.max", "5000\n");
        assert_eq!(machine_memory(root.path()), Some(5000));
    }
}

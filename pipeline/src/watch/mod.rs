//! Monitoring of unattended runs: a Prometheus text file, OpenLineage events, OpenTelemetry traces and
//! metrics, and a summary line at the end.
//!
//! ```text
//! LENGTHWISE_METRICS=FILE           rewritten during the run and at its end, for node_exporter's textfile collector
//! OPENLINEAGE_URL=URL               events when a run begins, when a stage has been computed, and when the run ends
//! OTEL_EXPORTER_OTLP_ENDPOINT=URL   a span per run and per computed stage; the file's numbers as metrics
//! ```
//!
//! A receiver that does not answer costs a warning, not the run.

mod lineage;
mod otlp;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;

use crate::error::chain;
use crate::hash::{Digest, hex};
use crate::run::{Run, Step};
use crate::storage::environment::variable;
use crate::{Error, Result};

use lineage::Lineage;
use otlp::Telemetry;

/// How often the file is rewritten and stages that have ended are reported.
const EVERY: Duration = Duration::from_secs(5);

/// The timeout of a request to a receiver.
const PATIENCE: Duration = Duration::from_secs(5);

/// The receivers of a run's progress.
pub struct Watch {
    metrics: Option<PathBuf>,
    lineage: Option<Lineage>,
    telemetry: Option<Telemetry>,
    /// How many steps have been reported.
    reported: usize,
}

impl Watch {
    /// Reads the receivers from environment variables.
    ///
    /// # Errors
    /// If a variable has a value that cannot be used.
    pub fn new() -> Result<Self> {
        Ok(Self {
            metrics: variable("LENGTHWISE_METRICS")?.map(PathBuf::from),
            lineage: Lineage::new()?,
            telemetry: Telemetry::new()?,
            reported: 0,
        })
    }

    /// Reports on a run while `work` performs it, and returns the result of `work`.
    pub async fn during<T>(&mut self, run: &Run, work: impl Future<Output = Result<T>>) -> Result<T> {
        if let Some(lineage) = &mut self.lineage {
            lineage.begun(run).await;
        }
        let mut work = std::pin::pin!(work);
        let done = loop {
            tokio::select! {
                done = &mut work => break done,
                () = tokio::time::sleep(EVERY) => self.refresh(run, None).await,
            }
        };
        let error = done.as_ref().err();
        self.refresh(run, Some(error)).await;
        if let Some(lineage) = &mut self.lineage {
            lineage.ended(run, error).await;
        }
        if let Some(telemetry) = &mut self.telemetry {
            telemetry.ended(run, error).await;
        }
        done
    }

    /// Rewrites the file, and reports the stages that have ended since the last call. `ended` is `Some` once
    /// the run has ended, with its error if it failed.
    async fn refresh(&mut self, run: &Run, ended: Option<Option<&Error>>) {
        let steps = run.steps.lock().expect("no panic while held").clone();
        let gauges = gauges(&steps, run.seconds(), ended);
        if let Some(path) = &self.metrics {
            let text = prometheus(&run.conf.run.name, &gauges);
            if let Err(error) = rewrite(path, text) {
                tracing::warn!("cannot write the metrics to {}: {error}", path.display());
                self.metrics = None;
            }
        }
        // after a broken output the steps start over
        self.reported = self.reported.min(steps.len());
        // stages that were cached are not reported
        let new = || steps[self.reported..].iter().filter(|step| !step.cached);
        if let Some(lineage) = &mut self.lineage {
            for step in new() {
                lineage.computed(run, step, &steps).await;
            }
        }
        if let Some(telemetry) = &mut self.telemetry {
            telemetry.computed(run, new()).await;
            telemetry.measured(run, &gauges).await;
        }
        self.reported = steps.len();
    }
}

/// Writes the Prometheus file of a run that is refused before it begins.
pub fn refused(conf_file: &str, error: &Error) {
    let Ok(Some(path)) = variable("LENGTHWISE_METRICS") else { return };
    let text = prometheus(conf_file, &gauges(&[], 0.0, Some(Some(error))));
    if let Err(error) = rewrite(path.as_ref(), text) {
        tracing::warn!("cannot write the metrics to {path}: {error}");
    }
}

/// Replaces a file by renaming a new one, so that no reader sees half of it.
fn rewrite(path: &Path, text: String) -> std::io::Result<()> {
    let beside = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&beside, text).and_then(|()| std::fs::rename(&beside, path))
}

/// A Prometheus gauge, and a metric of OpenTelemetry.
struct Gauge {
    name: &'static str,
    help: &'static str,
    /// The values, each with its labels.
    samples: Vec<(Labels, f64)>,
}

type Labels = Vec<(&'static str, String)>;

/// The gauges of a run. `ended` is `Some` once the run has ended, with its error if it failed.
fn gauges(steps: &[Step], seconds: f64, ended: Option<Option<&Error>>) -> Vec<Gauge> {
    let now = Timestamp::now().as_second() as f64;
    let of_run = |name, help, value| Gauge { name, help, samples: vec![(vec![], value)] };
    let mut gauges = vec![
        of_run("run_seconds", "How long the run has taken.", seconds),
        of_run("run_updated_timestamp_seconds", "When this was written.", now),
    ];
    if let Some(error) = ended {
        let help = "How the run ended, as documented; absent while it goes.";
        gauges.push(of_run("run_exit_code", help, error.map_or(0, Error::exit_code).into()));
    }
    // `pack` has two outputs, for training and held out: their numbers are summed
    let mut stages: Vec<(&str, f64, bool, BTreeMap<&str, u64>)> = vec![];
    for step in steps {
        if stages.iter().all(|(stage, ..)| *stage != step.stage) {
            stages.push((&step.stage, 0.0, true, BTreeMap::new()));
        }
        let (_, seconds, cached, counts) =
            stages.iter_mut().find(|(stage, ..)| *stage == step.stage).expect("it is there now");
        *seconds += step.seconds;
        *cached &= step.cached;
        for (name, count) in &step.counts {
            *counts.entry(name).or_default() += count;
        }
    }
    let stage = |stage: &str| ("stage", stage.to_owned());
    gauges.push(Gauge {
        name: "stage_seconds",
        help: "How long a stage took to find or to compute.",
        samples: stages.iter().map(|(name, seconds, ..)| (vec![stage(name)], *seconds)).collect(),
    });
    gauges.push(Gauge {
        name: "stage_cached",
        help: "1 where a stage's output was there.",
        samples: stages
            .iter()
            .map(|(name, _, cached, _)| (vec![stage(name)], f64::from(u8::from(*cached))))
            .collect(),
    });
    let counts = stages.iter().flat_map(|(name, _, _, counts)| {
        let sample =
            move |(count, n): (&&str, &u64)| (vec![stage(name), ("count", (*count).to_owned())], *n as f64);
        counts.iter().map(sample)
    });
    gauges.push(Gauge {
        name: "stage_count",
        help: "What a stage counted: documents, tokens, rejects, ...",
        samples: counts.collect(),
    });
    gauges
}

/// The gauges in Prometheus's text format.
fn prometheus(run: &str, gauges: &[Gauge]) -> String {
    let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let run = quoted(run);
    let mut text = String::new();
    for Gauge { name, help, samples } in gauges {
        text += &format!("# HELP lengthwise_{name} {help}\n# TYPE lengthwise_{name} gauge\n");
        for (labels, value) in samples {
            let labels: String =
                labels.iter().map(|(label, value)| format!(",{label}=\"{}\"", quoted(value))).collect();
            text += &format!("lengthwise_{name}{{run=\"{run}\"{labels}}} {value}\n");
        }
    }
    text
}

/// The line that summarises the run at the end of the log.
pub fn summary(run: &Run, folder: Option<&str>) -> String {
    let steps = run.steps.lock().expect("no panic while held");
    let computed = steps.iter().filter(|step| !step.cached).count();
    let counted = |name: &str| {
        let counts = steps.iter().filter_map(|step| step.counts.get(name));
        indicatif::HumanCount(counts.copied().max().unwrap_or(0))
    };
    format!(
        "done in {:.1} s: {computed} of {} stages computed, {} documents, {} rejects, {} sequences{}",
        run.seconds(),
        steps.len(),
        counted("documents"),
        counted("rejects"),
        counted("sequences"),
        folder.map_or(String::new(), |folder| format!(", {folder}")),
    )
}

/// An id of this attempt at a run, or of a stage in it if `key` is not empty.
fn id(run: &Run, key: &str) -> [u8; 16] {
    let text = format!("{} {} {} {key}", run.conf.run.name, run.started.as_nanosecond(), std::process::id());
    Digest::of(text.as_bytes()).0[..16].try_into().expect("16 of 32 bytes")
}

/// The times when a stage's computation began and ended.
fn span(step: &Step) -> (Timestamp, Timestamp) {
    let ended: Timestamp = step.ended.parse().unwrap_or_else(|_| Timestamp::now());
    (ended - jiff::SignedDuration::try_from_secs_f64(step.seconds).unwrap_or_default(), ended)
}

/// An HTTP endpoint that JSON is posted to.
struct Listener {
    /// The environment variable that holds the URL.
    variable: &'static str,
    url: String,
    headers: HeaderMap,
    client: reqwest::Client,
    /// Whether a failure was logged already.
    unreachable: bool,
}

impl Listener {
    fn new(variable: &'static str, url: String, headers: Vec<(HeaderName, HeaderValue)>) -> Self {
        let headers = headers.into_iter().collect();
        Self { variable, url, headers, client: reqwest::Client::new(), unreachable: false }
    }

    async fn send(&mut self, path: &str, what: &Value) {
        let request = self.client.post(format!("{}{path}", self.url)).timeout(PATIENCE);
        let request = request.header("content-type", "application/json").headers(self.headers.clone());
        let request = request.body(what.to_string());
        let response = request.send().await.and_then(reqwest::Response::error_for_status);
        if let Err(error) = response
            && !std::mem::replace(&mut self.unreachable, true)
        {
            // the URL may contain a password
            let error = error.without_url();
            let why = chain(&error).collect::<Vec<_>>().join(": ");
            tracing::warn!("nobody is told of this run: {} names what does not answer: {why}", self.variable);
        }
    }
}

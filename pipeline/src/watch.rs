//! What monitoring sees of a run that nobody watches: a Prometheus text file, OpenLineage events, and a line at its end.
//!
//! ```text
//! LENGTHWISE_METRICS=FILE    rewritten while the run goes and at its end, for node_exporter's textfile collector
//! OPENLINEAGE_URL=URL        an event when a run begins, when a stage has ended, and when the run has
//! ```
//!
//! Whoever doesn't listen costs a warning, not the run.

use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::hash::Digest;
use crate::run::{Run, Step};
use crate::stages::upstream;
use crate::{Error, Result};

/// How often the file is rewritten and stages that have ended are told.
const EVERY: Duration = Duration::from_secs(5);

/// How long an event may take to be heard.
const PATIENCE: Duration = Duration::from_secs(5);

const PRODUCER: &str = concat!("lengthwise/", env!("CARGO_PKG_VERSION"));

/// Who is told.
pub struct Watch {
    started: Timestamp,
    metrics: Option<PathBuf>,
    lineage: Option<Lineage>,
    /// Steps that lineage was told of.
    told: usize,
}

impl Watch {
    /// As the environment says.
    pub fn new(started: Timestamp) -> Self {
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            started,
            metrics: set("LENGTHWISE_METRICS").map(PathBuf::from),
            lineage: set("OPENLINEAGE_URL").map(|url| Lineage {
                url: format!("{}/api/v1/lineage", url.trim_end_matches('/')),
                key: set("OPENLINEAGE_API_KEY"),
                namespace: set("OPENLINEAGE_NAMESPACE").unwrap_or_else(|| "lengthwise".into()),
                client: reqwest::Client::new(),
                deaf: false,
            }),
            told: 0,
        }
    }

    /// Tells of a run while `work` does it.
    pub async fn during<T>(&mut self, run: &Run, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.say(run, "START", None).await;
        let mut work = std::pin::pin!(work);
        let done = loop {
            tokio::select! {
                done = &mut work => break done,
                () = tokio::time::sleep(EVERY) => self.refresh(run, None).await,
            }
        };
        self.refresh(run, Some(done.as_ref().err())).await;
        match &done {
            Ok(_) => self.say(run, "COMPLETE", None).await,
            Err(Error::Stopped) => self.say(run, "ABORT", None).await,
            Err(error) => self.say(run, "FAIL", Some(error)).await,
        }
        done
    }

    /// Rewrites the file, and tells of the stages that have ended since; `ended` says whether the run has, and how.
    async fn refresh(&mut self, run: &Run, ended: Option<Option<&Error>>) {
        let steps = run.steps.lock().expect("no panic while held").clone();
        if let Some(path) = &self.metrics {
            let text = prometheus(run, &steps, self.started, ended);
            // a reader never sees half of it
            let beside = path.with_extension(format!("{}.tmp", std::process::id()));
            let written = std::fs::write(&beside, text).and_then(|()| std::fs::rename(&beside, path));
            if let Err(error) = written {
                tracing::warn!("cannot write the metrics to {}: {error}", path.display());
                self.metrics = None;
            }
        }
        // a broken output has steps start over
        self.told = self.told.min(steps.len());
        if let Some(lineage) = &mut self.lineage {
            for step in &steps[self.told..] {
                for event in lineage.of_step(run, step, &steps, self.started) {
                    lineage.send(event).await;
                }
            }
        }
        self.told = steps.len();
    }

    /// Tells of the run as a whole.
    async fn say(&mut self, run: &Run, what: &str, error: Option<&Error>) {
        let Some(lineage) = &mut self.lineage else { return };
        let mut event = lineage.event(
            what,
            &Timestamp::now().to_string(),
            &run.conf.run.name,
            &id(run, self.started, ""),
        );
        event["inputs"] = run.conf.source.iter().map(|source| dataset(&source.url)).collect();
        event["outputs"] = json!([dataset(&run.output.url())]);
        if let Some(error) = error {
            let facet = lineage.facet(
                "1-0-1/ErrorMessageRunFacet",
                json!({
                    "message": error.to_string(), "programmingLanguage": "Rust",
                }),
            );
            event["run"]["facets"] = json!({ "errorMessage": facet });
        }
        lineage.send(event).await;
    }
}

/// The run in Prometheus's text format.
fn prometheus(run: &Run, steps: &[Step], started: Timestamp, ended: Option<Option<&Error>>) -> String {
    let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let name = quoted(&run.conf.run.name);
    let mut text = String::new();
    let mut gauge = |metric: &str, help: &str, samples: Vec<(String, f64)>| {
        text += &format!("# HELP lengthwise_{metric} {help}\n# TYPE lengthwise_{metric} gauge\n");
        for (labels, value) in samples {
            text += &format!("lengthwise_{metric}{{run=\"{name}\"{labels}}} {value}\n");
        }
    };
    let now = Timestamp::now();
    let seconds = now.duration_since(started).as_secs_f64();
    gauge("run_seconds", "How long the run has taken.", vec![(String::new(), seconds)]);
    gauge(
        "run_updated_timestamp_seconds",
        "When this was written.",
        vec![(String::new(), now.as_second() as f64)],
    );
    if let Some(error) = ended {
        let code = error.map_or(0, Error::exit_code);
        gauge(
            "run_exit_code",
            "How the run ended, as documented; absent while it goes.",
            vec![(String::new(), code.into())],
        );
    }
    let label = |step: &Step| format!(",stage=\"{}\"", quoted(&step.stage));
    let took = steps.iter().map(|step| (label(step), step.seconds)).collect();
    gauge("stage_seconds", "How long a stage took to find or to compute.", took);
    let cached = steps.iter().map(|step| (label(step), f64::from(u8::from(step.cached)))).collect();
    gauge("stage_cached", "1 where a stage's output was there.", cached);
    let counts = steps.iter().flat_map(|step| {
        let of = |(name, count): (&String, &u64)| {
            (format!("{},count=\"{}\"", label(step), quoted(name)), *count as f64)
        };
        step.counts.iter().map(of).collect::<Vec<_>>()
    });
    gauge("stage_count", "What a stage counted: documents, tokens, rejects, ...", counts.collect());
    text
}

/// The run's last line in the log.
pub fn summary(steps: &[Step], folder: Option<&str>, started: Timestamp) -> String {
    let computed = steps.iter().filter(|step| !step.cached).count();
    let counted = |name: &str| {
        let counts = steps.iter().filter_map(|step| step.counts.get(name));
        indicatif::HumanCount(counts.copied().max().unwrap_or(0))
    };
    format!(
        "done in {:.1} s: {computed} of {} stages computed, {} documents, {} rejects, {} sequences{}",
        Timestamp::now().duration_since(started).as_secs_f64(),
        steps.len(),
        counted("documents"),
        counted("rejects"),
        counted("sequences"),
        folder.map_or(String::new(), |folder| format!(", {folder}")),
    )
}

/// Names this attempt at a run, or at one of its stages, as OpenLineage wants it: as a UUID, of version 8.
fn id(run: &Run, started: Timestamp, stage: &str) -> String {
    let text = format!("{} {} {} {stage}", run.conf.run.name, started.as_nanosecond(), std::process::id());
    let mut bytes: [u8; 16] = Digest::of(text.as_bytes()).0[..16].try_into().expect("16 of 32 bytes");
    (bytes[6], bytes[8]) = (bytes[6] & 0x0f | 0x80, bytes[8] & 0x3f | 0x80);
    let hex = crate::hash::hex(&bytes);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// A URL as OpenLineage names datasets.
fn dataset(url: &str) -> Value {
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let (bucket, name) = rest.split_once('/').unwrap_or((rest, ""));
            json!({ "namespace": format!("{scheme}://{bucket}"), "name": if name.is_empty() { "/" } else { name } })
        }
        None => json!({ "namespace": "file", "name": url }),
    }
}

/// Where events go.
struct Lineage {
    url: String,
    key: Option<String>,
    namespace: String,
    client: reqwest::Client,
    /// Whether it was said that nobody listens.
    deaf: bool,
}

impl Lineage {
    fn event(&self, what: &str, time: &str, job: &str, run: &str) -> Value {
        json!({
            "eventType": what,
            "eventTime": time,
            "producer": PRODUCER,
            "schemaURL": "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent",
            "run": { "runId": run },
            "job": { "namespace": self.namespace, "name": job },
        })
    }

    fn facet(&self, schema: &str, mut facet: Value) -> Value {
        facet["_producer"] = PRODUCER.into();
        facet["_schemaURL"] = format!("https://openlineage.io/spec/facets/{schema}.json").into();
        facet
    }

    /// That a stage began, and that it is complete, with what it read and wrote. What was there is not told again.
    fn of_step(&self, run: &Run, step: &Step, steps: &[Step], started: Timestamp) -> Vec<Value> {
        if step.cached {
            return vec![];
        }
        let folder = |step: &Step| run.output.join("stages").join(&step.stage).join(&step.key).url();
        let inputs: Vec<Value> = match step.stage.as_str() {
            "tokens" => run.conf.source.iter().map(|source| dataset(&source.url)).collect(),
            stage => {
                let above = steps.iter().filter(|other| upstream(stage).contains(&other.stage.as_str()));
                above.map(|step| dataset(&folder(step))).collect()
            }
        };
        let mut output = dataset(&folder(step));
        let rows =
            ["documents", "sequences", "tokens", "rows"].iter().find_map(|name| step.counts.get(*name));
        let statistics = self.facet("1-0-2/OutputStatisticsOutputDatasetFacet", json!({ "rowCount": rows }));
        output["outputFacets"] = json!({ "outputStatistics": statistics });
        let parent = self.facet(
            "1-1-0/ParentRunFacet",
            json!({
                "run": { "runId": id(run, started, "") },
                "job": { "namespace": self.namespace, "name": run.conf.run.name },
            }),
        );
        let ended: Timestamp = step.ended.parse().unwrap_or_else(|_| Timestamp::now());
        let began = ended - jiff::SignedDuration::try_from_secs_f64(step.seconds).unwrap_or_default();
        let event = |what: &str, time: Timestamp| {
            let job = format!("{}.{}", run.conf.run.name, step.stage);
            let mut event = self.event(what, &time.to_string(), &job, &id(run, started, &step.stage));
            event["run"]["facets"] = json!({ "parent": parent });
            event["inputs"] = json!(inputs);
            event["outputs"] = json!([output]);
            event
        };
        vec![event("START", began), event("COMPLETE", ended)]
    }

    async fn send(&mut self, event: Value) {
        let mut request = self.client.post(&self.url).timeout(PATIENCE);
        request = request.header("content-type", "application/json").body(event.to_string());
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let heard = request.send().await.and_then(reqwest::Response::error_for_status);
        if let Err(error) = heard
            && !std::mem::replace(&mut self.deaf, true)
        {
            tracing::warn!("OPENLINEAGE_URL: {}", error.without_url());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datasets_have_the_names_that_openlineage_gives_them() {
        for (url, namespace, name) in [
            ("s3://bucket/corpus/*.jsonl", "s3://bucket", "corpus/*.jsonl"),
            ("s3://bucket", "s3://bucket", "/"),
            ("/data/corpus", "file", "/data/corpus"),
        ] {
            assert_eq!(dataset(url), json!({ "namespace": namespace, "name": name }));
        }
    }
}

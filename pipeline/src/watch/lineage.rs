//! OpenLineage events: <https://openlineage.io>.

use jiff::Timestamp;
use reqwest::header::AUTHORIZATION;
use serde_json::{Value, json};

use super::{Listener, id, span};
use crate::run::{Run, Step};
use crate::stage::Stage;
use crate::storage::environment::{address, header, variable};
use crate::{Error, Result};

const PRODUCER: &str = concat!("lengthwise/", env!("CARGO_PKG_VERSION"));

/// The receiver of OpenLineage events.
pub struct Lineage {
    listener: Listener,
    namespace: String,
}

impl Lineage {
    /// Reads `OPENLINEAGE_URL`, `OPENLINEAGE_API_KEY` and `OPENLINEAGE_NAMESPACE`; `None` if no URL is set.
    pub fn new() -> Result<Option<Self>> {
        let Some(url) = address("OPENLINEAGE_URL")? else { return Ok(None) };
        let key = header("OPENLINEAGE_API_KEY", |key| format!("Bearer {key}"))?;
        let headers = key.map(|key| (AUTHORIZATION, key)).into_iter().collect();
        let namespace = variable("OPENLINEAGE_NAMESPACE")?.unwrap_or_else(|| "lengthwise".into());
        Ok(Some(Self { listener: Listener::new("OPENLINEAGE_URL", url, headers), namespace }))
    }

    /// Reports that a run has begun.
    pub async fn begun(&mut self, run: &Run) {
        let event = self.of_run("START", run);
        self.send(&event).await;
    }

    /// Reports that a run has ended: COMPLETE, ABORT for a stop, or FAIL.
    pub async fn ended(&mut self, run: &Run, error: Option<&Error>) {
        let what = match error {
            None => "COMPLETE",
            Some(Error::Stopped) => "ABORT",
            Some(_) => "FAIL",
        };
        let mut event = self.of_run(what, run);
        if let Some(error) = error.filter(|_| what == "FAIL") {
            let message = json!({ "message": error.to_string(), "programmingLanguage": "Rust" });
            event["run"]["facets"] = json!({ "errorMessage": facet("1-0-1/ErrorMessageRunFacet", message) });
        }
        self.send(&event).await;
    }

    /// Reports the start and the completion of a stage that was computed, with what it read and wrote.
    pub async fn computed(&mut self, run: &Run, step: &Step, steps: &[Step]) {
        let folder = |step: &Step| run.output.join("stages").join(&step.stage).join(&step.key).url();
        let inputs: Vec<Value> = match step.stage.as_str() {
            "tokens" => run.conf.source.iter().map(|source| dataset(&source.url)).collect(),
            stage => {
                let reads = Stage::of_step(stage).map_or(&[][..], |stage| stage.about().reads);
                let above = steps
                    .iter()
                    .filter(|other| Stage::of_step(&other.stage).is_some_and(|other| reads.contains(&other)));
                above.map(|step| dataset(&folder(step))).collect()
            }
        };
        let mut output = dataset(&folder(step));
        let rows =
            ["documents", "sequences", "tokens", "rows"].iter().find_map(|name| step.counts.get(*name));
        let statistics = facet("1-0-2/OutputStatisticsOutputDatasetFacet", json!({ "rowCount": rows }));
        output["outputFacets"] = json!({ "outputStatistics": statistics });
        let parent = json!({
            "run": { "runId": uuid(run, "") },
            "job": { "namespace": self.namespace, "name": run.conf.run.name },
        });
        let parent = facet("1-1-0/ParentRunFacet", parent);
        let (began, ended) = span(step);
        for (what, time) in [("START", began), ("COMPLETE", ended)] {
            let job = format!("{}.{}", run.conf.run.name, step.stage);
            let mut event = self.event(what, time, &job, &uuid(run, &step.key));
            event["run"]["facets"] = json!({ "parent": parent });
            event["inputs"] = json!(inputs);
            event["outputs"] = json!([output]);
            self.send(&event).await;
        }
    }

    fn of_run(&self, what: &str, run: &Run) -> Value {
        let mut event = self.event(what, Timestamp::now(), &run.conf.run.name, &uuid(run, ""));
        event["inputs"] = run.conf.source.iter().map(|source| dataset(&source.url)).collect();
        event["outputs"] = json!([dataset(&run.output.url())]);
        event
    }

    fn event(&self, what: &str, time: Timestamp, job: &str, run: &str) -> Value {
        json!({
            "eventType": what,
            "eventTime": time.to_string(),
            "producer": PRODUCER,
            "schemaURL": "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent",
            "run": { "runId": run },
            "job": { "namespace": self.namespace, "name": job },
        })
    }

    async fn send(&mut self, event: &Value) {
        self.listener.send("/api/v1/lineage", event).await;
    }
}

fn facet(schema: &str, mut facet: Value) -> Value {
    facet["_producer"] = PRODUCER.into();
    facet["_schemaURL"] = format!("https://openlineage.io/spec/facets/{schema}.json").into();
    facet
}

/// The id of a run or stage as OpenLineage requires it: a UUID, of version 8.
fn uuid(run: &Run, key: &str) -> String {
    let mut bytes = id(run, key);
    (bytes[6], bytes[8]) = (bytes[6] & 0x0f | 0x80, bytes[8] & 0x3f | 0x80);
    let hex = crate::hash::hex(&bytes);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// A URL in OpenLineage's naming of datasets: a namespace and a name.
fn dataset(url: &str) -> Value {
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let (bucket, name) = rest.split_once('/').unwrap_or((rest, ""));
            json!({ "namespace": format!("{scheme}://{bucket}"), "name": if name.is_empty() { "/" } else { name } })
        }
        None => json!({ "namespace": "file", "name": url }),
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

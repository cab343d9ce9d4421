//! OpenTelemetry traces and metrics, as OTLP JSON over HTTP, which collectors receive on port 4318:
//! <https://opentelemetry.io/docs/specs/otlp/>.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Gauge, Listener, hex, id, span};
use crate::run::{Run, Step};
use crate::storage::environment::{address, headers, variable};
use crate::{Error, Result};

/// The receiver of traces and metrics.
pub struct Telemetry {
    listener: Listener,
    /// The OTLP resource that all traces and metrics belong to.
    resource: Value,
}

impl Telemetry {
    /// Reads `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_EXPORTER_OTLP_HEADERS` and `OTEL_SERVICE_NAME`; `None` if
    /// no endpoint is set.
    pub fn new() -> Result<Option<Self>> {
        let Some(url) = address("OTEL_EXPORTER_OTLP_ENDPOINT")? else { return Ok(None) };
        let name = variable("OTEL_SERVICE_NAME")?.unwrap_or_else(|| "lengthwise".into());
        Ok(Some(Self {
            listener: Listener::new(
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                url,
                headers("OTEL_EXPORTER_OTLP_HEADERS")?,
            ),
            resource: json!({ "attributes": [
                attribute("service.name", &name),
                attribute("service.version", env!("CARGO_PKG_VERSION")),
            ] }),
        }))
    }

    /// Sends a span for each stage in `steps`.
    pub async fn computed<'a>(&mut self, run: &Run, steps: impl Iterator<Item = &'a Step>) {
        let mut spans = vec![];
        for step in steps {
            let mut span = trace(run, &step.key, span(step), None);
            span["name"] = step.stage.as_str().into();
            span["parentSpanId"] = hex(&id(run, "")[8..]).into();
            let counts = step.counts.iter().map(|(name, count)| {
                let value = json!({ "intValue": count.to_string() });
                json!({ "key": format!("lengthwise.{name}"), "value": value })
            });
            span["attributes"] = counts.chain([attribute("lengthwise.key", &step.key)]).collect();
            spans.push(span);
        }
        if !spans.is_empty() {
            self.send_spans(spans).await;
        }
    }

    /// Sends the run's span, once it has ended.
    pub async fn ended(&mut self, run: &Run, error: Option<&Error>) {
        let took = jiff::SignedDuration::try_from_secs_f64(run.seconds()).unwrap_or_default();
        let mut span = trace(run, "", (run.started, run.started + took), error);
        span["name"] = run.conf.run.name.as_str().into();
        span["attributes"] = json!([attribute("lengthwise.output", &run.output.url())]);
        self.send_spans(vec![span]).await;
    }

    async fn send_spans(&mut self, spans: Vec<Value>) {
        let spans = json!([{ "scope": scope(), "spans": spans }]);
        let body = json!({ "resourceSpans": [{ "resource": self.resource, "scopeSpans": spans }] });
        self.listener.send("/v1/traces", &body).await;
    }

    /// Sends the current values of the gauges.
    pub async fn measured(&mut self, run: &Run, gauges: &[Gauge]) {
        let time = nanoseconds(Timestamp::now());
        let metrics = gauges.iter().map(|Gauge { name, help, samples }| {
            let points = samples.iter().map(|(labels, value)| {
                let labels = labels.iter().map(|(label, value)| attribute(label, value));
                let attributes: Vec<Value> = labels.chain([attribute("run", &run.conf.run.name)]).collect();
                json!({ "timeUnixNano": time, "asDouble": value, "attributes": attributes })
            });
            let points: Vec<Value> = points.collect();
            json!({ "name": format!("lengthwise_{name}"), "description": help, "gauge": { "dataPoints": points } })
        });
        let metrics = json!([{ "scope": scope(), "metrics": metrics.collect::<Vec<_>>() }]);
        let body = json!({ "resourceMetrics": [{ "resource": self.resource, "scopeMetrics": metrics }] });
        self.listener.send("/v1/metrics", &body).await;
    }
}

/// A span of the run, or of one of its stages if `key` is not empty. The caller adds the name.
fn trace(run: &Run, key: &str, span: (Timestamp, Timestamp), error: Option<&Error>) -> Value {
    let status = match error {
        None => json!({ "code": 1 }),
        Some(error) => json!({ "code": 2, "message": error.to_string() }),
    };
    json!({
        "traceId": hex(&id(run, "")),
        "spanId": hex(&id(run, key)[8..]),
        "kind": 1,
        "startTimeUnixNano": nanoseconds(span.0),
        "endTimeUnixNano": nanoseconds(span.1),
        "status": status,
    })
}

fn scope() -> Value {
    json!({ "name": "lengthwise", "version": env!("CARGO_PKG_VERSION") })
}

fn attribute(key: &str, value: &str) -> Value {
    json!({ "key": key, "value": { "stringValue": value } })
}

/// OTLP's JSON writes 64-bit integers as strings.
fn nanoseconds(time: Timestamp) -> String {
    time.as_nanosecond().to_string()
}

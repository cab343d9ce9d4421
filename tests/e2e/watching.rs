//! What schedulers and monitoring learn about a run.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;

use crate::project::{Project, recipe, said, terminate, tree};

/// A server that receives JSON posts, and answers each with success.
fn listener() -> (String, mpsc::Receiver<(String, Value)>) {
    slow_listener(|_| Duration::ZERO)
}

/// The same server, with a delay before each answer.
fn slow_listener(
    takes: impl Fn(&Value) -> Duration + Send + 'static,
) -> (String, mpsc::Receiver<(String, Value)>) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", server.local_addr().unwrap());
    let (send, heard) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in server.incoming() {
            let (mut stream, mut text) = (stream.unwrap(), Vec::new());
            let body: (String, Value) = loop {
                let mut bytes = [0; 4096];
                let read = stream.read(&mut bytes).unwrap();
                text.extend_from_slice(&bytes[..read]);
                let all = String::from_utf8_lossy(&text).into_owned();
                let Some((head, body)) = all.split_once("\r\n\r\n") else { continue };
                let length = head
                    .lines()
                    .find_map(|line| line.to_lowercase().strip_prefix("content-length: ").map(str::to_owned));
                if body.len() >= length.unwrap().parse().unwrap() {
                    break (head.to_owned(), serde_json::from_str(body).unwrap());
                }
            };
            let takes = takes(&body.1);
            if send.send(body).is_err() {
                return;
            }
            std::thread::sleep(takes);
            // a client that has ended meanwhile needs no answer
            let _ =
                stream.write_all(b"HTTP/1.1 201 Created\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        }
    });
    (url, heard)
}

#[test]
fn openlineage_hears_of_the_run_and_of_each_stage_that_was_computed() {
    let project = Project::new(3);
    let (url, heard) = listener();
    let mut command = project.command(&["run", "conf.toml"]);
    command.env("OPENLINEAGE_URL", &url).env("OPENLINEAGE_API_KEY", "planted-secret");
    let done = said(command.output().unwrap());
    assert_eq!(done.code, 0, "{done:?}");
    let heard: Vec<(String, Value)> = heard.try_iter().collect();
    let told: Vec<(&str, &str)> = heard
        .iter()
        .map(|(_, event)| (event["job"]["name"].as_str().unwrap(), event["eventType"].as_str().unwrap()))
        .collect();
    assert_eq!((told[0], told[told.len() - 1]), (("t", "START"), ("t", "COMPLETE")));
    for stage in ["tokens", "catalog", "domains", "mixture", "draw", "shuffle", "pack"] {
        let job = format!("t.{stage}");
        assert!(told.contains(&(&job, "START")) && told.contains(&(&job, "COMPLETE")), "{stage}: {told:?}");
    }
    for (head, event) in &heard {
        assert!(head.starts_with("POST /api/v1/lineage") && head.contains("Bearer planted-secret"), "{head}");
        let id = event["run"]["runId"].as_str().unwrap();
        assert!(id.len() == 36 && id.as_bytes()[14] == b'8', "{id}");
        for key in ["eventTime", "producer", "schemaURL"] {
            assert!(event[key].is_string(), "{event}");
        }
    }
    let of = |job: &str| &heard.iter().rfind(|(_, event)| event["job"]["name"] == job).unwrap().1;
    let (catalog, tokens) = (of("t.catalog"), of("t.tokens"));
    assert_eq!(catalog["run"]["facets"]["parent"]["run"]["runId"], of("t")["run"]["runId"]);
    assert_eq!(catalog["outputs"][0]["outputFacets"]["outputStatistics"]["rowCount"], 240);
    assert_eq!(catalog["inputs"][0]["name"], tokens["outputs"][0]["name"]);
    assert!(!done.err.contains("planted-secret"));
}

#[test]
fn opentelemetry_hears_a_span_of_each_stage_inside_the_run_s_and_its_measures() {
    let project = Project::new(3);
    let (url, heard) = listener();
    let mut command = project.command(&["run", "conf.toml"]);
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &url).env("OTEL_SERVICE_NAME", "nightly");
    command.env("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Basic planted-secret,x-tenant=t1");
    let done = said(command.output().unwrap());
    assert_eq!(done.code, 0, "{done:?}");
    let (mut spans, mut gauges) = (vec![], vec![]);
    for (head, body) in heard.try_iter() {
        assert!(head.contains("Basic planted-secret") && head.contains("x-tenant: t1"), "{head}");
        let (all, kind) = match head.split(' ').nth(1).unwrap() {
            "/v1/traces" => (&body["resourceSpans"][0], "Spans"),
            "/v1/metrics" => (&body["resourceMetrics"][0], "Metrics"),
            other => panic!("{other}"),
        };
        let service = &all["resource"]["attributes"][0];
        assert_eq!(
            (&service["key"], &service["value"]["stringValue"]),
            (&"service.name".into(), &"nightly".into())
        );
        let scope = &all[format!("scope{kind}")][0];
        let those = scope[kind.to_lowercase()].as_array().unwrap().clone();
        if kind == "Spans" { spans.extend(those) } else { gauges = those }
    }
    let run = spans.iter().find(|span| span["name"] == "t").unwrap();
    let time = |span: &Value, key: &str| span[key].as_str().unwrap().parse::<u128>().unwrap();
    let (began, ended) = (time(run, "startTimeUnixNano"), time(run, "endTimeUnixNano"));
    assert!(run["traceId"].as_str().unwrap().len() == 32 && run.get("parentSpanId").is_none(), "{run}");
    for stage in ["tokens", "catalog", "domains", "mixture", "draw", "shuffle", "pack"] {
        let span =
            spans.iter().find(|span| span["name"] == stage).unwrap_or_else(|| panic!("{stage}: {spans:?}"));
        assert_eq!(span["traceId"], run["traceId"]);
        assert_eq!(span["parentSpanId"], run["spanId"]);
        assert!(span["spanId"].as_str().unwrap().len() == 16 && span["status"]["code"] == 1, "{span}");
        // the seconds of a stage are rounded
        let slack = 10_000_000;
        assert!(time(span, "startTimeUnixNano") + slack >= began, "{span} {run}");
        assert!(time(span, "endTimeUnixNano") <= ended, "{span} {run}");
    }
    let counted = gauges.iter().find(|gauge| gauge["name"] == "lengthwise_stage_count").unwrap();
    let points = counted["gauge"]["dataPoints"].as_array().unwrap();
    let is = |point: &Value, key: &str, value: &str| {
        point["attributes"]
            .as_array()
            .unwrap()
            .iter()
            .any(|a| a["key"] == key && a["value"]["stringValue"] == value)
    };
    let documents =
        points.iter().find(|point| is(point, "stage", "tokens") && is(point, "count", "documents"));
    assert_eq!(documents.unwrap()["asDouble"], 240.0);
    assert!(!done.err.contains("planted-secret"));

    let mut command = project.command(&["run", "conf.toml", "--set", "mixture.budget=400M"]);
    let (url, heard) = listener();
    let failed = said(command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &url).output().unwrap());
    assert_eq!(failed.code, 3, "{failed:?}");
    let (_, last) = heard.try_iter().last().unwrap();
    assert_eq!(last["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["status"]["code"], 2, "{last}");
}

#[test]
fn a_run_that_fails_is_heard_to_fail_and_one_that_nobody_hears_goes_on() {
    let project = Project::new(3);
    let (url, heard) = listener();
    let mut command = project.command(&["run", "conf.toml", "--set", "mixture.budget=400M"]);
    let failed = said(command.env("OPENLINEAGE_URL", &url).output().unwrap());
    assert_eq!(failed.code, 3, "{failed:?}");
    let (_, last) = heard.try_iter().last().unwrap();
    assert_eq!(last["eventType"], "FAIL");
    assert!(last["run"]["facets"]["errorMessage"]["message"].is_string(), "{last}");
    for listener in ["OPENLINEAGE_URL", "OTEL_EXPORTER_OTLP_ENDPOINT"] {
        let mut command = project.command(&["run", "conf.toml"]);
        let deaf = said(command.env(listener, "http://127.0.0.1:9").output().unwrap());
        assert_eq!(deaf.code, 0, "{deaf:?}");
        assert_eq!(deaf.err.matches(listener).count(), 1, "{deaf:?}");
    }
}

#[test]
fn prometheus_reads_how_a_run_ended() {
    let project = Project::new(3);
    let file = project.path("run.prom");
    let run = |more: &[&str]| {
        let mut command = project.command(&[&["run", "conf.toml"], more].concat());
        said(command.env("LENGTHWISE_METRICS", &file).output().unwrap())
    };
    assert_eq!(run(&["--set", "mixture.budget=400M"]).code, 3);
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("lengthwise_run_exit_code{run=\"t\"} 3\n"), "{text}");
    let recipes = recipe("cut_128k");
    let mut sweep = project.command(&["sweep", "conf.toml", "--recipes", &recipes]);
    sweep.args(["--set", "train={ checkpoint = \"nowhere\", steps = 4 }"]);
    assert_eq!(said(sweep.env("LENGTHWISE_METRICS", &file).output().unwrap()).code, 2);
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("lengthwise_run_exit_code{run=\"t-cut_128k\"} 2\n"), "{text}");
    assert_eq!(run(&[]).code, 0);
    let text = std::fs::read_to_string(&file).unwrap();
    for line in [
        "lengthwise_run_exit_code{run=\"t\"} 0",
        "lengthwise_stage_count{run=\"t\",stage=\"tokens\",count=\"documents\"} 240",
        "lengthwise_stage_cached{run=\"t\",stage=\"tokens\"} 1",
        "lengthwise_stage_cached{run=\"t\",stage=\"pack\"} 0",
    ] {
        assert!(text.lines().any(|there| there == line), "{line}: {text}");
    }
    let series: Vec<&str> = text.lines().filter_map(|line| Some(line.rsplit_once(' ')?.0)).collect();
    let different: std::collections::BTreeSet<&&str> = series.iter().collect();
    assert_eq!(different.len(), series.len(), "a series stands there once: {text}");
    // each line is a comment, or a name with labels and a number
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(name.ends_with('}') && name.contains("{run=") && value.parse::<f64>().is_ok(), "{line}");
    }
}

#[test]
fn a_signal_between_two_runs_of_a_sweep_stops_it() {
    let project = Project::new(3);
    let second = |event: &Value| event["job"]["name"] == "t-cut_128k" && event["eventType"] == "START";
    let (url, heard) = slow_listener(move |event| Duration::from_secs(if second(event) { 3 } else { 0 }));
    let recipes = format!("{},{}", recipe("per_source"), recipe("cut_128k"));
    let mut command = project.command(&["sweep", "conf.toml", "--recipes", &recipes]);
    let mut child = command.env("OPENLINEAGE_URL", &url).spawn().unwrap();
    assert!(heard.iter().any(|(_, event)| second(&event)));
    // while the server delays its answer, no work is done
    terminate(&child);
    assert_eq!(child.wait().unwrap().code(), Some(75));
    let mixtures = tree(&project.path("out/stages/mixture"));
    assert_eq!(mixtures.iter().filter(|path| path.ends_with("manifest.json")).count(), 1);
}

#[test]
fn a_run_that_is_told_to_stop_says_so_to_all_who_listen() {
    let project = Project::new(3);
    project.write("endless.sql", crate::hostile::ENDLESS[0]);
    let ((lineage, events), (telemetry, spans), file) = (listener(), listener(), project.path("run.prom"));
    let mut command = project.command(&["run", "conf.toml", "--set", "mixture.recipe=endless.sql"]);
    command.env("OPENLINEAGE_URL", lineage).env("OTEL_EXPORTER_OTLP_ENDPOINT", telemetry);
    let mut child = command.env("LENGTHWISE_METRICS", &file).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(3));
    terminate(&child);
    assert_eq!(child.wait().unwrap().code(), Some(75));
    assert_eq!(events.try_iter().last().unwrap().1["eventType"], "ABORT");
    let (_, span) = spans.try_iter().filter(|(head, _)| head.contains("/v1/traces")).last().unwrap();
    assert_eq!(span["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["status"]["code"], 2, "{span}");
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("lengthwise_run_exit_code{run=\"t\"} 75\n"), "{text}");
}

#[test]
fn a_log_in_json_is_json_to_its_last_line_and_says_how_it_ended() {
    let project = Project::new(3);
    for (more, code) in [(&[][..], 0), (&["--set", "mixture.budget=400M"][..], 3)] {
        let mut command = project.command(&[&["run", "conf.toml"], more].concat());
        let output = command.env("LENGTHWISE_LOG_FORMAT", "json").output().unwrap();
        assert_eq!(output.status.code(), Some(code));
        let lines: Vec<Value> = String::from_utf8_lossy(&output.stderr)
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect();
        let last = lines.last().unwrap();
        match code {
            0 => assert!(last["message"].as_str().unwrap().starts_with("done in "), "{last}"),
            _ => assert!(last["code"] == 3 && last["level"] == "ERROR" && last["help"].is_string(), "{last}"),
        }
    }
}

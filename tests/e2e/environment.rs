//! Environment variables with wrong values: errors name the variable, and never show its value.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use crate::project::{Project, said};
use crate::servers::{S3, SECRET};

#[test]
fn a_variable_that_is_set_wrong_is_named_and_its_value_is_not() {
    let project = Project::new(3);
    project.write("planted-key.json", "{\"private_key\": 7, \"x\": \"planted-secret\"}");
    let key = project.path("planted-key.json").into_os_string().into_string().unwrap();
    let pasted = "{\"type\": \"service_account\", \"private_key\": \"planted-secret\"}";
    let secret = "planted-secret";
    let (s3, gs, az) = ("s3://bucket/x", "gs://bucket/x", "az://bucket/x");
    for (output, name, value) in [
        (s3, "AWS_ENDPOINT", "planted-secret"),
        (s3, "AWS_ENDPOINT_URL", "planted-secret:9000"),
        (s3, "AWS_ENDPOINT", "http://planted-\nsecret"),
        (s3, "AWS_ENDPOINT_URL_S3", "planted-secret"),
        (s3, "AWS_METADATA_ENDPOINT", "planted-secret"),
        (s3, "AWS_REGION", "planted secret"),
        (s3, "AWS_DEFAULT_REGION", "planted-secret\""),
        (s3, "AWS_ALLOW_HTTP", secret),
        (s3, "AWS_TIMEOUT", secret),
        (s3, "AWS_CONDITIONAL_PUT", secret),
        (s3, "AWS_SECRET_ACCESS_KEY", secret),
        (s3, "AWS_ACCESS_KEY_ID", "planted-\nsecret"),
        (s3, "AWS_PROXY_URL", secret),
        (gs, "GOOGLE_SERVICE_ACCOUNT", pasted),
        (gs, "GOOGLE_SERVICE_ACCOUNT", "planted-secret"),
        (gs, "GOOGLE_SERVICE_ACCOUNT", &key),
        (gs, "GOOGLE_SERVICE_ACCOUNT_KEY", secret),
        (gs, "GOOGLE_SERVICE_ACCOUNT_KEY", pasted),
        (gs, "GOOGLE_APPLICATION_CREDENTIALS", pasted),
        (gs, "GOOGLE_APPLICATION_CREDENTIALS", &key),
        (gs, "GOOGLE_BASE_URL", secret),
        (az, "AZURE_STORAGE_ACCOUNT_NAME", "planted secret"),
        (az, "AZURE_STORAGE_ACCOUNT_KEY", secret),
        (az, "AZURE_STORAGE_ENDPOINT", secret),
        (az, "AZURE_STORAGE_TOKEN", "planted-\nsecret"),
        (az, "AZURE_STORAGE_SAS_TOKEN", "planted-secret"),
        ("out", "OPENLINEAGE_URL", secret),
        ("out", "OTEL_EXPORTER_OTLP_ENDPOINT", "planted-secret:4318"),
    ] {
        let set = format!("run.output={output}");
        let mut command = project.command(&["run", "conf.toml", "--set", &set]);
        if output == az && name != "AZURE_STORAGE_ACCOUNT_NAME" {
            command.env("AZURE_STORAGE_ACCOUNT_NAME", "account");
        }
        let said = said(command.env(name, value).output().unwrap());
        assert_eq!(said.code, 2, "{name}={value}: {said:?}");
        assert!(said.err.contains(name), "{name}={value}: {said:?}");
        let all = said.err + &said.out;
        assert!(!all.contains("planted") && !all.contains("secret\""), "{name}={value}: {all}");
    }
    for (listener, name, value) in [
        ("OPENLINEAGE_URL", "OPENLINEAGE_API_KEY", "planted-\nsecret"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_HEADERS", "planted-secret"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_HEADERS", "a=planted-\nsecret"),
    ] {
        let mut command = project.command(&["run", "conf.toml"]);
        let said = said(command.env(listener, "http://127.0.0.1:9").env(name, value).output().unwrap());
        assert!(said.code == 2 && said.err.contains(name) && !said.err.contains("planted"), "{said:?}");
    }
    let binary = OsString::from_vec(b"planted-\xff".to_vec());
    for (output, name) in
        [(s3, "AWS_REGION"), (az, "AZURE_STORAGE_ACCOUNT_NAME"), ("out", "LENGTHWISE_METRICS")]
    {
        let set = format!("run.output={output}");
        let mut command = project.command(&["run", "conf.toml", "--set", &set]);
        let said = said(command.env(name, &binary).output().unwrap());
        assert!(said.code == 2 && said.err.contains(name) && !said.err.contains("planted"), "{said:?}");
    }
    // other variables are ignored, and an empty variable counts as not set
    let mut command = project.command(&["run", "conf.toml"]);
    command
        .env("AWS_REGION", &binary)
        .env("UNUSED", &binary)
        .env("OPENLINEAGE_URL", "")
        .env("HTTPS_PROXY", "x y");
    let done = said(
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", " \n").env("LENGTHWISE_METRICS", "").output().unwrap(),
    );
    assert_eq!(done.code, 0, "{done:?}");
    // without an account the error names the missing variable
    let lacking = project.say(&["run", "conf.toml", "--set", "run.output=az://bucket/x"]);
    assert!(lacking.code == 2 && lacking.err.contains("AZURE_STORAGE_ACCOUNT_NAME"), "{lacking:?}");
}

#[test]
fn white_space_around_what_s3_takes_is_none_of_it() {
    let Some(server) = S3::start() else { return };
    let project = Project::new(3);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(server.put_first("x", vec![]));
    for proxy in ["", "not a proxy", "http://", "\n"] {
        let mut command = project.command(&["run", "conf.toml", "--set", "run.output=s3://bucket/out"]);
        command.env("AWS_ENDPOINT_URL", format!(" http://127.0.0.1:{}/\n", server.port()));
        command.env("AWS_ACCESS_KEY_ID", "key\n").env("AWS_SECRET_ACCESS_KEY", format!("{SECRET}\r\n"));
        command.env("AWS_ALLOW_HTTP", "true\n").env("AWS_REGION", "us-east-1 ").env("AWS_SESSION_TOKEN", "");
        // no value of a proxy's variable causes a panic
        command.env("AWS_ENDPOINT", "").env("HTTPS_PROXY", proxy).env("ALL_PROXY", "");
        let done = said(command.output().unwrap());
        assert_eq!(done.code, 0, "{proxy}: {done:?}");
    }
}

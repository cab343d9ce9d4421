//! Exit codes tell a scheduler to retry only where a retry may help.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;

use crate::project::{Project, said};
use crate::servers::{S3, SECRET};

#[test]
fn what_trying_again_does_not_mend_is_not_to_be_tried_again() {
    let project = Project::new(3);
    std::fs::create_dir_all(project.path("folder.toml")).unwrap();
    project.write("latin.toml", b"# caf\xe9\n");
    project.write("file", "x");
    project.write("binary/a.jsonl", "{}\n");
    std::fs::write(project.path("binary").join(OsStr::from_bytes(b"caf\xe9.jsonl")), "{}\n").unwrap();
    for (arguments, why) in [
        (
            &["run", "conf.toml", "--set", "source.0.url=https://example.com/a.jsonl"][..],
            "https://example.com",
        ),
        (&["run", "conf.toml", "--set", "run.output=http://example.com/out"], "http://example.com"),
        (&["run", "conf.toml", "--set", "run.output=s3://buc\"ket/out"], "no bucket has such a name"),
        (&["run", "folder.toml"], "folder.toml"),
        (&["run", "latin.toml"], "latin.toml"),
        (&["run", "conf.toml", "--set", "mixture.recipe=in"], "cannot read in"),
        (&["run", "conf.toml", "--set", "tokenizer={ url = \"in\" }"], "in"),
        (&["run", "conf.toml", "--set", "tokenizer={ url = \"file/x\" }"], "a part of the path is a file"),
        (&["run", "conf.toml", "--set", "run.output=file"], "a part of the path is a file"),
        (&["run", "conf.toml", "--set", "run.output=file/below"], "a part of the path is a file"),
        (&["run", "conf.toml", "--set", "source.0.url=binary/*"], "its name is not UTF-8"),
        (&["run", "conf.toml", "--set", "source.0.url=file/x"], "has no files"),
        (&["verify", "file"], "file"),
        (&["verify", "nowhere"], "nowhere"),
        (&["report", "nowhere"], "nowhere"),
        (&["gc", "file/below"], "file/below"),
        (&["generate", "nowhere", "--prompt-file", "folder.toml", "--tokens", "1"], "nowhere"),
    ] {
        let said = project.say(arguments);
        assert_eq!(said.code, 2, "{arguments:?}: {said:?}");
        assert!(said.err.contains(why), "{arguments:?}: {said:?}");
        assert!(!said.err.contains("the same command goes on"), "{arguments:?}: {said:?}");
    }
}

#[test]
fn a_bucket_that_is_not_there_is_said_to_be_so() {
    let Some(server) = S3::start() else { return };
    let project = Project::new(3);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(server.put_first("x", vec![]));
    let set = "source.0.url=s3://nowhere/corpus/*";
    let mut command = project.command(&["run", "conf.toml", "--until", "tokenizer", "--set", set]);
    let nowhere = said(server.credentials(&mut command, SECRET).output().unwrap());
    assert!(nowhere.code == 2 && nowhere.err.contains("there is no such bucket"), "{nowhere:?}");
}

/// An S3 server that lists these keys, but has no objects for them.
fn listing(keys: &'static [&'static str]) -> String {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", server.local_addr().unwrap());
    // the thread ends with the test's process
    std::thread::spawn(move || {
        for stream in server.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let request = lines.next().unwrap().unwrap();
            lines.take_while(|line| line.as_ref().is_ok_and(|line| !line.is_empty())).for_each(drop);
            let of = |key: &&str| {
                format!(
                    "<Contents><Key>{key}</Key><Size>2</Size><LastModified>2026-01-01T00:00:00Z</LastModified>\
                     <ETag>\"x\"</ETag></Contents>"
                )
            };
            let (status, body) = match request.starts_with("GET ") {
                true => ("200 OK", keys.iter().map(of).collect::<String>()),
                false => ("404 Not Found", String::new()),
            };
            let body = format!("<ListBucketResult>{body}</ListBucketResult>");
            let head =
                format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
            let body = if request.starts_with("HEAD ") { "" } else { &body };
            // a client may have closed its connection
            let _ = stream.write_all((head + body).as_bytes());
        }
    });
    url
}

#[test]
fn a_key_that_can_not_be_read_is_named_and_the_credentials_are_not() {
    let project = Project::new(3);
    let set = "source.0.url=s3://bucket/corpus/*";
    let mut command = project.command(&["run", "conf.toml", "--set", set]);
    command
        .env("AWS_ENDPOINT", listing(&["corpus/a.jsonl", "corpus//b.jsonl"]))
        .env("AWS_ALLOW_HTTP", "true");
    command.env("AWS_ACCESS_KEY_ID", "key").env("AWS_SECRET_ACCESS_KEY", SECRET);
    let unread = said(command.output().unwrap());
    assert!(unread.code == 2 && unread.err.contains("corpus//b.jsonl"), "{unread:?}");
    assert!(
        unread.err.contains("the name is none that can be read") && !unread.err.contains("AWS_"),
        "{unread:?}"
    );
}

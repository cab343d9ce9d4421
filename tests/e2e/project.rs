//! A temporary folder with a small corpus and a conf, in which tests run the program.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_lengthwise");

/// The path of a recipe of this repository.
pub fn recipe(name: &str) -> String {
    format!("{}/../sql/mixtures/{name}.sql", env!("CARGO_MANIFEST_DIR"))
}

pub type Row = (String, String);

/// Pseudo-random numbers below a bound, the same for the same seed.
pub fn random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) + 1;
    move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}

/// Documents of three domains with heavy-tailed lengths: (domain, text).
pub fn corpus(seed: u64, documents: usize) -> Vec<Row> {
    const WORDS: [&str; 24] = [
        "the", "sea", "was", "calm", "and", "wide", "fn", "main", "let", "x", "=", "1;", "Theorem", "holds",
        "for", "all", "primes", "über", "naïve", "日本", "run", "again", "until", "dawn.\n",
    ];
    let mut next = random(seed);
    let mut rows = vec![];
    for i in 0..documents {
        let domain = ["book", "code", "web"][next(3) as usize];
        let scale = 1 << next(if domain == "web" { 5 } else { 8 });
        let words = 8 + next(12 * scale);
        let text: Vec<&str> = (0..words).map(|_| WORDS[next(24) as usize]).collect();
        rows.push((domain.to_owned(), format!("{i} {}", text.join(" "))));
    }
    rows
}

pub struct Project {
    pub dir: tempfile::TempDir,
}

/// The exit code and the output of the program.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Project {
    /// An empty folder.
    pub fn empty() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// A folder with a corpus in `in/` and a conf.
    pub fn new(seed: u64) -> Self {
        let project = Self::empty();
        project.jsonl("in/a.jsonl", &corpus(seed, 240));
        project.conf("in/*", "jsonl", "");
        project
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    /// Writes rows as JSONL, compressed as the name's extension says.
    pub fn jsonl(&self, name: &str, rows: &[Row]) {
        let lines: Vec<String> = rows
            .iter()
            .map(|(domain, text)| json!({ "meta": { "set": domain }, "text": text }).to_string())
            .collect();
        let text = lines.join("\n") + "\n";
        let bytes = match name.rsplit('.').next() {
            Some("gz") => {
                let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
                encoder.write_all(text.as_bytes()).unwrap();
                encoder.finish().unwrap()
            }
            Some("zst") => zstd::encode_all(text.as_bytes(), 1).unwrap(),
            _ => text.into_bytes(),
        };
        self.write(name, bytes);
    }

    /// Writes `conf.toml` with a source over `url`. `more` are further lines of `[mixture]`.
    pub fn conf(&self, url: &str, format: &str, more: &str) {
        let recipe = recipe("per_source");
        self.write(
            "conf.toml",
            format!(
                "[run]\nname = \"t\"\nseed = 7\noutput = \"out\"\n\
                 [[source]]\nname = \"in\"\nurl = \"{url}\"\nformat = \"{format}\"\ndomain = \"meta.set\"\n\
                 [tokenizer]\ntrain = {{ vocab = 400 }}\n\
                 [pack]\nsequence_tokens = 256\nsequences_per_file = 48\nsequences_per_row_group = 8\n\
                 [mixture]\nrecipe = \"{recipe}\"\nbudget = \"40K\"\nlong_tokens = 512\nmax_span = 2048\nholdout = 0.05\n{more}\n"
            ),
        );
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.current_dir(self.dir.path()).args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn say(&self, arguments: &[&str]) -> Said {
        said(self.command(arguments).output().unwrap())
    }

    /// Makes the conf name the tokenizer that it trains now, because a tokenizer trained on other documents
    /// would differ.
    pub fn keep_tokenizer(&self) {
        let said = self.say(&["run", "conf.toml", "--until", "tokenizer"]);
        assert_eq!(said.code, 0, "{said:?}");
        let files = tree(&self.path("out/stages/tokenizer"));
        let json = files.iter().find(|path| path.ends_with("tokenizer.json")).unwrap();
        std::fs::copy(json, self.path("tokenizer.json")).unwrap();
        self.change("conf.toml", "train = { vocab = 400 }", "url = \"tokenizer.json\"");
    }

    /// Gives the folder its own recipe, so that it can be committed.
    pub fn own_recipe(&self) {
        self.write("sql/mixtures/own.sql", std::fs::read(recipe("per_source")).unwrap());
        self.change("conf.toml", &recipe("per_source"), "sql/mixtures/own.sql");
    }

    /// Replaces a text in a file.
    pub fn change(&self, name: &str, old: &str, new: &str) {
        let text = std::fs::read_to_string(self.path(name)).unwrap();
        assert!(text.contains(old), "{old} is not in {name}");
        self.write(name, text.replace(old, new));
    }

    pub fn git(&self, arguments: &[&str]) {
        let done = Command::new("git").current_dir(self.dir.path()).args(arguments).output().unwrap();
        assert!(done.status.success(), "{done:?}");
    }

    /// Commits `conf.toml` and `sql/`.
    pub fn commit(&self, message: &str) {
        self.git(&["add", "conf.toml", "sql"]);
        self.git(&["-c", "user.name=t", "-c", "user.email=t@t.invalid", "commit", "-qm", message]);
    }

    /// Runs `conf.toml` to the end and returns the run's directory.
    pub fn run(&self, more: &[&str]) -> PathBuf {
        let mut arguments = vec!["run", "conf.toml"];
        arguments.extend(more);
        let said = self.say(&arguments);
        assert_eq!(said.code, 0, "{}", said.err);
        PathBuf::from(said.out.lines().last().unwrap_or_default())
    }

    /// The rows of `lengthwise sql … --json`. `more` are the `--set`s of the run that is queried.
    pub fn sql(&self, query: &str, more: &[&str]) -> Vec<Value> {
        let mut arguments = vec!["sql", "conf.toml", query, "--json"];
        arguments.extend(more);
        let said = self.say(&arguments);
        assert_eq!(said.code, 0, "{}", said.err);
        said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

pub fn said(output: Output) -> Said {
    Said {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        // messages are wrapped to a terminal's width, which is undone here
        err: String::from_utf8_lossy(&output.stderr)
            .replace('│', " ")
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" "),
    }
}

/// The packed files of a run, by name.
pub fn packed(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for folder in ["data", "heldout"] {
        for entry in std::fs::read_dir(run.join(folder)).into_iter().flatten() {
            let entry = entry.unwrap();
            files.insert(
                format!("{folder}/{}", entry.file_name().display()),
                std::fs::read(entry.path()).unwrap(),
            );
        }
    }
    assert!(files.len() >= 2, "{} has no packed files", run.display());
    files
}

/// Sends SIGTERM to a program.
pub fn terminate(child: &Child) {
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
}

/// All files below a folder.
pub fn tree(folder: &Path) -> Vec<PathBuf> {
    let mut files = vec![];
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(tree(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

/// Changes the bytes of a file in a new file, because a disk error would not affect its hard links.
pub fn rewrite(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    std::fs::remove_file(path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

pub fn flip(bytes: &mut [u8]) {
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
}

//! `docs/reference/`, written from the code: a test fails when a page there is not that of the code.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use arrow::datatypes::DataType;
use clap::{Arg, ArgAction, Command, CommandFactory};
use datafusion::execution::FunctionRegistry;
use datafusion::prelude::SessionContext;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

use super::Arguments;
use crate::conf::{Conf, Count, Size};
use crate::directory::{Attempt, RunManifest};
use crate::error::EXIT_CODES;
use crate::output::Manifest;
use crate::sql::functions::{OURS, register};
use crate::sql::recipe::{BUILTIN, FORM, RESULT, allowed};
use crate::stage::STAGES;
use crate::stages::catalog::OF_RECIPES;
use crate::tables::{LENGTH_BUCKET_NAMES, SEEN};

const WRITE: &str = "LENGTHWISE_WRITE_REFERENCE";

#[test]
fn the_reference_pages_are_those_of_the_code() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference");
    let schema = conf_schema();
    let editors = serde_json::to_string_pretty(&schema).unwrap() + "\n";
    for (page, text) in [
        ("conf.schema.json", editors),
        ("conf.md", conf(&schema)),
        ("command-line.md", command_line()),
        ("sql.md", sql(&schema)),
        ("files.md", files()),
    ] {
        let path = folder.join(page);
        if std::env::var_os(WRITE).is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&path, &text).unwrap();
        }
        let there = std::fs::read_to_string(&path).unwrap_or_default();
        let same = there.lines().zip(text.lines()).take_while(|(there, text)| there == text).count();
        assert!(
            there == text,
            "docs/reference/{page} is not that of the code, from line {} on; this writes it:\n  \
             {WRITE}=1 cargo test --release --lib the_reference_pages",
            same + 1
        );
    }
}

/// The schema of a type, all of it in one piece.
fn schema_of<T: JsonSchema>() -> Value {
    let mut settings = SchemaSettings::draft07();
    settings.inline_subschemas = true;
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    simplify(&mut schema);
    schema
}

fn conf_schema() -> Value {
    let mut schema = schema_of::<Conf>();
    schema["title"] = "lengthwise: the conf of a run".into();
    schema
}

/// Takes null out, which TOML does not have, and writes each description in a line.
fn simplify(schema: &mut Value) {
    match schema {
        Value::Array(parts) => parts.iter_mut().for_each(simplify),
        Value::Object(object) => {
            object.values_mut().for_each(simplify);
            if let Some(Value::String(text)) = object.get_mut("description") {
                *text = text.replace('\n', " ");
            }
            if object.get("default").is_some_and(Value::is_null) {
                object.shift_remove("default");
            }
            if let Some(Value::Array(values)) = object.get_mut("enum") {
                values.retain(|value| !value.is_null());
            }
            if let Some(Value::Array(types)) = object.get_mut("type") {
                types.retain(|name| name != "null");
                if let [one] = types.as_slice() {
                    let one = one.clone();
                    object.insert("type".into(), one);
                }
            }
            if let Some(Value::Array(any)) = object.get_mut("anyOf") {
                any.retain(|one| one["type"] != "null");
                if let [Value::Object(one)] = any.as_slice() {
                    let one = one.clone();
                    object.shift_remove("anyOf");
                    for (key, value) in one {
                        object.entry(key).or_insert(value);
                    }
                }
            }
        }
        _ => {}
    }
}

fn properties(schema: &Value) -> Option<&Map<String, Value>> {
    schema["properties"].as_object()
}

/// What a key takes, as it would be written in TOML or JSON.
fn kind(schema: &Value) -> String {
    let list = |key: &str| schema[key].as_array();
    let any = |of: &[Value], show: fn(&Value) -> String| of.iter().map(show).collect::<Vec<_>>().join(" or ");
    if let (Some(title), None) = (schema["title"].as_str(), properties(schema)) {
        return title.to_owned();
    }
    if let Some(all) = list("anyOf").or(list("oneOf")) {
        return any(all, kind);
    }
    if let Some(values) = list("enum") {
        return any(values, |value| format!("`{value}`"));
    }
    if let Some(value) = schema.get("const") {
        return format!("`{value}`");
    }
    match schema["type"].as_str() {
        Some("string") => "text".to_owned(),
        Some("integer") => "whole number".to_owned(),
        Some("number") => "number".to_owned(),
        Some("boolean") => "true or false".to_owned(),
        Some("array") => format!("[{}, …]", kind(&schema["items"])),
        Some("object") => match properties(schema) {
            Some(keys) => {
                let keys: Vec<String> =
                    keys.iter().map(|(key, value)| format!("{key} = {}", kind(value))).collect();
                format!("{{ {} }}", keys.join(", "))
            }
            None => format!("{{ NAME = {}, … }}", kind(&schema["additionalProperties"])),
        },
        _ => "any value".to_owned(),
    }
}

/// What a key means, and each of its values.
fn meaning(schema: &Value) -> String {
    let mut text = schema["description"].as_str().unwrap_or_default().to_owned();
    let of_items = &schema["items"];
    let all = ["anyOf", "oneOf"].map(|key| schema[key].as_array().or(of_items[key].as_array()));
    for one in all.into_iter().flatten().flatten() {
        if let Some(description) = one["description"].as_str() {
            let _ = write!(text, "<br>{}: {description}", kind(one));
        }
    }
    text
}

/// A default as it would be written; a long one is said in the key's meaning.
fn default(schema: &Value) -> String {
    match (&schema["default"], schema["title"].as_str()) {
        (Value::Null | Value::Object(_), _) => String::new(),
        (Value::Number(number), Some("bytes")) => {
            format!("`\"{}\"`", Size(number.as_u64().expect("sizes are whole")))
        }
        (value, _) => match value.to_string() {
            long if long.chars().count() > 30 => String::new(),
            short => format!("`{short}`"),
        },
    }
}

/// A row of a table.
fn row<const N: usize>(out: &mut String, cells: [String; N]) {
    let _ = writeln!(out, "| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
}

fn head<const N: usize>(out: &mut String, names: [&str; N]) {
    row(out, names.map(str::to_owned));
    let _ = writeln!(out, "|{}", "---|".repeat(N));
}

/// The table that a key holds, alone, in a list or by name, and what is written behind the key for it.
fn table(schema: &Value) -> Option<(String, &Value)> {
    if properties(schema).is_some() {
        return Some((String::new(), schema));
    }
    let within = |key: &str, mark: &str| {
        let (rest, of) = table(schema.get(key)?)?;
        Some((format!("{mark}{rest}"), of))
    };
    within("items", "[]").or_else(|| within("additionalProperties", ".NAME"))
}

/// A page's tables of keys, each below a heading.
struct Keys {
    out: String,
    /// Whether it is a conf, whose keys have defaults.
    is_conf: bool,
    /// The headings, by the keys below them: nothing is described twice.
    known: BTreeMap<String, String>,
}

impl Keys {
    fn heading(&self, path: &str) -> String {
        match path.strip_suffix("[]") {
            _ if !self.is_conf => path.to_owned(),
            Some(path) => format!("[[{path}]]"),
            None => format!("[{path}]"),
        }
    }

    /// Describes a table, and those in it.
    fn describe(&mut self, path: &str, schema: &Value, description: &str) {
        let level = if self.is_conf { "##" } else { "###" };
        let _ = writeln!(self.out, "{level} `{}`\n\n{description}\n", self.heading(path));
        self.fields(&format!("{path}."), schema);
    }

    fn fields(&mut self, prefix: &str, schema: &Value) {
        if self.is_conf {
            head(&mut self.out, ["key", "takes", "default", "meaning"]);
        } else {
            head(&mut self.out, ["field", "value", "meaning"]);
        }
        let required =
            |key: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|k| k == key));
        let mut inner = vec![];
        for (key, value) in properties(schema).into_iter().flatten() {
            let takes = match table(value) {
                None => kind(value),
                Some((mark, of)) => {
                    let path = format!("{prefix}{key}{mark}");
                    let keys = of["properties"].to_string();
                    let heading = self.heading(&path);
                    let is_new = !self.known.contains_key(&keys);
                    let known = self.known.entry(keys).or_insert(heading).clone();
                    if is_new {
                        inner.push((
                            path,
                            of.clone(),
                            value["description"].as_str().unwrap_or_default().to_owned(),
                        ));
                    }
                    format!("`{known}`")
                }
            };
            let (key, meaning) = (format!("`{key}`"), meaning(value));
            if self.is_conf {
                let default =
                    if required(key.trim_matches('`')) { "required".to_owned() } else { default(value) };
                row(&mut self.out, [key, takes, default, meaning]);
            } else {
                row(&mut self.out, [key, takes, meaning]);
            }
        }
        self.out.push('\n');
        for (path, schema, description) in inner {
            let own = schema["description"].as_str().map(str::to_owned);
            self.describe(&path, &schema, &own.unwrap_or(description));
        }
    }
}

fn conf(schema: &Value) -> String {
    let takes = |schema: Value| schema["description"].as_str().unwrap_or_default().to_owned();
    let out = format!(
        "# The conf

{MADE}

A run has one conf, a TOML file. A key that is not known here is an error. `${{VAR}}` and `${{VAR:-default}}` are replaced in
urls and paths, and `--set key=value` changes a key for once.

Editors check a conf, complete its keys and show what they mean, if its first line names
[the schema](conf.schema.json), as Taplo and Even Better TOML read it:

    #:schema ../docs/reference/conf.schema.json

Two kinds of values have a name here:

- **tokens**: {}
- **bytes**: {}

",
        takes(schema_of::<Count>()),
        takes(schema_of::<Size>())
    );
    let mut keys = Keys { out, is_conf: true, known: BTreeMap::new() };
    for (key, value) in properties(schema).into_iter().flatten() {
        let (mark, of) = table(value).expect("the conf has tables only");
        let description = [value, of].into_iter().find_map(|of| of["description"].as_str());
        keys.describe(&format!("{key}{mark}"), of, description.unwrap_or_default());
    }
    keys.out.trim_end().to_owned() + "\n"
}

fn command_line() -> String {
    let mut program = Arguments::command();
    program.build();
    let mut out = format!("# The command line\n\n{MADE}\n\n{}\n\n", text(program.get_about()));
    // the build with the feature `cluster` has one more
    let commands: Vec<&Command> = program
        .get_subcommands()
        .filter(|command| !["help", "cluster"].contains(&command.get_name()))
        .collect();
    head(&mut out, ["command", "what it does"]);
    for command in &commands {
        let name = command.get_name();
        row(&mut out, [format!("[`{name}`](#{name})"), text(command.get_about())]);
    }
    out.push_str(
        "
Results go to stdout, progress and the log to stderr. [Scheduling](../guides/scheduling.md) lists the
variables that the program reads. A build with the feature `cluster` also has the command `cluster`; see
[Cluster](../guides/cluster.md) and `lengthwise cluster --help`.

## Exit codes

",
    );
    head(&mut out, ["code", "meaning"]);
    for (code, meaning) in EXIT_CODES {
        row(&mut out, [code.to_string(), meaning.to_owned()]);
    }
    out.push_str("\n## Stages\n\nThe stages of a run, in order, as `--until` and `--from` name them:\n\n");
    head(&mut out, ["stage", "what it makes", "what it reads"]);
    for about in &STAGES {
        let reads: Vec<&str> = about.reads.iter().map(|stage| stage.name()).collect();
        row(&mut out, [format!("`{}`", about.name), about.makes.to_owned(), reads.join(", ")]);
    }
    for command in commands {
        let usage = command.clone().render_usage().to_string();
        let usage = usage.trim_start_matches("Usage: ");
        let _ =
            write!(out, "\n## {}\n\n{}\n\n    {usage}\n\n", command.get_name(), text(command.get_about()));
        head(&mut out, ["argument", "values", "default", "meaning"]);
        let arguments =
            command.get_arguments().filter(|arg| !["help", "version"].contains(&arg.get_id().as_str()));
        arguments.for_each(|arg| argument(&mut out, arg));
        if let Some(after) = command.get_after_help() {
            let _ = write!(out, "\n```text\n{}\n```\n", after.to_string().trim_end());
        }
    }
    out
}

fn text(styled: Option<&clap::builder::StyledStr>) -> String {
    let text = styled.map(ToString::to_string).unwrap_or_default();
    text.replace('\n', " ").replace('<', "&lt;")
}

fn argument(out: &mut String, arg: &Arg) {
    let takes_values = arg.get_action().takes_values();
    let value = match arg.get_value_names() {
        Some(names) => names.join(" "),
        None => arg.get_id().as_str().to_uppercase(),
    };
    let short = arg.get_short().map(|short| format!("-{short}, ")).unwrap_or_default();
    let name = match arg.get_long() {
        Some(long) if takes_values => format!("`{short}--{long} {value}`"),
        Some(long) => format!("`{short}--{long}`"),
        None => format!("`{value}`"),
    };
    let quoted = |values: Vec<String>| values.iter().map(|v| format!("`{v}`")).collect::<Vec<_>>().join(", ");
    let (mut values, mut default) = (String::new(), String::new());
    if takes_values {
        values = quoted(arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect());
        default = quoted(arg.get_default_values().iter().map(|v| v.to_string_lossy().into_owned()).collect());
    }
    if arg.is_required_set() {
        default = "required".to_owned();
    }
    let mut help = text(arg.get_help());
    if matches!(arg.get_action(), ArgAction::Append) && arg.get_value_delimiter().is_none() {
        help += ". May be given several times";
    }
    if let Some(variable) = arg.get_env() {
        let _ = write!(help, ". Also the variable `{}`", variable.to_string_lossy());
    }
    row(out, [name, values, default, help]);
}

/// What columns mean, by their name, or by the table's and theirs where it is another thing there.
const COLUMNS: &[(&str, &str)] = &[
    ("doc_id", "the document: a hash of its domain and its text"),
    ("domain", "the domain"),
    ("tokens", "how many tokens the document has"),
    ("bytes", "how many bytes its text has, in UTF-8"),
    ("origin", "the name of its source"),
    ("text_id", "a hash of the text, the same in every domain"),
    ("part", "which part of the stored ids holds the document"),
    ("rejects.file", "the file that the row is in"),
    ("line", "the line or row of the file"),
    ("reason", "why the row was rejected, in a word"),
    ("detail", "what exactly is wrong with it"),
    ("chunk", "the place of this row among those of the document, from 0"),
    ("ids", "the ids; unsigned whole numbers of 16 bits, or of 32 where the vocabulary needs them"),
    ("start", "the first token of the span"),
    ("stop", "the token behind the span's last"),
    ("copy", "which copy of the span it is, from 0"),
    ("copies", "how often the span is drawn on average, a multiple of 2⁻³²"),
    ("stratum", "the stratum that the recipe names; empty if it names none"),
    ("domains.documents", "how many documents the domain has"),
    ("domains.tokens", "how many tokens they have"),
    ("domains.share", "the domain's share of all tokens"),
    ("long_documents", "how many documents are long"),
    ("long_tokens", "how many tokens are in long documents"),
    ("p25", "the length that a quarter of the documents do not exceed"),
    ("p50", "the length that half of the documents do not exceed"),
    ("p75", "the length that three quarters of the documents do not exceed"),
    ("p90", "the length that 90 in 100 documents do not exceed"),
    ("p99", "the length that 99 in 100 documents do not exceed"),
    ("longest", "the length of the longest document"),
    ("documents_by_length", "how many documents each length bucket has"),
    ("tokens_by_length", "how many tokens each length bucket has"),
    ("shares.share", "the target share of the budget; all of them sum to 1"),
    ("input_ids", "the ids of the sequence"),
    ("labels", "the one id that follows the sequence; -100 if none does"),
    (
        "packed.source",
        "the documents in the sequence: domain, document, and the tokens from `start` to before `end`",
    ),
    ("result.doc_id", "a document of `documents`"),
    ("result.start", "the first token of the span, from 0"),
    ("result.stop", "the token behind the span's last; the span has at most `$max_span` tokens"),
    (
        "result.copies",
        "how often the span should be drawn; `0.3` is drawn with probability 0.3, `2.5` twice or three times",
    ),
    (
        "result.stratum",
        "a name; each stratum of each domain meets its own budget. This column may be left out",
    ),
];

fn columns<'a>(out: &mut String, table: &str, columns: impl Iterator<Item = (&'a String, &'a DataType)>) {
    head(out, ["column", "type", "meaning"]);
    for (name, kind) in columns {
        let own = format!("{table}.{name}");
        let of = |name: &str| COLUMNS.iter().find(|(column, _)| *column == name);
        let (_, meaning) = of(&own).or_else(|| of(name)).unwrap_or_else(|| panic!("COLUMNS lacks {own}"));
        row(out, [format!("`{name}`"), sql_type(kind), (*meaning).to_owned()]);
    }
    out.push('\n');
}

fn sql_type(kind: &DataType) -> String {
    match kind {
        DataType::Utf8 => "varchar".to_owned(),
        DataType::Int64 => "bigint".to_owned(),
        DataType::Int32 => "int".to_owned(),
        DataType::UInt16 => "unsigned".to_owned(),
        DataType::Float64 => "double".to_owned(),
        DataType::Boolean => "boolean".to_owned(),
        DataType::FixedSizeBinary(bytes) => format!("{bytes} bytes"),
        DataType::List(item) => format!("list of {}", sql_type(item.data_type())),
        DataType::Struct(fields) => {
            let fields: Vec<String> = fields
                .iter()
                .map(|field| format!("{} {}", field.name(), sql_type(field.data_type())))
                .collect();
            format!("struct({})", fields.join(", "))
        }
        other => panic!("sql_type lacks {other}"),
    }
}

fn sql(conf: &Value) -> String {
    let mut out = format!(
        "# SQL

{MADE}

SQL is DataFusion's. A text is one SELECT; WITH gives its steps names. There are three places for it:

| text | what it is | tables that it sees |
|---|---|---|
| recipe, `[mixture] recipe` | the spans to draw from | `documents` without what is held out, `domains`, `shares` |
| check, `sql/checks/STAGE_….sql` | the rows that are wrong; if there are any, the stage is not published | of `catalog`: `catalog`; of `domains`: `documents` as a recipe sees it, `domains`, `shares`; of `mixture`: `mixture`; of `draw`: `drawn` |
| `lengthwise sql CONF QUERY` | a question | all below, of the stages that have been computed |

## Tables

",
    );
    let stage_of = |name: &str| SEEN.iter().find(|seen| seen.name == name).expect("a table").stage.name();
    let _ = writeln!(
        out,
        "A recipe sees each distinct document once, with the columns {}. The length buckets are {}; a document at a bound is \
         in the bucket above it.\n",
        OF_RECIPES.map(|name| format!("`{name}`")).join(", "),
        LENGTH_BUCKET_NAMES.join(", ")
    );
    for seen in &SEEN {
        let _ = writeln!(
            out,
            "### `{}`\n\nOne row is {}. Stage `{}` makes it.\n",
            seen.name,
            seen.row,
            stage_of(seen.name)
        );
        let schema = (seen.schema)();
        columns(&mut out, seen.name, schema.fields().iter().map(|field| (field.name(), field.data_type())));
    }
    out.push_str(
        "## What a recipe returns\n\nOne row is a span to draw from. No two spans of a document overlap.\n\n",
    );
    let result = RESULT.map(|(name, kind)| (name.to_owned(), kind));
    columns(&mut out, "result", result.iter().map(|(name, kind)| (name, kind)));

    out.push_str("## Parameters\n\nEvery recipe has these, all of type bigint:\n\n");
    head(&mut out, ["parameter", "key of the conf", "meaning"]);
    for name in BUILTIN {
        let table = if name == "seed" { "run" } else { "mixture" };
        let key = &conf["properties"][table]["properties"][name];
        assert!(key.is_object(), "the conf has no {table}.{name}");
        row(&mut out, [format!("`${name}`"), format!("`{table}.{name}`"), meaning(key)]);
    }
    let _ = write!(
        out,
        "\nA recipe's own parameters are declared in the comment at its top, and set in `[mixture.params]`: {FORM}.\n\n\
         Checks have `$budget`, `$long_tokens`, `$max_copies` and `$max_span`.\n\n\
         ## Functions\n\nA recipe may call what gives the same result on every machine, at any time, in any order of rows. \
         Checks and `lengthwise sql` may call DataFusion's other functions, too. \
         Arithmetic that overflows or divides by zero is an error; what is no number (`ln(-1)`) is null.\n\n\
         These are lengthwise's own:\n\n"
    );
    let session = SessionContext::new();
    register(&session);
    head(&mut out, ["function", "result"]);
    for (call, result) in OURS {
        let name = call.split('(').next().unwrap_or_default();
        let is_scalar = session.udf(name).is_ok() && allowed::SCALARS.contains(&name);
        let is_aggregate = session.udaf(name).is_ok() && allowed::AGGREGATES.contains(&name);
        assert!(is_scalar || is_aggregate, "{name}");
        row(&mut out, [format!("`{call}`"), result.to_owned()]);
    }
    let quoted = |names: &[&str]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let ours = OURS.map(|(call, _)| call.split('(').next().unwrap_or_default());
    let others = |all: &[&'static str]| -> Vec<&str> {
        all.iter().copied().filter(|name| !ours.contains(name)).collect()
    };
    let _ = write!(
        out,
        "\nThese are DataFusion's:\n\n\
         - of values: {}\n\
         - of a group's rows: {}, and `sum` of decimals\n\
         - of a row's place in a window: {}; all but `rank`, `dense_rank`, `percent_rank` and `cume_dist` need an ORDER BY \
         that leaves no two rows equal\n\
         - that make a table: {}\n\n\
         ### What is refused in a recipe\n\n",
        quoted(&others(allowed::SCALARS)),
        quoted(&others(allowed::AGGREGATES)),
        quoted(allowed::WINDOWS),
        quoted(allowed::TABLES)
    );
    head(&mut out, ["function", "reason: it …", "instead"]);
    for (names, reason, instead) in allowed::REFUSED {
        row(&mut out, [quoted(names), (*reason).to_owned(), (*instead).to_owned()]);
    }
    let rounded = "write it with `exact_sum(x)`, which adds up floats and integers the same in any order";
    for (names, reason, instead) in [
        (allowed::FLOAT_SUMS, "adds up floats: the last bits depend on the order of the rows", rounded),
        (
            &["sum", "avg"],
            "adds up floats, or integers whose sum may be too large; decimals may be summed",
            rounded,
        ),
        (
            &["first_value", "last_value", "nth_value", "array_agg", "string_agg"],
            "depends on the order of rows that tie, unless ORDER BY leaves no two rows equal",
            "add columns to ORDER BY, such as `doc_id`",
        ),
        (&["any_value"], "may be another one on every run", "write `min(x)`"),
        (&["approx_distinct"], "depends on how rows are split", "write `count(distinct x)`"),
        (
            &["approx_median", "approx_percentile_cont", "approx_percentile_cont_with_weight"],
            "depends on how rows are split",
            "`median(x)` and `percentile_cont(x, 0.5)` are exact",
        ),
    ] {
        row(&mut out, [quoted(names), reason.to_owned(), instead.to_owned()]);
    }
    out.push_str(
        "
Also refused: LIMIT and DISTINCT ON without a total order, TABLESAMPLE, LATERAL, files, and any function that is in no list
here. The message names the place and the cure.
",
    );
    out
}

fn files() -> String {
    let out = format!(
        "# Files

{MADE}

## The directory of a run

`lengthwise run` prints it as its last line: `OUTPUT/runs/NAME-HASH/`.

| file | what it is |
|---|---|
| `manifest.json` | all that the run was made of and all that it made; written last. It says neither when nor where |
| `data/train-00000-of-000NN.parquet` | the packed sequences |
| `heldout/heldout-00000-of-000NN.parquet` | the packed documents that no recipe saw |
| `checkpoint/` | the trained model, as Hugging Face's transformers reads it |
| `checkpoint/metrics.jsonl` | one line for each step of the training |
| `eval/NAME/cases.jsonl` | one line for each case of an evaluation |
| `report.html` | what was asked, what came of it, from what; one offline file |
| `README.md` | the dataset's card; `checkpoint/README.md` is the model's |
| `attempts/TIME.json` | when and where it was run |
| `attempts/TIME-manifest-before.json` | what the manifest said before that attempt |

## The output

`[run] output` names it. A folder of a stage without a manifest is not finished: the next run goes on with it, and
`lengthwise gc` removes it once it is old.

| file | what it is |
|---|---|
| `stages/STAGE/KEY/manifest.json` | what the stage's output is; written last |
| `stages/STAGE/KEY/begun` | written first; its age says whether somebody is at work |
| `stages/STAGE/KEY/jobs/JOB.json` | what a finished job wrote; a run that was stopped goes on behind it |
| `stages/STAGE/KEY/…` | the files that the manifest names |
| `runs/NAME-HASH/` | the directory of a run |
| `latest/NAME.json` | the keys of the last run of this name, for `lengthwise plan` |
| `tokenizers/DIGEST.json` | a tokenizer, for the executors of a cluster |
| `tasks/KEY.json` | a message to an executor of a cluster |
| `reproduced/` | the output of `lengthwise reproduce` |

A KEY is a hash of all that a stage's output depends on: the same key is the same output. Manifests and jobs end with a field
`blake3`, the digest of all that stands before it. In the tables below, `[]` is a list, and NAME is any name.

"
    );
    let mut keys = Keys { out, is_conf: false, known: BTreeMap::new() };
    for (title, schema) in [
        ("A run's `manifest.json`", schema_of::<RunManifest>()),
        ("A stage's `manifest.json`", schema_of::<Manifest>()),
        ("An attempt, `attempts/TIME.json`", schema_of::<Attempt>()),
    ] {
        let description = schema["description"].as_str().unwrap_or_default().to_owned();
        let _ = writeln!(keys.out, "## {title}\n\n{description}\n");
        keys.fields("", &schema);
    }
    keys.out.trim_end().to_owned() + "\n"
}

/// What stands at the top of every page.
const MADE: &str = "This page is generated from the code; a test fails when they differ.";

//! SQL files: where they are found, and how their parameters are bound.

pub mod engine;
pub mod functions;
mod parameters;
pub mod recipe;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use datafusion::common::ScalarValue;
use datafusion::prelude::{DataFrame, SessionContext};
use datafusion::sql::parser::Statement as AnyStatement;
use datafusion::sql::sqlparser::ast::{Query, Statement};

use crate::error::Doing;
use crate::sql::engine::query;
use crate::sql::recipe::{Parsed, Text};
use crate::{Error, Result};

/// All files of `sql/` by path in the repository: the stages, checks and recipes that are compiled into this
/// build.
pub const BUILT_IN: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/built_in.rs"));

/// The built-in recipes, as pairs of path and text.
pub fn recipes() -> impl Iterator<Item = (&'static str, &'static str)> {
    BUILT_IN.iter().filter(|(path, _)| path.starts_with("sql/mixtures/")).copied()
}

/// The stages whose tables are checked.
const CHECKED: [&str; 4] = ["catalog", "domains", "mixture", "draw"];

/// The folder of checks.
const CHECKS: &str = "sql/checks/";

/// Where conf and SQL files are read from: a folder, a commit of its git repository, or the manifest of an
/// old run.
#[derive(Clone, Debug, Default)]
pub struct Files {
    pub root: PathBuf,
    pub commit: Option<String>,
    /// The texts of a manifest by path. If there are any, nothing else is read.
    pub texts: BTreeMap<String, String>,
}

impl Files {
    /// The text of a file. `path` is relative to the root; if no commit is set, it may also be absolute.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no such file or it is not UTF-8; [`Error::Io`] if it cannot be read.
    pub fn read(&self, path: &str) -> Result<String> {
        self.find(path)?.ok_or_else(|| {
            let place =
                self.commit.as_ref().map_or(self.root.display().to_string(), |c| format!("commit {c}"));
            Error::usage(
                format!("there is no file `{path}` in {place}"),
                "paths are relative to the folder where the command runs; with --at, to the commit's root",
            )
        })
    }

    fn find(&self, path: &str) -> Result<Option<String>> {
        if !self.texts.is_empty() {
            return Ok(self.texts.get(path).cloned());
        }
        let found = match &self.commit {
            None => match std::fs::read(self.root.join(path)) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
                read => Some(read.doing(|| format!("cannot read {path}"))?),
            },
            Some(commit) => {
                let name = format!("{commit}:{}", path.trim_start_matches("./"));
                let shown = git(&self.root, &["show", &name])?;
                shown.status.success().then_some(shown.stdout)
            }
        };
        found.map(|bytes| text(path, bytes)).transpose()
    }

    /// The files of each stage's checks: those of this build and the folder's own, which replace built-in
    /// checks of the same name. A check's name begins with its stage's name.
    ///
    /// # Errors
    /// [`Error::Usage`] if a file in the folder of checks belongs to no checked stage or would never run.
    pub fn checks(&self) -> Result<BTreeMap<&'static str, Vec<String>>> {
        let of = |file: &str| {
            let (stage, _) = file.strip_prefix(CHECKS)?.strip_suffix(".sql")?.split_once('_')?;
            CHECKED.into_iter().find(|checked| *checked == stage)
        };
        // a reproduced run has the checks of its manifest, and no others
        let own = match self.texts.is_empty() {
            true => self.own_checks()?,
            false => self.texts.keys().filter(|file| of(file).is_some()).cloned().collect(),
        };
        let built_in = BUILT_IN.iter().map(|(file, _)| (*file).to_owned());
        let built_in = built_in.filter(|file| self.texts.is_empty() && of(file).is_some());
        let mut files: Vec<String> = own.into_iter().chain(built_in).collect();
        files.sort();
        files.dedup();
        let mut checks: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for file in files {
            let Some(stage) = of(&file) else {
                return Err(Error::usage(
                    format!("`{file}` is a check of no stage that runs checks: it would never run"),
                    format!(
                        "a check's name begins with its stage's and `_`; checks run after {}",
                        CHECKED.join(", ")
                    ),
                ));
            };
            checks.entry(stage).or_default().push(file);
        }
        Ok(checks)
    }

    /// The SQL files in the folder of checks.
    fn own_checks(&self) -> Result<Vec<String>> {
        let names: Vec<String> = match &self.commit {
            Some(commit) => {
                let listed = git(&self.root, &["ls-tree", "--name-only", commit, CHECKS])?;
                String::from_utf8_lossy(&listed.stdout).lines().map(str::to_owned).collect()
            }
            None => match std::fs::read_dir(self.root.join(CHECKS)) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => vec![],
                entries => {
                    let doing = || format!("cannot list {CHECKS}");
                    let name = |entry: std::io::Result<std::fs::DirEntry>| {
                        Ok(format!("{CHECKS}{}", entry.doing(doing)?.file_name().to_string_lossy()))
                    };
                    entries.doing(doing)?.map(name).collect::<Result<_>>()?
                }
            },
        };
        // editors leave hidden files
        let hidden = format!("{CHECKS}.");
        let names: Vec<String> = names.into_iter().filter(|file| !file.starts_with(&hidden)).collect();
        let never = |file: &&String| {
            let is_folder = self.commit.is_none() && self.root.join(file.as_str()).is_dir();
            is_folder || (file.to_lowercase().ends_with(".sql") && !file.ends_with(".sql"))
        };
        if let Some(file) = names.iter().find(never) {
            let help = "checks are files NAME.sql, in small letters, in sql/checks itself";
            return Err(Error::usage(format!("`{file}` is no check that would ever run"), help));
        }
        Ok(names.into_iter().filter(|file| file.ends_with(".sql")).collect())
    }

    /// The SQL of a stage: the folder's own file if there is one, otherwise the built-in file.
    pub fn stage(&self, path: &str) -> Result<String> {
        if let Some(text) = self.find(path)? {
            return Ok(text);
        }
        let built_in = BUILT_IN.iter().find(|(name, _)| *name == path);
        Ok(built_in.expect("stages name their own files").1.to_owned())
    }
}

/// Runs git in a folder.
pub fn git(root: &std::path::Path, arguments: &[&str]) -> Result<std::process::Output> {
    std::process::Command::new("git")
        .arg("-C")
        .arg(root)
        .args(arguments)
        .output()
        .map_err(|source| Error::Io { doing: "cannot run git".into(), source })
}

/// The text of a file, without a byte order mark.
///
/// # Errors
/// [`Error::Usage`] if it is not UTF-8, is compressed, or contains a zero byte.
fn text(path: &str, bytes: Vec<u8>) -> Result<String> {
    let refused = |what: String, help: &str| Err(Error::usage(format!("{path} {what}"), help));
    let line = |end: usize| 1 + bytes[..end].iter().filter(|byte| **byte == b'\n').count();
    if bytes.starts_with(&[0x1f, 0x8b]) || bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        return refused(
            "is compressed".into(),
            "decompress it with `gzip -d` or `zstd -d`, and name the text",
        );
    }
    let is_utf16 = bytes.starts_with(&[0xff, 0xfe])
        || bytes.starts_with(&[0xfe, 0xff])
        // UTF-16 without a byte order mark: every second byte of a Latin text is zero
        || [0, 1].iter().any(|first| {
            let half = bytes.iter().skip(*first).step_by(2);
            bytes.len() > 1 && 2 * half.filter(|byte| **byte == 0).count() > bytes.len() / 2
        });
    if is_utf16 {
        return refused(
            "is UTF-16, and not UTF-8".into(),
            "save it as UTF-8; `iconv -f UTF-16 -t UTF-8` does it",
        );
    }
    if let Some(at) = bytes.iter().position(|byte| *byte == 0) {
        let help = "is it a text, and whole? Write it anew, or take it from version control";
        return refused(format!("has a byte of zero in line {}", line(at)), help);
    }
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(text.strip_prefix('\u{feff}').unwrap_or(text).to_owned()),
        Err(error) => refused(
            format!("is not UTF-8, from line {} on", line(error.valid_up_to())),
            "save it as UTF-8; if its encoding is Latin-1, `iconv -f LATIN1 -t UTF-8` does it",
        ),
    }
}

/// One SQL statement of a stage, or a check.
pub struct StageSql {
    pub file: String,
    /// The text as it stands in the file.
    pub text: String,
    /// Hash of the SQL tokens, without white space and comments. It is part of the stage's key. The query
    /// plan is not, because plans change with the version of DataFusion and the number of partitions.
    pub key: String,
    query: Box<Query>,
}

impl StageSql {
    pub fn parse(file: &str, text: &str) -> Result<Self> {
        let text = Text { file: file.to_owned(), text: text.to_owned() };
        let cure = "a stage's SQL, and a check, is one SELECT; WITH gives its steps names";
        let Parsed { query, key } = Parsed::of(&text, "this", cure)?;
        Ok(Self { file: text.file, text: text.text, key, query })
    }

    /// The names of the parameters that the query uses.
    pub fn parameters(&self) -> BTreeSet<String> {
        let used = parameters::used(&self.query).into_iter();
        used.map(|(written, _)| written.trim_start_matches('$').to_owned()).collect()
    }

    /// Plans the query with values for its parameters.
    ///
    /// # Errors
    /// [`Error::Data`] if the query uses a parameter that is not in `parameters`; [`Error::Query`] if it
    /// cannot be planned.
    pub async fn plan(
        &self,
        session: &SessionContext,
        parameters: &BTreeMap<&str, i64>,
    ) -> Result<DataFrame> {
        let unknown = self.parameters().into_iter().find(|name| !parameters.contains_key(name.as_str()));
        if let Some(name) = unknown {
            return Err(Error::data(
                format!("{}: there is no parameter ${name}", self.file),
                "the header lists the parameters of this stage",
            ));
        }
        let mut query_tree = self.query.clone();
        let value = |(name, value): (&&str, &i64)| ((*name).to_owned(), ScalarValue::Int64(Some(*value)));
        parameters::bind(&mut query_tree, &parameters.iter().map(value).collect());
        let doing = format!("cannot run {}", self.file);
        let statement = AnyStatement::Statement(Box::new(Statement::Query(query_tree)));
        let plan = session.state().statement_to_plan(statement).await;
        let plan = plan.map_err(|e| query(&doing, e))?;
        session.execute_logical_plan(plan).await.map_err(|e| query(&doing, e))
    }
}

/// `value` as JSON, as it enters a stage's key.
pub fn scalar_json(value: &ScalarValue) -> serde_json::Value {
    match value {
        ScalarValue::Int64(Some(v)) => (*v).into(),
        ScalarValue::Float64(Some(v)) => (*v).into(),
        ScalarValue::Boolean(Some(v)) => (*v).into(),
        ScalarValue::Utf8(Some(v)) => v.clone().into(),
        // an array with the type, because a parameter may also be the text "NULL"
        null if null.is_null() => vec![null.data_type().to_string().into(), serde_json::Value::Null].into(),
        other => other.to_string().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_null_has_another_key_than_any_value() {
        let values = [
            ScalarValue::Utf8(None),
            ScalarValue::Utf8(Some("NULL".into())),
            ScalarValue::Int64(None),
            ScalarValue::Float64(None),
        ];
        let keys: std::collections::BTreeSet<String> =
            values.iter().map(|value| scalar_json(value).to_string()).collect();
        assert_eq!(keys.len(), values.len(), "{keys:?}");
    }
}

//! SQL texts: where they are found, how parameters are bound, and their canonical form.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;

use datafusion::common::ScalarValue;
use datafusion::prelude::{DataFrame, SessionContext};
use datafusion::sql::parser::Statement as AnyStatement;
use datafusion::sql::sqlparser::ast::{Expr, Statement, Value, VisitMut, VisitorMut};
use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::parser::Parser;

use crate::engine::query;
use crate::{Error, Result};

/// The SQL files of the stages and their checks, as this build carries them.
const BUILT_IN: &[(&str, &str)] = &[
    ("sql/stages/catalog.sql", include_str!("../../sql/stages/catalog.sql")),
    ("sql/stages/heldout.sql", include_str!("../../sql/stages/heldout.sql")),
    ("sql/stages/domains.sql", include_str!("../../sql/stages/domains.sql")),
    ("sql/stages/shares.sql", include_str!("../../sql/stages/shares.sql")),
    ("sql/stages/shuffle.sql", include_str!("../../sql/stages/shuffle.sql")),
    (
        "sql/checks/catalog_has_each_document_once.sql",
        include_str!("../../sql/checks/catalog_has_each_document_once.sql"),
    ),
    (
        "sql/checks/domains_add_up_to_the_documents.sql",
        include_str!("../../sql/checks/domains_add_up_to_the_documents.sql"),
    ),
    (
        "sql/checks/domains_have_shares_that_sum_to_one.sql",
        include_str!("../../sql/checks/domains_have_shares_that_sum_to_one.sql"),
    ),
    (
        "sql/checks/draw_respects_max_copies.sql",
        include_str!("../../sql/checks/draw_respects_max_copies.sql"),
    ),
    (
        "sql/checks/mixture_has_spans_inside_their_documents.sql",
        include_str!("../../sql/checks/mixture_has_spans_inside_their_documents.sql"),
    ),
];

/// Where conf and SQL files are read: a folder, a commit of its git repository, or an old run's manifest.
#[derive(Clone, Debug, Default)]
pub struct Files {
    pub root: PathBuf,
    pub commit: Option<String>,
    /// The texts of a manifest, by path; where there are any, nothing else is read.
    pub texts: BTreeMap<String, String>,
}

impl Files {
    /// The text of a file, by its path relative to the root (or, without a commit, any path).
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
        let Some(commit) = &self.commit else {
            return match std::fs::read_to_string(self.root.join(path)) {
                Ok(text) => Ok(Some(text)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(Error::Io { doing: format!("cannot read {path}"), source }),
            };
        };
        let path = path.trim_start_matches("./");
        let shown = git(&self.root, &["show", &format!("{commit}:{path}")])?;
        Ok(shown.status.success().then(|| String::from_utf8_lossy(&shown.stdout).into_owned()))
    }

    /// The checks of a stage: those in the folder, or else those of this build. A check's name begins with its stage's.
    pub fn checks(&self, stage: &str) -> Result<Vec<String>> {
        let listed: Vec<String> = if !self.texts.is_empty() {
            self.texts.keys().cloned().collect()
        } else if let Some(commit) = &self.commit {
            let listed = git(&self.root, &["ls-tree", "--name-only", commit, "sql/checks/"])?;
            String::from_utf8_lossy(&listed.stdout).lines().map(str::to_owned).collect()
        } else {
            match std::fs::read_dir(self.root.join("sql/checks")) {
                Ok(entries) => {
                    let names = entries
                        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()));
                    names.map(|name| format!("sql/checks/{name}")).collect()
                }
                Err(_) => vec![],
            }
        };
        let prefix = format!("sql/checks/{stage}_");
        let own = |name: &String| name.starts_with(&prefix) && name.ends_with(".sql");
        let mut checks: Vec<String> = listed.into_iter().filter(own).collect();
        if checks.is_empty() {
            checks = BUILT_IN.iter().map(|(name, _)| (*name).to_owned()).filter(own).collect();
        }
        checks.sort();
        Ok(checks)
    }

    /// A stage's SQL: the folder's own file, or else the one this build carries.
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

/// One SQL statement of a stage.
pub struct StageSql {
    pub file: String,
    statement: Statement,
}

impl StageSql {
    pub fn parse(file: &str, text: &str) -> Result<Self> {
        let mut statements = Parser::parse_sql(&GenericDialect {}, text)
            .map_err(|e| Error::written(file, text, None, e.to_string(), "", None))?;
        match (statements.pop(), statements.pop()) {
            (Some(statement @ Statement::Query(_)), None) => Ok(Self { file: file.to_owned(), statement }),
            _ => Err(Error::written(file, text, None, "one SELECT is wanted", "", None)),
        }
    }

    /// The syntax tree printed: white space and comments don't matter. It is part of a stage's key; a query plan
    /// never is, for plans change with versions and partitions.
    pub fn canonical(&self) -> String {
        self.statement.to_string()
    }

    /// Plans the query, with `$name`s replaced by typed literals in the tree, never in the text.
    pub async fn plan(
        &self,
        session: &SessionContext,
        parameters: &BTreeMap<&str, i64>,
    ) -> Result<DataFrame> {
        struct Bind<'a>(&'a BTreeMap<&'a str, i64>);
        impl VisitorMut for Bind<'_> {
            type Break = String;
            fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<String> {
                let Expr::Value(value) = expr else { return ControlFlow::Continue(()) };
                let Value::Placeholder(name) = &value.value else { return ControlFlow::Continue(()) };
                match self.0.get(name.trim_start_matches('$')) {
                    Some(bound) => value.value = Value::Number(bound.to_string(), false),
                    None => return ControlFlow::Break(name.clone()),
                }
                ControlFlow::Continue(())
            }
        }
        let mut statement = self.statement.clone();
        if let ControlFlow::Break(name) = statement.visit(&mut Bind(parameters)) {
            return Err(Error::data(
                format!("{}: there is no parameter {name}", self.file),
                "the header lists the parameters of this stage",
            ));
        }
        let doing = format!("cannot run {}", self.file);
        let plan = session.state().statement_to_plan(AnyStatement::Statement(Box::new(statement))).await;
        let plan = plan.map_err(|e| query(&doing, e))?;
        session.execute_logical_plan(plan).await.map_err(|e| query(&doing, e))
    }
}

/// `value` as the JSON that goes into a stage's key.
pub fn scalar_json(value: &ScalarValue) -> serde_json::Value {
    match value {
        ScalarValue::Int64(Some(v)) => (*v).into(),
        ScalarValue::Float64(Some(v)) => (*v).into(),
        ScalarValue::Boolean(Some(v)) => (*v).into(),
        ScalarValue::Utf8(Some(v)) => v.clone().into(),
        // a null is none of the texts that a parameter may be
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

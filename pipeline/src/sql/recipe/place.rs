//! Places in a recipe's text, and errors that point to them.

use std::ops::{ControlFlow, Range};

use datafusion::common::{Column, SchemaError, Span as PlanSpan};
use datafusion::error::DataFusionError;
use datafusion::execution::SessionState;
use datafusion::sql::sqlparser::ast::{
    Distinct, Expr, FunctionArguments, Query, Select, SelectItem, SetExpr, Spanned, Visit, Visitor,
    WindowType,
};
use datafusion::sql::sqlparser::tokenizer::{Location, Span};

use crate::Error;

/// A file that an analyst wrote.
#[derive(Clone, Debug)]
pub struct Text {
    pub file: String,
    pub text: String,
}

impl Text {
    /// An error at a byte range of this file. `cure` says what to write instead; an empty one is left out.
    pub fn wrong(
        &self,
        span: Option<Range<usize>>,
        message: impl Into<String>,
        label: &str,
        cure: impl Into<String>,
    ) -> Error {
        let cure = Some(cure.into()).filter(|cure| !cure.is_empty());
        Error::written(&self.file, &self.text, span, message, label, cure)
    }

    /// The byte range of a span of the syntax tree; `None` for an empty or unknown span.
    pub fn range(&self, span: Span) -> Option<Range<usize>> {
        let (start, end) = (self.byte(span.start)?, self.byte(span.end)?);
        (start < end).then_some(start..end)
    }

    /// The byte range of the word that begins at a location.
    pub fn word_at(&self, at: Location) -> Option<Range<usize>> {
        let start = self.byte(at)?;
        let rest = &self.text[start..];
        let length = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        let length = length.max(rest.chars().next().map_or(0, char::len_utf8));
        (length > 0).then_some(start..start + length)
    }

    /// The byte offset of a location. Lines and columns count from 1, and columns count characters.
    fn byte(&self, at: Location) -> Option<usize> {
        let line: &str = self.text.split_inclusive('\n').nth((at.line as usize).checked_sub(1)?)?;
        let begin = line.as_ptr() as usize - self.text.as_ptr() as usize;
        let column = (at.column as usize).checked_sub(1)?;
        Some(begin + line.char_indices().nth(column).map_or(line.len(), |(byte, _)| byte))
    }

    /// An error of the SQL parser. Its place is read from the end of the message.
    pub fn unparsed(&self, message: &str) -> Error {
        let message = message.strip_prefix("sql parser error: ").unwrap_or(message);
        let (message, at) = match message.rsplit_once(" at Line: ") {
            Some((message, at)) => (message, at.split_once(", Column: ")),
            None => (message, None),
        };
        let at = at.and_then(|(line, column)| {
            Some(Location { line: line.parse().ok()?, column: column.trim().parse().ok()? })
        });
        let span = at.and_then(|at| self.word_at(at));
        self.wrong(span, format!("this is no SQL: {message}"), "here", "")
    }
}

/// The planner's message, without the prefix that names the planner.
fn plain(error: &DataFusionError) -> String {
    let text = error.strip_backtrace();
    let prefixes = ["Error during planning: ", "This feature is not implemented: ", "Schema error: "];
    let plain = prefixes.iter().find_map(|prefix| text.strip_prefix(prefix));
    plain.unwrap_or(&text).to_owned()
}

/// Splits the planner's message for a call with wrong argument types into the call and the signatures that
/// exist.
fn no_such_call(message: &str) -> Option<(&str, String)> {
    let (_, rest) = message.split_once("No function matches the given name and argument types '")?;
    let (called, rest) = rest.split_once("'.")?;
    let (_, candidates) = rest.split_once("Candidate functions:")?;
    Some((called, candidates.split_whitespace().collect::<Vec<_>>().join(" ")))
}

fn tree_span(span: PlanSpan) -> Span {
    let location = |at: datafusion::common::Location| Location { line: at.line, column: at.column };
    Span { start: location(span.start), end: location(span.end) }
}

fn column_cure(field: &Column, valid: &[Column]) -> String {
    let mut names: Vec<&str> = valid.iter().map(|column| column.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let suggestion = match nearest(&field.name, names.iter().copied()) {
        // the name is right, so the table in front of it is wrong
        Some(name) if name == field.name => {
            let full = valid.iter().find(|column| column.name == name).map(Column::flat_name);
            full.map(|full| format!("did you mean `{full}`? "))
        }
        Some(name) => Some(format!("did you mean `{name}`? ")),
        None => None,
    };
    let the = if suggestion.is_some() { "The" } else { "the" };
    format!("{}{the} columns here are {}", suggestion.unwrap_or_default(), names.join(", "))
}

/// The most similar of some names; `None` if none has a Jaro-Winkler similarity of at least 0.8.
pub fn nearest<'a>(name: &str, among: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let scored = among.into_iter().map(|other| (strsim::jaro_winkler(name, other), other));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0).then_with(|| b.1.cmp(a.1)));
    best.filter(|(score, _)| *score >= 0.8).map(|(_, other)| other)
}

/// A function call in the text.
struct Call {
    name: String,
    /// The first argument as written, except for white space.
    argument: String,
    name_span: Span,
    /// From the name to the last argument, and to the keys of the window if there is one.
    whole: Span,
}

/// What an error shows of a function call.
pub struct CallSite {
    /// Where the function's name is written.
    pub place: Option<Range<usize>>,
    /// The first argument as written; empty if unknown.
    pub argument: String,
}

/// Places of calls, limits and columns in a recipe's syntax tree. Rules find errors in the query plan, but in
/// the plan only columns record where they were written.
pub struct Places<'a> {
    text: &'a Text,
    query: &'a Query,
    /// The names of all functions of the session.
    functions: Vec<String>,
    /// The names of the session's tables, sorted.
    tables: Vec<String>,
    calls: Vec<Call>,
    limits: Vec<Span>,
    distinct_on: Vec<Span>,
}

impl<'a> Places<'a> {
    /// `state` is the session that plans the query.
    pub fn of(text: &'a Text, query: &'a Query, state: &SessionState) -> Self {
        let functions = state.scalar_functions().keys().chain(state.aggregate_functions().keys());
        let functions = functions.chain(state.window_functions().keys()).cloned().collect();
        let catalog = state.catalog_list().catalog(&state.config_options().catalog.default_catalog);
        let schema =
            catalog.and_then(|catalog| catalog.schema(&state.config_options().catalog.default_schema));
        let mut tables = schema.map(|schema| schema.table_names()).unwrap_or_default();
        tables.sort();
        let mut places =
            Self { text, query, functions, tables, calls: vec![], limits: vec![], distinct_on: vec![] };
        let _ = query.visit(&mut places);
        places
    }

    /// The call of a function (by any of its names) that encloses the column written at `inside`; without
    /// one, the function's first call.
    pub fn call(&self, names: &[&str], inside: Option<PlanSpan>) -> CallSite {
        let named = || self.calls.iter().filter(|call| names.contains(&call.name.as_str()));
        let inside = inside.map(tree_span);
        let around = named()
            .filter(|call| inside.is_some_and(|at| call.whole.start <= at.start && at.end <= call.whole.end));
        // of nested calls the innermost begins last
        let call = around.max_by_key(|call| call.whole.start).or_else(|| named().next());
        CallSite {
            place: call.and_then(|call| self.text.range(call.name_span)),
            argument: call.map(|call| call.argument.clone()).unwrap_or_default(),
        }
    }

    /// The byte range of a span of the plan.
    pub fn range(&self, span: PlanSpan) -> Option<Range<usize>> {
        self.text.range(tree_span(span))
    }

    /// An error of DataFusion's planner. The common ones are reworded for analysts.
    pub fn unplanned(&self, error: &DataFusionError) -> Error {
        let range = |span: PlanSpan| self.range(span);
        let diagnostic = error.diagnostic();
        let from_notes = || diagnostic.and_then(|d| d.notes.iter().find_map(|note| note.span));
        let span = diagnostic.and_then(|d| d.span).or_else(from_notes).and_then(range);
        let root = error.find_root();
        if let DataFusionError::SchemaError(schema_error, _) = root {
            match schema_error.as_ref() {
                SchemaError::FieldNotFound { field, valid_fields } => {
                    let message = format!("there is no column `{}` here", field.flat_name());
                    return self.text.wrong(span, message, "not a column", column_cure(field, valid_fields));
                }
                SchemaError::AmbiguousReference { field } => {
                    let message = format!("more than one of the tables here has a column `{}`", field.name);
                    let cure = format!("say which: `documents.{0}`, `shares.{0}`, …", field.name);
                    return self.text.wrong(span, message, "which?", cure);
                }
                _ => {}
            }
        }
        let plain = plain(root);
        if let Some((called, candidates)) = no_such_call(&plain) {
            let name = called.split('(').next().unwrap_or_default();
            let place = span.or_else(|| self.call(&[name], None).place);
            let message = format!("`{called}` does not match what the function takes");
            return self.text.wrong(place, message, "here", format!("it can be called as {candidates}"));
        }
        if let Some((_, name)) = plain.split_once("Invalid function '") {
            let name = name.split('\'').next().unwrap_or_default();
            // DataFusion's own suggestion differs between runs
            let like = nearest(name, self.functions.iter().map(String::as_str));
            let cure = like.map(|like| format!("did you mean `{like}`?")).unwrap_or_default();
            return self.text.wrong(span, format!("there is no function `{name}`"), "not a function", cure);
        }
        if let Some(name) = plain.strip_prefix("table '").and_then(|rest| rest.strip_suffix("' not found")) {
            let name = name.rsplit('.').next().unwrap_or_default();
            let cure = format!("the tables are {}", self.tables.join(", "));
            return self.text.wrong(span, format!("there is no table `{name}`"), "not a table", cure);
        }
        if plain.contains("Cannot run range queries on datatype") {
            let cure = "write the frame out: `over (… order by doc_id rows between unbounded preceding and current row)`";
            return self.text.wrong(
                span,
                "a window ordered by doc_id alone needs a frame of ROWS",
                "here",
                cure,
            );
        }
        let message = diagnostic.map_or(plain, |d| d.message.clone());
        let notes = diagnostic.into_iter().flat_map(|d| {
            let notes = d.notes.iter().map(|note| (&note.message, note.span));
            notes.chain(d.helps.iter().map(|help| (&help.message, help.span)))
        });
        let advice = notes.map(|(advice, span)| match span.and_then(range) {
            Some(place) => format!("`{}` {advice}", &self.text.text[place]),
            // recipes may not call ANY_VALUE
            None if advice.contains("ANY_VALUE") => {
                "add it to GROUP BY, or take its min(…) or max(…)".to_owned()
            }
            None => advice.clone(),
        });
        self.text.wrong(span, message, "here", advice.collect::<Vec<_>>().join("; "))
    }

    /// The first LIMIT or OFFSET.
    pub fn limit(&self) -> Option<Range<usize>> {
        self.limits.iter().find_map(|span| self.text.range(*span))
    }

    /// The first DISTINCT ON.
    pub fn distinct_on(&self) -> Option<Range<usize>> {
        self.distinct_on.iter().find_map(|span| self.text.range(*span))
    }

    /// Where the last SELECT writes a column of the result; all of its columns if there is no such column.
    pub fn result(&self, name: Option<&str>) -> Option<Range<usize>> {
        let mut body = self.query.body.as_ref();
        let select = loop {
            match body {
                SetExpr::Select(select) => break select,
                SetExpr::Query(query) => body = &query.body,
                SetExpr::SetOperation { left, .. } => body = left,
                _ => return None,
            }
        };
        let is_named = |item: &&SelectItem| match item {
            SelectItem::ExprWithAlias { alias, .. } => Some(alias.value.as_str()) == name,
            SelectItem::UnnamedExpr(Expr::Identifier(ident)) => Some(ident.value.as_str()) == name,
            SelectItem::UnnamedExpr(Expr::CompoundIdentifier(parts)) => {
                parts.last().map(|part| part.value.as_str()) == name
            }
            _ => false,
        };
        let span = match select.projection.iter().find(is_named) {
            Some(item) => item.span(),
            None => Span::union_iter(select.projection.iter().map(Spanned::span)),
        };
        self.text.range(span)
    }
}

impl Visitor for Places<'_> {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        if let Expr::Function(function) = expr {
            let name = function.name.to_string().to_lowercase();
            let name_span = function.name.span();
            let mut whole = name_span.union(&function.span());
            if let Some(WindowType::WindowSpec(window)) = &function.over {
                let keys = window.partition_by.iter().map(Spanned::span);
                let keys = keys.chain(window.order_by.iter().map(Spanned::span));
                whole = Span::union_iter(keys.chain([whole]));
            }
            let argument = match &function.args {
                FunctionArguments::List(list) => list.args.first().map(ToString::to_string),
                _ => None,
            };
            self.calls.push(Call { name, argument: argument.unwrap_or_default(), name_span, whole });
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        self.limits.extend(query.limit_clause.as_ref().map(Spanned::span));
        ControlFlow::Continue(())
    }

    fn pre_visit_select(&mut self, select: &Select) -> ControlFlow<()> {
        if let Some(Distinct::On(columns)) = &select.distinct {
            self.distinct_on.push(Span::union_iter(columns.iter().map(Spanned::span)));
        }
        ControlFlow::Continue(())
    }
}

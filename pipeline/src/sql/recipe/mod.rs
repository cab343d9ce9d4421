//! Recipes: the analyst's SQL files, one SELECT each, that say which spans of which documents to draw, how often.
//!
//! ```text
//! text ─parse─▶ Recipe ─bind─▶ Bound ─plan─▶ LogicalPlan: doc_id, start, stop, copies, stratum
//!               header,        parameters    rules: the same rows on every machine,
//!               one SELECT     as typed      in any number of partitions
//!                              literals
//! ```
//!
//! Whatever an analyst can get wrong is an error that names the place and the cure.

pub mod allowed;
mod header;
mod place;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use arrow::datatypes::DataType as ArrowType;
use datafusion::common::ScalarValue;
use datafusion::execution::SessionState;
use datafusion::functions::expr_fn::coalesce;
use datafusion::logical_expr::{Expr as PlanExpr, LogicalPlan, LogicalPlanBuilder, cast, lit};
use datafusion::prelude::{SessionContext, ident};
use datafusion::sql::parser::Statement as AnyStatement;
use datafusion::sql::sqlparser::ast::{
    CastKind, DataType, ExactNumberInfo, Expr, Query, Statement, Value, ValueWithSpan, Visit, VisitMut,
    Visitor, VisitorMut,
};
use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::parser::Parser;
use datafusion::sql::sqlparser::tokenizer::{Span, Token, TokenWithSpan, Tokenizer};

pub use header::{FORM, Kind, Parameter};
pub use place::Text;
use place::{Places, nearest};

use crate::Result;
use crate::hash::Digest;

/// Parameters that every recipe has: their values come from the run's conf, and all are of type bigint.
pub const BUILTIN: [&str; 5] = ["budget", "long_tokens", "max_copies", "max_span", "seed"];

/// A recipe file: one SELECT and its header.
pub struct Recipe {
    text: Text,
    /// The first line of the header.
    pub title: String,
    /// The rest of its prose.
    pub description: String,
    /// Without the built-in ones.
    pub parameters: Vec<Parameter>,
    query: Box<Query>,
    /// The names of all `$name`s in the query.
    used: BTreeSet<String>,
    /// The hash of its tokens: comments and white space don't matter. Defaults of parameters are not in it, they arrive
    /// as values.
    pub key: String,
}

impl Recipe {
    pub fn parse(file: &str, text: &str) -> Result<Self> {
        let text = Text { file: file.to_owned(), text: text.to_owned() };
        let header = header::Header::parse(&text)?;
        let parameters = own_parameters(&text, header.parameters)?;
        let cure = "a recipe is one SELECT over documents, domains and shares; WITH gives its steps names";
        let Parsed { query, key } = Parsed::of(&text, "a recipe", cure)?;
        rules::check_tables(&text, &query)?;
        let used = used_parameters(&text, &query, Some(&parameters))?;
        Ok(Self { text, title: header.title, description: header.description, parameters, query, used, key })
    }

    /// Gives every parameter its value: the run's own, the conf's, or else the header's default.
    pub fn bind(
        &self,
        builtin: &BTreeMap<String, ScalarValue>,
        given: &BTreeMap<String, ScalarValue>,
    ) -> Result<Bound> {
        for name in given.keys() {
            self.known(name)?;
        }
        let mut values = BTreeMap::new();
        for name in BUILTIN.into_iter().filter(|name| self.used.contains(*name)) {
            let value = builtin.get(name).expect("the run gives a value to all built-in parameters");
            values.insert(name.to_owned(), value.clone());
        }
        for parameter in &self.parameters {
            let Parameter { name, kind, default, span, .. } = parameter;
            let value = match given.get(name) {
                Some(value) => kind.take(value).ok_or_else(|| self.of_another_type(parameter, value))?,
                None => default.clone().ok_or_else(|| {
                    let cure = format!("write `{name} = …` under [mixture.params] in the conf");
                    self.text.wrong(
                        Some(span.clone()),
                        format!("parameter `{name}` has no value"),
                        "it has no default",
                        cure,
                    )
                })?,
            };
            values.insert(name.clone(), value);
        }
        let domains = self.parameters.iter().filter(|parameter| parameter.kind == Kind::Domain);
        let domains = domains.map(|parameter| parameter.name.clone()).collect();
        Ok(Bound { text: self.text.clone(), query: self.query.clone(), values, domains })
    }

    /// Refuses a key of `[mixture.params]` that is no parameter of this recipe.
    fn known(&self, name: &str) -> Result<()> {
        let mut names: Vec<&str> = self.parameters.iter().map(|p| p.name.as_str()).collect();
        if names.contains(&name) {
            return Ok(());
        }
        if BUILTIN.contains(&name) {
            let place = if name == "seed" { "[run]" } else { "[mixture]" };
            let message = format!("`{name}` does not belong under [mixture.params]");
            return Err(self.text.wrong(
                None,
                message,
                "",
                format!("every recipe has `${name}`: it is set under {place}"),
            ));
        }
        let message = format!("[mixture.params] has `{name}`, but {} has no such parameter", self.text.file);
        names.sort_unstable();
        let cure = match (nearest(name, names.iter().copied()), names.as_slice()) {
            (_, []) => "it has no parameters of its own".to_owned(),
            (Some(like), _) => format!("did you mean `{like}`? Its parameters are {}", names.join(", ")),
            (None, _) => format!("its parameters are {}", names.join(", ")),
        };
        let like = nearest(name, names).and_then(|like| self.parameters.iter().find(|p| p.name == like));
        Err(self.text.wrong(like.map(|p| p.span.clone()), message, "this one?", cure))
    }

    fn of_another_type(&self, parameter: &Parameter, value: &ScalarValue) -> crate::Error {
        let Parameter { name, kind, span, .. } = parameter;
        let (got, example) = (
            shown(value),
            match kind {
                Kind::Bigint => "1000",
                Kind::Double => "0.5",
                Kind::Varchar | Kind::Domain => "\"text\"",
                Kind::Boolean => "true",
            },
        );
        self.text.wrong(
            Some(span.clone()),
            format!("[mixture.params] {name} has to be a {kind}, but is {got}"),
            "declared here",
            format!("write it as in `{name} = {example}`"),
        )
    }
}

/// A recipe whose parameters have values.
pub struct Bound {
    text: Text,
    /// As the analyst wrote it.
    query: Box<Query>,
    /// The values of what the recipe declares or uses, for its stage's key.
    pub values: BTreeMap<String, ScalarValue>,
    /// Those of its parameters that name domains.
    domains: Vec<String>,
}

/// The columns of a recipe's result and their types.
pub const RESULT: [(&str, ArrowType); 5] = [
    ("doc_id", ArrowType::FixedSizeBinary(16)),
    ("start", ArrowType::Int64),
    ("stop", ArrowType::Int64),
    ("copies", ArrowType::Float64),
    ("stratum", ArrowType::Utf8),
];

impl Bound {
    /// Its parameters that name domains, and the names.
    pub fn domains(&self) -> impl Iterator<Item = (&str, &str)> {
        self.domains.iter().filter_map(|parameter| match &self.values[parameter] {
            ScalarValue::Utf8(Some(name)) => Some((parameter.as_str(), name.as_str())),
            _ => None,
        })
    }

    /// Plans the query over the tables `documents`, `domains` and `shares` of a session and enforces the rules. The
    /// plan's columns are `doc_id, start, stop, copies, stratum`, in exactly the types of the design.
    pub async fn plan(&self, session: &SessionContext) -> Result<LogicalPlan> {
        let state = planner(session);
        let places = Places::of(&self.text, &self.query, &state);
        let mut query = self.query.clone();
        let _ = VisitMut::visit(&mut query, &mut Literals(&self.values));
        let plan = planned(&state, query, &places).await?;
        rules::check_plan(&self.text, &places, &plan)?;
        let analyzed = state.analyzer().execute_and_check(plan.clone(), state.config_options(), |_, _| {});
        analyzed.map_err(|e| places.unplanned(&e))?;
        self.fit(plan, &places)
    }

    /// Puts the result's columns in order and casts them to their types.
    fn fit(&self, plan: LogicalPlan, places: &Places<'_>) -> Result<LogicalPlan> {
        const CURE: &str = "a recipe's last line is `select doc_id, start, stop, copies from <last step>`, with `stratum` where it has strata";
        let found: Vec<&str> = plan.schema().fields().iter().map(|field| field.name().as_str()).collect();
        let wanted = RESULT.map(|(name, _)| name);
        let missing: Vec<&str> = wanted[..4].iter().copied().filter(|name| !found.contains(name)).collect();
        for (at, name) in found.iter().enumerate() {
            if found[..at].contains(name) {
                let message = format!("the result has two columns `{name}`");
                return Err(self.text.wrong(places.result(Some(name)), message, "one of them", CURE));
            }
            if wanted.contains(name) {
                continue;
            }
            let message =
                format!("the result has a column `{name}`, which is not one of {}", wanted.join(", "));
            let cure = match nearest(name, missing.iter().copied()) {
                Some(like) => format!("did you mean `{like}`?"),
                None => CURE.to_owned(),
            };
            return Err(self.text.wrong(places.result(Some(name)), message, "this column", cure));
        }
        if !missing.is_empty() {
            let message = format!("the result has no column `{}`", missing.join("`, `"));
            return Err(self.text.wrong(places.result(None), message, "all of its columns", CURE));
        }

        let mut columns = Vec::new();
        for (name, wanted) in RESULT {
            if !found.contains(&name) {
                columns.push(lit("").alias(name));
                continue;
            }
            let field = plan.schema().field_with_unqualified_name(name).map_err(|e| places.unplanned(&e))?;
            let found = field.data_type();
            if !fits(found, &wanted) {
                return Err(self.of_another_type(name, found, places));
            }
            // a column that needs no cast keeps the order that the scan is known to have
            let column: PlanExpr = if *found == wanted { ident(name) } else { cast(ident(name), wanted) };
            let column = if name == "stratum" { coalesce(vec![column, lit("")]) } else { column };
            columns.push(column.alias(name));
        }
        let fitted = LogicalPlanBuilder::from(plan).project(columns).and_then(LogicalPlanBuilder::build);
        fitted.map_err(|e| places.unplanned(&e))
    }

    fn of_another_type(&self, name: &str, found: &ArrowType, places: &Places<'_>) -> crate::Error {
        let (wanted, cure) = match name {
            "doc_id" => ("a doc_id of `documents`", "return doc_id as `documents` has it".to_owned()),
            "copies" => ("a number", "write `cast(… as double) as copies`".to_owned()),
            "stratum" => ("a text", "write `cast(… as varchar) as stratum`".to_owned()),
            _ => ("an integer", format!("write `cast(… as bigint) as {name}`")),
        };
        let message = format!("`{name}` has to be {wanted}, but is of type {found}");
        self.text.wrong(places.result(Some(name)), message, "this column", cure)
    }
}

/// What plans queries of a session.
fn planner(session: &SessionContext) -> SessionState {
    let mut state = session.state();
    let options = &mut state.config_mut().options_mut().sql_parser;
    // errors point at the text, and a plan is the same whatever the session's own options are
    options.collect_spans = true;
    options.map_string_types_to_utf8view = false;
    options.parse_float_as_decimal = false;
    options.enable_ident_normalization = true;
    state
}

async fn planned(state: &SessionState, query: Box<Query>, places: &Places<'_>) -> Result<LogicalPlan> {
    let statement = AnyStatement::Statement(Box::new(Statement::Query(query)));
    state.statement_to_plan(statement).await.map_err(|e| places.unplanned(&e))
}

/// Plans a query that is no recipe over the tables of a session; what is wrong with it is shown where it stands.
pub async fn plan_query(file: &str, text: &str, session: &SessionContext) -> Result<LogicalPlan> {
    let text = Text { file: file.to_owned(), text: text.to_owned() };
    let Parsed { query, .. } =
        Parsed::of(&text, "a query", "a query is one SELECT; WITH gives its steps names")?;
    used_parameters(&text, &query, None)?;
    let state = planner(session);
    planned(&state, query.clone(), &Places::of(&text, &query, &state)).await
}

/// Whether a column of the result may be cast to its type without changing what it says.
fn fits(found: &ArrowType, wanted: &ArrowType) -> bool {
    match wanted {
        ArrowType::FixedSizeBinary(_) => {
            found == wanted || matches!(found, ArrowType::Binary | ArrowType::BinaryView)
        }
        ArrowType::Int64 => found.is_integer(),
        ArrowType::Float64 => found.is_numeric(),
        _ => found.is_string() || found.is_null(),
    }
}

/// Sets the header's lines for built-in parameters aside: they are there for the reader.
fn own_parameters(text: &Text, declared: Vec<Parameter>) -> Result<Vec<Parameter>> {
    let (builtin, own): (Vec<_>, Vec<_>) =
        declared.into_iter().partition(|parameter| BUILTIN.contains(&parameter.name.as_str()));
    match builtin.into_iter().find(|p| p.kind != Kind::Bigint || p.default.is_some()) {
        None => Ok(own),
        Some(Parameter { name, span, .. }) => {
            let message =
                format!("`${name}` is a parameter of every recipe, and cannot be declared otherwise");
            let cure = format!("write `${name}  bigint` without a default, or choose another name");
            Err(text.wrong(Some(span), message, "declared here", cure))
        }
    }
}

/// The only statement of a text.
pub struct Parsed {
    pub query: Box<Query>,
    /// What a stage's key has of it.
    pub key: String,
}

impl Parsed {
    /// `what` the text is, and in `cure` what it should be.
    pub fn of(text: &Text, what: &str, cure: &str) -> Result<Self> {
        let tokens = Tokenizer::new(&GenericDialect {}, &text.text).tokenize_with_location();
        let tokens = tokens.map_err(|e| text.unparsed(&e.to_string()))?;
        let key = key(&tokens);
        let query = one_select(text, tokens, what, cure)?;
        rules::check_words(text, &query)?;
        Ok(Self { query, key })
    }
}

/// The hash of what a parser sees: never of a syntax tree's printing, in which `'it''s'` and `'it''''s'` are alike.
fn key(tokens: &[TokenWithSpan]) -> String {
    let shown = tokens.iter().filter_map(|token| match &token.token {
        Token::Whitespace(_) | Token::EOF => None,
        // a newer parser has more keywords
        Token::Word(word) => Some(format!("{:?} {}", word.quote_style, word.value)),
        other => Some(format!("{other:?}")),
    });
    // a list, in which it is clear where each one ends
    Digest::of(serde_json::json!(shown.collect::<Vec<_>>()).to_string().as_bytes()).to_string()
}

fn one_select(text: &Text, tokens: Vec<TokenWithSpan>, what: &str, cure: &str) -> Result<Box<Query>> {
    let unparsed = |e: datafusion::sql::sqlparser::parser::ParserError| text.unparsed(&e.to_string());
    let mut parser = Parser::new(&GenericDialect {}).with_tokens_with_locations(tokens);
    while parser.consume_token(&Token::SemiColon) {}
    let first = parser.peek_token();
    let here = |span: Span| text.word_at(span.start);
    match &first.token {
        Token::EOF => return Err(text.wrong(None, format!("{} has no SELECT", text.file), "", cure)),
        Token::LParen => {}
        Token::Word(word)
            if ["select", "with", "from", "values"].contains(&word.value.to_lowercase().as_str()) => {}
        token => {
            let message = format!("{what} cannot begin with `{token}`");
            return Err(text.wrong(here(first.span), message, "not a SELECT", cure));
        }
    }
    let statement = parser.parse_statement().map_err(unparsed)?;
    let ended = parser.consume_token(&Token::SemiColon);
    while parser.consume_token(&Token::SemiColon) {}
    let next = parser.peek_token();
    match (statement, &next.token) {
        (Statement::Query(query), Token::EOF) => Ok(query),
        (_, Token::EOF) => Err(text.wrong(here(first.span), "this is not a SELECT", "not a SELECT", cure)),
        _ if ended => {
            Err(text.wrong(here(next.span), format!("{what} has only one statement"), "the second", cure))
        }
        (_, token) => {
            let message = format!("this is no SQL: the SELECT has ended, but `{token}` follows");
            Err(text.wrong(
                here(next.span),
                message,
                "here",
                "look for a missing comma or operator before it",
            ))
        }
    }
}

/// The names of the parameters that a query uses, all of which have to be declared: `own`, of a recipe, beside those that
/// every recipe has. What is no recipe has none.
fn used_parameters(text: &Text, query: &Query, own: Option<&[Parameter]>) -> Result<BTreeSet<String>> {
    struct Used(Vec<(String, Span)>);
    impl Visitor for Used {
        type Break = ();
        fn pre_visit_value(&mut self, value: &ValueWithSpan) -> ControlFlow<()> {
            if let Value::Placeholder(name) = &value.value {
                self.0.push((name.clone(), value.span));
            }
            ControlFlow::Continue(())
        }
    }
    let mut used = Used(vec![]);
    let _ = Visit::visit(query, &mut used);
    let known = || own.into_iter().flat_map(|own| own.iter().map(|p| p.name.as_str()).chain(BUILTIN));
    let declared = |(written, span): (String, Span)| match written.strip_prefix('$') {
        _ if own.is_none() => {
            let message = format!("`{written}` has no value");
            Err(text.wrong(
                text.range(span),
                message,
                "here",
                "only recipes have parameters: write the value",
            ))
        }
        Some(name) if known().any(|k| k == name) => Ok(name.to_owned()),
        Some(name) => {
            let like = nearest(name, known()).map(|like| format!("did you mean `${like}`? Otherwise "));
            let like = like.unwrap_or_default();
            let cure = format!("{like}declare it in the header: `--   ${name}  double = 0.5   what it is`");
            Err(text.wrong(
                text.range(span),
                format!("there is no parameter `${name}`"),
                "not declared",
                cure,
            ))
        }
        None => {
            let message = format!("`{written}` is no parameter");
            Err(text.wrong(
                text.range(span),
                message,
                "here",
                "parameters are written `$name` and declared in the header",
            ))
        }
    };
    used.0.into_iter().map(declared).collect()
}

/// Replaces parameters by their values, as typed literals in the syntax tree: never as text.
struct Literals<'a>(&'a BTreeMap<String, ScalarValue>);

impl VisitorMut for Literals<'_> {
    type Break = ();

    // after the children, so that the new literal is not visited again
    fn post_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
        if let Expr::Value(ValueWithSpan { value: Value::Placeholder(name), span }) = expr
            && let Some(value) = self.0.get(name.trim_start_matches('$'))
        {
            let (value, data_type) = literal(value);
            let literal = Box::new(Expr::Value(ValueWithSpan { value, span: *span }));
            *expr = Expr::Cast { kind: CastKind::Cast, expr: literal, data_type, array: false, format: None };
        }
        ControlFlow::Continue(())
    }
}

/// A value as a literal of the syntax tree, and its SQL type.
fn literal(value: &ScalarValue) -> (Value, DataType) {
    let number = |text: Option<String>| text.map_or(Value::Null, |text| Value::Number(text, false));
    match value {
        ScalarValue::Int64(v) => (number(v.map(|v| v.to_string())), DataType::BigInt(None)),
        // `{:?}` of a float reads back as the same float
        ScalarValue::Float64(v) => {
            (number(v.map(|v| format!("{v:?}"))), DataType::Double(ExactNumberInfo::None))
        }
        ScalarValue::Utf8(v) => {
            (v.clone().map_or(Value::Null, Value::SingleQuotedString), DataType::Varchar(None))
        }
        ScalarValue::Boolean(v) => (v.map_or(Value::Null, Value::Boolean), DataType::Boolean),
        other => unreachable!("no parameter has the type of {other:?}"),
    }
}

/// A value of the conf, as its author wrote it.
fn shown(value: &ScalarValue) -> String {
    match value {
        ScalarValue::Int64(_) => format!("the integer {value}"),
        ScalarValue::Float64(_) => format!("the number {value}"),
        ScalarValue::Boolean(_) => format!("the boolean {value}"),
        _ => format!("the text \"{value}\""),
    }
}

//! Recipes: SQL files of one SELECT each, written by analysts. A recipe says which spans of which documents
//! to draw, and how often.
//!
//! ```text
//! text ─parse─▶ Recipe ─bind─▶ Bound ─plan─▶ LogicalPlan: doc_id, start, stop, copies, stratum
//!               header,        parameters    rules: the same rows on every machine,
//!               one SELECT     as typed      in any number of partitions
//!                              literals
//! ```
//!
//! Every mistake that an analyst can make is an error that names the place and the cure.

pub mod allowed;
mod header;
mod place;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use arrow::datatypes::DataType as ArrowType;
use datafusion::common::ScalarValue;
use datafusion::execution::SessionState;
use datafusion::functions::expr_fn::coalesce;
use datafusion::logical_expr::{Expr as PlanExpr, LogicalPlan, LogicalPlanBuilder, cast, lit};
use datafusion::prelude::{SessionContext, ident};
use datafusion::sql::parser::Statement as AnyStatement;
use datafusion::sql::sqlparser::ast::{Query, Statement};
use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::parser::Parser;
use datafusion::sql::sqlparser::tokenizer::{Span, Token, TokenWithSpan, Tokenizer};

pub use header::{FORM, Kind, Parameter};
pub use place::Text;
use place::{Places, nearest};

use crate::Result;
use crate::hash::Digest;
use crate::sql::parameters;

/// Parameters of every recipe. Their values come from the run's conf, and all are of type bigint.
pub const BUILTIN: [&str; 5] = ["budget", "long_tokens", "max_copies", "max_span", "seed"];

/// A recipe file: one SELECT and its header.
pub struct Recipe {
    text: Text,
    /// The first line of the header.
    pub title: String,
    /// The other lines of the header's prose.
    pub description: String,
    /// The declared parameters, without the built-in ones.
    pub parameters: Vec<Parameter>,
    query: Box<Query>,
    /// The names of all parameters that the query uses.
    used: BTreeSet<String>,
    /// Hash of the SQL tokens, without comments and white space. It does not cover the defaults of
    /// parameters: they enter the stage's key as values.
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

    /// Gives every parameter a value: a built-in one from the run, a declared one from the conf or else from
    /// the header's default.
    ///
    /// # Errors
    /// [`crate::Error::Written`] if `given` names an unknown parameter, or a value is missing or of another
    /// type.
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

    /// Refuses a key of `[mixture.params]` that is not a parameter of this recipe.
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
    /// The query as the analyst wrote it, with its placeholders.
    query: Box<Query>,
    /// Values of the parameters that the recipe declares, and of the built-in ones that it uses; part of the
    /// stage's key.
    pub values: BTreeMap<String, ScalarValue>,
    /// Names of the parameters that are of kind [`Kind::Domain`].
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
    /// The parameters that name domains, each with the domain that it names.
    pub fn domains(&self) -> impl Iterator<Item = (&str, &str)> {
        self.domains.iter().filter_map(|parameter| match &self.values[parameter] {
            ScalarValue::Utf8(Some(name)) => Some((parameter.as_str(), name.as_str())),
            _ => None,
        })
    }

    /// Plans the query over the tables `documents`, `domains` and `shares` of a session, and enforces the
    /// rules. The columns of the plan are `doc_id, start, stop, copies, stratum`, of the types in `RESULT`.
    ///
    /// # Errors
    /// [`crate::Error::Written`] if the query cannot be planned, breaks a rule, or has other columns.
    pub async fn plan(&self, session: &SessionContext) -> Result<LogicalPlan> {
        let state = planner(session);
        let places = Places::of(&self.text, &self.query, &state);
        let mut query = self.query.clone();
        parameters::bind(&mut query, &self.values);
        let plan = planned(&state, query, &places).await?;
        rules::check_plan(&self.text, &places, &plan)?;
        let analyzed = state.analyzer().execute_and_check(plan.clone(), state.config_options(), |_, _| {});
        analyzed.map_err(|e| places.unplanned(&e))?;
        self.fit(plan, &places)
    }

    /// Puts the columns of the result in order, and casts them to their types.
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
            // a cast would hide the order that the scan is known to have
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

/// The session's state, with the parser options that recipes need.
fn planner(session: &SessionContext) -> SessionState {
    let mut state = session.state();
    let options = &mut state.config_mut().options_mut().sql_parser;
    // errors need spans, and a plan must not depend on the session's own options
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

/// Plans a query that is not a recipe, over the tables of a session. Errors point to their place in the text.
pub async fn plan_query(file: &str, text: &str, session: &SessionContext) -> Result<LogicalPlan> {
    let text = Text { file: file.to_owned(), text: text.to_owned() };
    let Parsed { query, .. } =
        Parsed::of(&text, "a query", "a query is one SELECT; WITH gives its steps names")?;
    used_parameters(&text, &query, None)?;
    let state = planner(session);
    planned(&state, query.clone(), &Places::of(&text, &query, &state)).await
}

/// Whether a column of the result may be cast to its type without losing its meaning.
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

/// Drops the header's declarations of built-in parameters, which only serve the reader, after checking their
/// type.
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

/// A text that holds one SELECT, parsed.
pub struct Parsed {
    pub query: Box<Query>,
    /// Hash of the tokens, for a stage's key.
    pub key: String,
}

impl Parsed {
    /// Parses a text. `what` names the kind of text in messages, and `cure` says what it should be.
    ///
    /// # Errors
    /// [`crate::Error::Written`] if the text is not one SELECT, or uses SQL that is refused in every text.
    pub fn of(text: &Text, what: &str, cure: &str) -> Result<Self> {
        let tokens = Tokenizer::new(&GenericDialect {}, &text.text).tokenize_with_location();
        let tokens = tokens.map_err(|e| text.unparsed(&e.to_string()))?;
        let key = key(&tokens);
        let query = one_select(text, tokens, what, cure)?;
        rules::check_words(text, &query)?;
        Ok(Self { query, key })
    }
}

/// Hash of the tokens that the parser sees. Printing the syntax tree would not do: it prints `'it''s'` and
/// `'it''''s'` alike.
fn key(tokens: &[TokenWithSpan]) -> String {
    let shown = tokens.iter().filter_map(|token| match &token.token {
        Token::Whitespace(_) | Token::EOF => None,
        // without the keyword, because a newer parser knows more of them
        Token::Word(word) => Some(format!("{:?} {}", word.quote_style, word.value)),
        other => Some(format!("{other:?}")),
    });
    // a JSON list, so that it is clear where each token ends
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

/// The names of the parameters that a query uses. Each has to be built in or declared in `own`, the recipe's
/// header. A query that is not a recipe (`None`) has no parameters.
fn used_parameters(text: &Text, query: &Query, own: Option<&[Parameter]>) -> Result<BTreeSet<String>> {
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
    parameters::used(query).into_iter().map(declared).collect()
}

/// A value of the conf, described for a message.
fn shown(value: &ScalarValue) -> String {
    match value {
        ScalarValue::Int64(_) => format!("the integer {value}"),
        ScalarValue::Float64(_) => format!("the number {value}"),
        ScalarValue::Boolean(_) => format!("the boolean {value}"),
        _ => format!("the text \"{value}\""),
    }
}

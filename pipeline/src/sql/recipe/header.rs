//! The header of a recipe: the comment at its top. It says what the recipe does, what one row is, and which
//! parameters it takes.
//!
//! ```sql
//! -- Per-source length upsampling (Fu et al. 2024, §3).
//! -- One row: a span to draw from, with its expected copies.
//! --   $long_share  double = 0.70   share of each domain's tokens that come from long documents
//! ```

use std::fmt;
use std::ops::Range;

use datafusion::common::ScalarValue;

use super::place::{Text, nearest};
use crate::Result;

/// A parameter, as the header declares it.
#[derive(Clone, Debug)]
pub struct Parameter {
    pub name: String,
    pub kind: Kind,
    /// The default value; `None` if the conf has to give one.
    pub default: Option<ScalarValue>,
    pub description: String,
    /// Where it is declared, as a byte range of the file.
    pub span: Range<usize>,
}

/// The type of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Bigint,
    Double,
    Varchar,
    Boolean,
    /// A varchar that has to name a domain of the corpus.
    Domain,
}

impl Kind {
    const ALL: [Kind; 5] = [Kind::Bigint, Kind::Double, Kind::Varchar, Kind::Boolean, Kind::Domain];

    fn name(self) -> &'static str {
        match self {
            Kind::Bigint => "bigint",
            Kind::Double => "double",
            Kind::Varchar => "varchar",
            Kind::Boolean => "boolean",
            Kind::Domain => "domain",
        }
    }

    /// The value converted to this type; `None` if it is of another type. Integers are accepted as doubles,
    /// nulls as any type.
    pub fn take(self, value: &ScalarValue) -> Option<ScalarValue> {
        match (self, value) {
            (Kind::Bigint, ScalarValue::Int64(Some(_)))
            | (Kind::Varchar | Kind::Domain, ScalarValue::Utf8(Some(_)))
            | (Kind::Boolean, ScalarValue::Boolean(Some(_))) => Some(value.clone()),
            (Kind::Double, ScalarValue::Float64(Some(v))) if v.is_finite() => Some(value.clone()),
            (Kind::Double, ScalarValue::Int64(Some(v))) => Some(ScalarValue::from(*v as f64)),
            (kind, value) if value.is_null() => Some(kind.null()),
            _ => None,
        }
    }

    fn null(self) -> ScalarValue {
        match self {
            Kind::Bigint => ScalarValue::Int64(None),
            Kind::Double => ScalarValue::Float64(None),
            Kind::Varchar | Kind::Domain => ScalarValue::Utf8(None),
            Kind::Boolean => ScalarValue::Boolean(None),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The parsed header of a recipe.
pub struct Header {
    pub title: String,
    pub description: String,
    pub parameters: Vec<Parameter>,
}

/// How a parameter is declared.
pub const FORM: &str = "a parameter is declared as `--   $name  double = 0.5   what it is`; types are bigint, double, varchar, boolean, and domain, a varchar that has to be a domain of the corpus; without a default, the conf has to give a value";

impl Header {
    pub fn parse(text: &Text) -> Result<Self> {
        let mut prose: Vec<&str> = Vec::new();
        let mut parameters: Vec<Parameter> = Vec::new();
        let mut at = 0;
        for line in text.text.split_inclusive('\n') {
            let begin = at;
            at += line.len();
            let Some(comment) = line.trim_start().strip_prefix("--") else {
                match line.trim().is_empty() {
                    true => continue,
                    false => break,
                }
            };
            let indented = comment.starts_with("  ");
            let comment = comment.trim();
            // a line of prose may begin with a `$name`, too
            let (name, rest) = word(comment);
            let typed = || Kind::ALL.iter().any(|kind| kind.name() == word(rest).0);
            if !(name.starts_with('$') && (indented || typed())) {
                prose.push(comment);
                continue;
            }
            let from = begin + line.find('$').expect("the comment begins with it");
            let span = from..from + comment.len();
            let wrong = |message: String| text.wrong(Some(span.clone()), message, "declared here", FORM);
            let parameter = parameter(comment, span.clone()).map_err(wrong)?;
            if parameters.iter().any(|p| p.name == parameter.name) {
                return Err(wrong(format!("parameter `${}` is declared twice", parameter.name)));
            }
            parameters.push(parameter);
        }
        let mut prose = prose.into_iter();
        let title = prose.next().unwrap_or_default().to_owned();
        Ok(Self { title, description: prose.collect::<Vec<_>>().join("\n"), parameters })
    }
}

/// Reads `$name type [= default] description`.
fn parameter(line: &str, span: Range<usize>) -> Result<Parameter, String> {
    let (name, rest) = word(&line[1..]);
    if !is_name(name) {
        return Err(format!("`${name}` is no name of a parameter"));
    }
    let (type_name, rest) = word(rest);
    let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.name() == type_name) else {
        let like = match type_name {
            "int" | "integer" | "int64" => Some("bigint"),
            "float" | "real" | "number" | "decimal" => Some("double"),
            "text" | "string" | "char" => Some("varchar"),
            other => nearest(other, Kind::ALL.map(Kind::name)),
        };
        let like = like.map(|like| format!("; did you mean `{like}`?")).unwrap_or_default();
        return Err(format!("parameter `${name}` has no type `{type_name}`{like}"));
    };
    let (default, description) = match rest.strip_prefix('=') {
        None => (None, rest),
        Some(rest) => {
            let (value, rest) = literal(rest.trim_start());
            (parse_default(name, kind, value)?, rest)
        }
    };
    let (name, description) = (name.to_owned(), description.trim().to_owned());
    Ok(Parameter { name, kind, default, description, span })
}

fn parse_default(name: &str, kind: Kind, text: &str) -> Result<Option<ScalarValue>, String> {
    if text == "required" {
        return Ok(None);
    }
    let quoted = text.strip_prefix('\'').and_then(|text| text.strip_suffix('\''));
    let value = match (kind, quoted) {
        _ if text == "null" => Some(kind.null()),
        (Kind::Bigint, _) => text.parse::<i64>().ok().map(ScalarValue::from),
        (Kind::Double, _) => text.parse::<f64>().ok().filter(|v| v.is_finite()).map(ScalarValue::from),
        (Kind::Boolean, _) => text.parse::<bool>().ok().map(ScalarValue::from),
        (Kind::Varchar | Kind::Domain, quoted) => {
            quoted.map(|text| ScalarValue::from(text.replace("''", "'")))
        }
    };
    let quotes = if matches!(kind, Kind::Varchar | Kind::Domain) { " in 'quotes'" } else { "" };
    value.map(Some).ok_or_else(|| format!("the default of `${name}`, `{text}`, is no {kind}{quotes}"))
}

fn word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    let (word, rest) = text.split_at(text.find(char::is_whitespace).unwrap_or(text.len()));
    (word, rest.trim_start())
}

/// Splits off one word, or one quoted text with its quotes.
fn literal(text: &str) -> (&str, &str) {
    if !text.starts_with('\'') {
        return word(text);
    }
    let mut end = 1;
    while let Some(quote) = text[end..].find('\'') {
        end += quote + 1;
        match text[end..].starts_with('\'') {
            true => end += 1,
            false => return text.split_at(end),
        }
    }
    (text, "")
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        && !name.starts_with(|c: char| c.is_ascii_digit())
}

//! The conf as it was written: a tree of values in which each knows its place in the file or in a `--set`.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::secret;
use crate::{Error, Result};

/// A conf file with its `--set` arguments laid over it.
#[derive(Debug, Clone)]
pub struct Tree {
    /// The texts a [`Position`] may lie in: the file comes first, then the `--set` arguments.
    texts: Vec<Text>,
    pub root: Node,
}

#[derive(Debug, Clone)]
struct Text {
    name: String,
    text: String,
}

/// Where something stands: a range of bytes in one of the tree's texts.
#[derive(Debug, Clone)]
pub struct Position {
    text: usize,
    span: Range<usize>,
}

#[derive(Debug, Clone)]
pub struct Node {
    pub place: Position,
    pub value: Value,
}

#[derive(Debug, Clone)]
pub enum Value {
    Bool(bool),
    Integer(i64),
    Float(f64),
    Text(String),
    Date,
    List(Vec<Node>),
    /// In the order in which it was written, so that the first mistake is the one reported.
    Table(Vec<Entry>),
}

#[derive(Debug, Clone)]
pub struct Entry {
    pub key: String,
    /// The place of the key; the value has its own.
    pub place: Position,
    pub node: Node,
}

impl Tree {
    pub fn parse(file: &str, text: &str) -> Result<Self> {
        // Of the conf as a whole, messages show the end: that is where something can be added.
        let end = text.trim_end().len();
        let whole = Position { text: 0, span: end..end };
        let root = Node { place: whole, value: Value::Table(Vec::new()) };
        let mut tree = Self { texts: vec![Text { name: file.to_owned(), text: text.to_owned() }], root };
        let parsed = DeTable::parse(text).map_err(|e| {
            let place = Position { text: 0, span: e.span().unwrap_or(0..0) };
            tree.wrong(&place, format!("this is not TOML: {}", e.message()), "here", None)
        })?;
        tree.root.value = tree.table(parsed.get_ref(), 0, 0)?;
        Ok(tree)
    }

    /// Lays one `--set key=value` over the tree. Tables that are missing are created, and so is the entry
    /// right after the last one of a list.
    pub fn set(&mut self, argument: &str) -> Result<()> {
        let text = self.texts.len();
        self.texts.push(Text { name: "--set".to_owned(), text: argument.to_owned() });
        let place = |span| Position { text, span };

        let example = || Some("for example: --set mixture.budget=10M, --set source.0.url=docs/".to_owned());
        let Some((left, right)) = argument.split_once('=') else {
            let message = format!("`--set {argument}` has no `=`");
            return Err(self.wrong(&place(0..argument.len()), message, "expected key=value", example()));
        };
        let key = place(0..left.trim_end().len());
        let Ok(path) = toml_edit::Key::parse(left.trim()) else {
            let message = format!("`--set {argument}`: what stands before `=` is not a key");
            return Err(self.wrong(&key, message, "expected key.key…", example()));
        };

        // What parses as TOML is TOML; all else is a text, so that no quotes have to get past the shell.
        let right = right.trim();
        let start = argument.trim_end().len() - right.len();
        let value = match DeValue::parse(right) {
            Ok(parsed) => self.node(&parsed, text, start)?,
            Err(_) => Node { place: place(start..start + right.len()), value: Value::Text(right.to_owned()) },
        };

        let path: Vec<&str> = path.iter().map(toml_edit::Key::get).collect();
        slot(&mut self.root, &path, &key)
            .map(|slot| *slot = value)
            .map_err(|reason| self.wrong(&key, format!("`--set {argument}` cannot be done"), reason, None))
    }

    /// What stands at a path such as `["source", "0", "url"]`.
    pub fn get(&self, path: &[&str]) -> Option<&Node> {
        path.iter().try_fold(&self.root, |node, step| node.get(step))
    }

    /// The place of the value at `path`, or of the nearest thing around it that was written.
    pub fn place(&self, path: &[&str]) -> &Position {
        let mut node = &self.root;
        for step in path {
            match node.get(step) {
                Some(inner) => node = inner,
                None => break,
            }
        }
        &node.place
    }

    /// The text at a place, as it was typed.
    pub fn raw(&self, place: &Position) -> &str {
        &self.texts[place.text].text[place.span.clone()]
    }

    /// An error that points at a place.
    pub fn wrong(
        &self,
        place: &Position,
        message: impl Into<String>,
        label: impl Into<String>,
        help: Option<String>,
    ) -> Error {
        let Text { name, text } = &self.texts[place.text];
        // Errors are logged, so a credential that somebody typed into a URL must not be in what they show.
        let (message, text) = (secret::mask(&message.into()), secret::mask(text));
        Error::written(name, &text, Some(place.span.clone()), message, label, help)
    }

    /// Copies a parsed value; `offset` is where the parsed piece begins in its text.
    fn node(&self, parsed: &Spanned<DeValue>, text: usize, offset: usize) -> Result<Node> {
        let place = Position { text, span: shift(parsed.span(), offset) };
        let value = match parsed.get_ref() {
            DeValue::Boolean(value) => Value::Bool(*value),
            DeValue::String(value) => Value::Text(value.to_string()),
            DeValue::Datetime(_) => Value::Date,
            DeValue::Integer(value) => {
                let parsed = i64::from_str_radix(value.as_str(), value.radix());
                Value::Integer(parsed.map_err(|_| self.too_large(&place))?)
            }
            DeValue::Float(value) => {
                Value::Float(value.as_str().parse().map_err(|_| self.too_large(&place))?)
            }
            DeValue::Array(values) => {
                let list = values.iter().map(|value| self.node(value, text, offset));
                Value::List(list.collect::<Result<_>>()?)
            }
            DeValue::Table(table) => self.table(table, text, offset)?,
        };
        Ok(Node { place, value })
    }

    fn table(&self, parsed: &DeTable, text: usize, offset: usize) -> Result<Value> {
        let entries = parsed.iter().map(|(key, value)| {
            let place = Position { text, span: shift(key.span(), offset) };
            let node = self.node(value, text, offset)?;
            Ok(Entry { key: key.get_ref().to_string(), place, node })
        });
        let mut entries = entries.collect::<Result<Vec<_>>>()?;
        entries.sort_by_key(|entry| entry.place.span.start);
        Ok(Value::Table(entries))
    }

    fn too_large(&self, place: &Position) -> Error {
        let help = format!("whole numbers go from {} to {}", i64::MIN, i64::MAX);
        self.wrong(place, "this number is too large", "does not fit 64 bits", Some(help))
    }
}

impl Position {
    /// The part of this place that `range` bytes of its raw text take.
    pub fn part(&self, range: Range<usize>) -> Position {
        Position { text: self.text, span: shift(range, self.span.start) }
    }
}

impl Value {
    /// What this is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Bool(_) => "true or false",
            Value::Integer(_) | Value::Float(_) => "a number",
            Value::Text(_) => "a text",
            Value::Date => "a date",
            Value::List(_) => "a list",
            Value::Table(_) => "a table",
        }
    }
}

impl Node {
    pub fn get(&self, step: &str) -> Option<&Node> {
        match &self.value {
            Value::Table(entries) => entries.iter().find(|entry| entry.key == step).map(|entry| &entry.node),
            Value::List(list) => list.get(step.parse::<usize>().ok()?),
            _ => None,
        }
    }

    /// The nodes at a path in which `*` stands for each entry of a list.
    pub fn all_mut(&mut self, path: &[&str]) -> Vec<&mut Node> {
        let [step, rest @ ..] = path else { return vec![self] };
        let inner: Vec<&mut Node> = match &mut self.value {
            Value::List(list) if *step == "*" => list.iter_mut().collect(),
            Value::Table(entries) => {
                let named = entries.iter_mut().filter(|entry| entry.key == *step);
                named.map(|entry| &mut entry.node).collect()
            }
            _ => Vec::new(),
        };
        inner.into_iter().flat_map(|node| node.all_mut(rest)).collect()
    }
}

/// The node at `path`, created with all that is missing on the way.
fn slot<'a>(node: &'a mut Node, path: &[&str], key: &Position) -> Result<&'a mut Node, String> {
    let [step, rest @ ..] = path else { return Ok(node) };
    // A list is created only where its first entry is asked for.
    let starts_list = rest.first() == Some(&"0");
    let empty = if starts_list { Value::List(Vec::new()) } else { Value::Table(Vec::new()) };
    let missing = Node { place: key.clone(), value: empty };

    let inner = match &mut node.value {
        Value::Table(entries) => {
            let found = entries.iter().position(|entry| entry.key == *step);
            let index = found.unwrap_or_else(|| {
                entries.push(Entry { key: (*step).to_owned(), place: key.clone(), node: missing });
                entries.len() - 1
            });
            &mut entries[index].node
        }
        Value::List(list) => {
            let count = list.len();
            match step.parse::<usize>() {
                Ok(index) if index < count => &mut list[index],
                Ok(index) if index == count => {
                    list.push(missing);
                    &mut list[index]
                }
                _ => return Err(format!("the list has {count}, so 0 to {count} can be set, not {step}")),
            }
        }
        _ => return Err(format!("`{step}` would have to be in a table, but there is a plain value")),
    };
    slot(inner, rest, key)
}

fn shift(span: Range<usize>, offset: usize) -> Range<usize> {
    span.start + offset..span.end + offset
}

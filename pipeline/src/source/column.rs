//! The path of a column, as a conf writes it.

use std::fmt;

/// A column's path: names with dots between them, outermost first. `meta.set` is `set` in `meta`. A name that
/// contains a dot, or begins with a quote, is quoted as in SQL: `"meta.set"` is one name, and `""` in quotes
/// is a quote.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Column(Vec<String>);

impl Column {
    /// Parses a path; `None` if it has an empty name, or quotes that do not end.
    pub fn parse(path: &str) -> Option<Self> {
        let (mut names, mut rest) = (vec![], path);
        loop {
            let name;
            (name, rest) = match rest.strip_prefix('"') {
                Some(quoted) => unquoted(quoted)?,
                None => {
                    let (name, rest) = rest.split_at(rest.find('.').unwrap_or(rest.len()));
                    (name.to_owned(), rest)
                }
            };
            if name.is_empty() {
                return None;
            }
            names.push(name);
            if rest.is_empty() {
                return Some(Self(names));
            }
            rest = rest.strip_prefix('.')?;
        }
    }

    /// The column with these names, outermost first.
    pub fn of(names: &[String]) -> Self {
        Self(names.to_vec())
    }

    pub fn names(&self) -> &[String] {
        &self.0
    }
}

/// Splits the text behind an opening quote into the name in quotes and what follows the closing quote.
fn unquoted(mut rest: &str) -> Option<(String, &str)> {
    let mut name = String::new();
    loop {
        let (before, after) = rest.split_once('"')?;
        name += before;
        match after.strip_prefix('"') {
            Some(more) => {
                name.push('"');
                rest = more;
            }
            None => return Some((name, after)),
        }
    }
}

/// Shows the path as a conf writes it.
impl fmt::Display for Column {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, name) in self.0.iter().enumerate() {
            let dot = if i > 0 { "." } else { "" };
            match name.contains('.') || name.starts_with('"') {
                true => write!(f, "{dot}\"{}\"", name.replace('"', "\"\""))?,
                false => write!(f, "{dot}{name}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_with_a_dot_is_quoted_as_in_sql() {
        let names = |path| Column::parse(path).map(|column| column.0.join("|"));
        for (path, expected) in [
            ("text", "text"),
            ("meta.set", "meta|set"),
            ("\"meta.set\"", "meta.set"),
            ("a.\"b.c\".d", "a|b.c|d"),
            ("\"say \"\"a.b\"\"\"", "say \"a.b\""),
            ("\"\"\"\"", "\""),
            // a quote within a name is a character like any other
            ("a\"b.c", "a\"b|c"),
        ] {
            assert_eq!(names(path).as_deref(), Some(expected), "{path}");
        }
        for wrong in ["", ".", "a.", ".a", "a..b", "\"\"", "\"a", "\"a\"b", "a.\"b.c"] {
            assert_eq!(names(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn a_column_is_shown_as_it_is_written(names in proptest::collection::vec("[a.\" é]{1,4}", 1..4)) {
            let column = Column(names);
            prop_assert_eq!(Column::parse(&column.to_string()), Some(column));
        }
    }
}

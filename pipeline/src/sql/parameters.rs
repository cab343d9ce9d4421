//! Parameters of SQL: which `$name`s a query uses, and how their values are bound.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use datafusion::common::ScalarValue;
use datafusion::sql::sqlparser::ast::{
    CastKind, DataType, ExactNumberInfo, Expr, Query, Value, ValueWithSpan, Visit, VisitMut, Visitor,
    VisitorMut,
};
use datafusion::sql::sqlparser::tokenizer::Span;

/// All placeholders of a query as they are written, `$name` or `?`, with their spans.
pub fn used(query: &Query) -> Vec<(String, Span)> {
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
    used.0
}

/// Replaces each parameter that has a value by a typed literal in the syntax tree. Values are never pasted
/// into the text, so that they cannot change the query.
pub fn bind(query: &mut Query, values: &BTreeMap<String, ScalarValue>) {
    let _ = VisitMut::visit(query, &mut Literals(values));
}

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

/// A value as a literal of the syntax tree, and the SQL type to cast it to.
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

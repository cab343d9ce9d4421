//! Arithmetic of every query: a result is the right number or an error, and does not depend on the order of
//! rows.
//!
//! DataFusion wraps on overflow: integers, and sums of integers and decimals. Its operators also disagree on
//! how NaN and −0 compare, so that a `max` of floats depends on which row comes first. Here an overflow is an
//! error that names the place and the cure, NaN becomes null, and −0 becomes 0.
//!
//! ```text
//! plan ─TypeCoercion─▶ plan ─Exact─▶ the same plan, but each `+ - * / %`, unary minus and function that returns
//!                                    a float is a call of `Checked`, and sums are computed in a wider type
//! ```
//!
//! The rule changes the logical plan before constants are folded, so that `9000000000 * 9000000000` is an
//! error, too.

use std::any::Any;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, ArrowPrimitiveType, AsArray, PrimitiveArray};
use arrow::compute::kernels::numeric::{add, div, mul, neg, rem, sub};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Decimal128Type, Field, FieldRef, Float32Type, Float64Type};
use arrow::error::ArrowError;
use arrow::util::display::FormatOptions;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion, TreeNodeRewriter};
use datafusion::common::{Column, DFSchema, Result, ScalarValue, Span, internal_err};
use datafusion::error::DataFusionError;
use datafusion::execution::FunctionRegistry;
use datafusion::logical_expr::expr::{AggregateFunction, ScalarFunction, WindowFunction};
use datafusion::logical_expr::expr_rewriter::{FunctionRewrite, NamePreserver};
use datafusion::logical_expr::utils::merge_schema;
use datafusion::logical_expr::{
    Aggregate, BinaryExpr, Cast, ColumnarValue, Expr, ExprSchemable, LogicalPlan, Operator, Projection,
    ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, TryCast, Union, Values,
    Volatility, Window, WindowFrame, WindowFrameBound, WindowFrameUnits, cast,
};
use datafusion::optimizer::analyzer::AnalyzerRule;
use datafusion::physical_expr_common::datum::apply;
use datafusion::prelude::SessionContext;
use datafusion::sql::sqlparser::ast::Expr as SqlExpr;
use datafusion::sql::unparser::expr_to_sql;

/// Installs the rules in a session.
pub fn install(session: &SessionContext) {
    session.add_analyzer_rule(Arc::new(Exact));
    let state = session.state_ref();
    state.write().register_function_rewrite(Arc::new(Frames)).expect("a session takes rewrites");
}

/// A result that cannot be represented: an overflow, a division by zero, or a list that is too long.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct NoNumber {
    message: String,
    /// What to write instead.
    pub cure: &'static str,
}

impl NoNumber {
    /// The error in the form in which a query returns it.
    pub fn beyond(message: String, cure: &'static str) -> DataFusionError {
        DataFusionError::External(Box::new(Self { message, cure }))
    }
}

/// The analyzer rule that puts [`Checked`] into a plan.
#[derive(Debug)]
struct Exact;

impl AnalyzerRule for Exact {
    fn name(&self) -> &str {
        "exact"
    }

    fn analyze(&self, plan: LogicalPlan, _: &ConfigOptions) -> Result<LogicalPlan> {
        let exact = |plan: LogicalPlan| {
            let schema = merge_schema(&plan.inputs());
            let names = NamePreserver::new(&plan);
            let plan = plan.map_expressions(|expr| {
                let name = names.save(&expr);
                let mut expressions = Expressions { schema: &schema, checks: vec![] };
                Ok(expr.rewrite(&mut expressions)?.update_data(|expr| name.restore(expr)))
            })?;
            plan.transform_data(|plan| widened(with_nulls(plan.recompute_schema()?)?))
        };
        Ok(plan.transform_up_with_subqueries(exact)?.data)
    }
}

/// Marks columns as nullable that a check may turn into null. UNION and VALUES would keep their old schemas,
/// and the optimizer removes null tests on columns that are declared not null.
fn with_nulls(plan: LogicalPlan) -> Result<LogicalPlan> {
    let nullable = |schema: &DFSchema, is: &dyn Fn(usize) -> bool| {
        let fields = schema.iter().enumerate().map(|(i, (table, field))| {
            let field = field.as_ref().clone();
            let nullable = field.is_nullable() || is(i);
            (table.cloned(), Arc::new(field.with_nullable(nullable)))
        });
        DFSchema::new_with_metadata(fields.collect(), schema.metadata().clone()).map(Arc::new)
    };
    Ok(match plan {
        LogicalPlan::Union(Union { inputs, schema }) => {
            let any = |i: usize| inputs.iter().any(|input| input.schema().field(i).is_nullable());
            let schema = nullable(&schema, &any)?;
            LogicalPlan::Union(Union { inputs, schema })
        }
        LogicalPlan::Values(Values { schema, values }) => {
            let schema = nullable(&schema, &|i| schema.field(i).data_type().is_floating())?;
            LogicalPlan::Values(Values { schema, values })
        }
        other => other,
    })
}

/// Rewrites an expression from its leaves up. Checks are made on the way down, so that messages show each
/// part as it was written.
struct Expressions<'a> {
    schema: &'a DFSchema,
    checks: Vec<Option<Checked>>,
}

impl TreeNodeRewriter for Expressions<'_> {
    type Node = Expr;

    fn f_down(&mut self, expr: Expr) -> Result<Transformed<Expr>> {
        self.checks.push(Checked::of(&expr, self.schema));
        Ok(Transformed::no(expr))
    }

    fn f_up(&mut self, expr: Expr) -> Result<Transformed<Expr>> {
        // a float of the outer query may have become null by now
        if let Expr::OuterReferenceColumn(field, column) = expr {
            self.checks.pop();
            let nullable = field.is_nullable() || field.data_type().is_floating();
            let field = Arc::new(field.as_ref().clone().with_nullable(nullable));
            return Ok(Transformed::yes(Expr::OuterReferenceColumn(field, column)));
        }
        Ok(match self.checks.pop().flatten() {
            None => Transformed::no(expr),
            Some(check) => Transformed::yes(check.call(match (&check.does, expr) {
                (Does::Operator(_), Expr::BinaryExpr(BinaryExpr { left, right, .. })) => vec![*left, *right],
                (Does::Negate, Expr::Negative(expr)) => vec![*expr],
                (_, expr) => vec![expr],
            })),
        })
    }
}

/// The wider type in which a sum cannot overflow; `None` if it cannot overflow in its own type.
fn wide(arg: &Expr, schema: &DFSchema) -> Option<DataType> {
    match arg.get_type(schema).ok()? {
        integer if integer.is_integer() => Some(DataType::Decimal128(38, 0)),
        // a sum of integers as decimal(38, 0) would need more than 10¹⁸ rows to overflow
        DataType::Decimal128(_, ..=0) if matches!(arg, Expr::Cast(Cast { expr, .. }) if expr.get_type(schema).is_ok_and(|t| t.is_integer())) => {
            None
        }
        DataType::Decimal128(digits, scale) if digits > 19 => Some(DataType::Decimal256(76, scale)),
        _ => None,
    }
}

/// Computes sums and medians in a wider type and casts their results back, and checks the float results of
/// the other aggregates. Both happen in a projection above the aggregate.
fn widened(plan: LogicalPlan) -> Result<Transformed<LogicalPlan>> {
    let (input, exprs) = match &plan {
        LogicalPlan::Aggregate(aggregate) => (&aggregate.input, &aggregate.aggr_expr),
        LogicalPlan::Window(window) => (&window.input, &window.window_expr),
        _ => return Ok(Transformed::no(plan)),
    };
    let names = NamePreserver::new(&plan);
    let (mut checks, mut wider) = (vec![], vec![]);
    for expr in exprs {
        let (name, args) = match expr.clone().unalias() {
            Expr::AggregateFunction(call) => (call.func.name().to_owned(), call.params.args),
            Expr::WindowFunction(call) => (call.fun.name().to_owned(), call.params.args),
            _ => (String::new(), vec![]),
        };
        let of_type = expr.get_type(input.schema())?;
        let wide = match (name.as_str(), args.as_slice()) {
            ("sum" | "median", [arg, ..]) => wide(arg, input.schema()),
            _ => None,
        };
        // these return one of their inputs, which has been checked
        let chooses = ["min", "max", "first_value", "last_value", "nth_value", "lag", "lead"];
        let does = match wide {
            Some(_) => Some(Does::Narrow),
            None if of_type.is_floating() && !chooses.contains(&name.as_str()) => Some(Does::Canonical),
            None => None,
        };
        checks.push(does.map(|does| Checked::new(does, expr, of_type)));
        wider.push(match wide {
            None => expr.clone(),
            Some(wide) => names.save(expr).restore(of_wider(expr.clone(), &wide)?),
        });
    }
    if checks.iter().all(Option::is_none) {
        return Ok(Transformed::no(plan));
    }
    let fields: Vec<Column> = plan.schema().columns();
    let kept = fields.len() - checks.len();
    let checks = std::iter::repeat_n(None, kept).chain(checks);
    let columns = fields.into_iter().zip(checks).map(|(column, check)| match check {
        None => Expr::Column(column),
        Some(check) => {
            let (relation, name) = (column.relation.clone(), column.name.clone());
            check.call(vec![Expr::Column(column)]).alias_qualified(relation, name)
        }
    });
    let columns = columns.collect();
    let plan = match plan {
        LogicalPlan::Aggregate(Aggregate { input, group_expr, .. }) => {
            LogicalPlan::Aggregate(Aggregate::try_new(input, group_expr, wider)?)
        }
        LogicalPlan::Window(Window { input, .. }) => LogicalPlan::Window(Window::try_new(wider, input)?),
        other => other,
    };
    Ok(Transformed::yes(LogicalPlan::Projection(Projection::try_new(columns, Arc::new(plan))?)))
}

/// The same aggregate, with its first argument cast to a wider type.
fn of_wider(expr: Expr, wide: &DataType) -> Result<Expr> {
    let widen = |args: &mut Vec<Expr>| args[0] = cast(args[0].clone(), wide.clone());
    let expr = expr.transform_down(|expr| {
        let expr = match expr {
            Expr::AggregateFunction(AggregateFunction { func, mut params }) => {
                widen(&mut params.args);
                Expr::AggregateFunction(AggregateFunction { func, params })
            }
            Expr::WindowFunction(mut call) => {
                widen(&mut call.params.args);
                Expr::WindowFunction(call)
            }
            other => return Ok(Transformed::no(other)),
        };
        Ok(Transformed::new(expr, true, TreeNodeRecursion::Jump))
    })?;
    Ok(expr.data)
}

/// What a [`Checked`] call computes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Does {
    /// `+`, `-`, `*`, `/`, `%`
    Operator(Operator),
    /// Unary minus.
    Negate,
    /// A cast of a sum or median back to its type.
    Narrow,
    /// Nothing: the argument is only made canonical (no NaN, no −0).
    Canonical,
}

/// A computation that returns the right number, null instead of NaN, or [`NoNumber`].
#[derive(Clone, Debug)]
struct Checked {
    does: Does,
    returns: DataType,
    signature: Signature,
    /// The expression as it was written, and its place in the text, for messages.
    written: String,
    place: Option<Span>,
}

// calls are equal if they compute the same, wherever they were written
impl PartialEq for Checked {
    fn eq(&self, other: &Self) -> bool {
        (&self.does, &self.returns) == (&other.does, &other.returns)
    }
}

impl Eq for Checked {}

impl Hash for Checked {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.does, &self.returns).hash(state);
    }
}

impl Checked {
    fn new(does: Does, expr: &Expr, returns: DataType) -> Self {
        let arguments = if matches!(does, Does::Operator(_)) { 2 } else { 1 };
        let signature = Signature::any(arguments, Volatility::Immutable);
        Self { does, returns, signature, written: written(expr), place: first_place([expr]) }
    }

    /// The check that an expression needs, if any.
    fn of(expr: &Expr, schema: &DFSchema) -> Option<Self> {
        let is_number = |expr: &Expr| {
            let number = |of: &DataType| of.is_integer() || of.is_floating() || of.is_decimal();
            expr.get_type(schema).ok().filter(number)
        };
        let does = match expr {
            Expr::BinaryExpr(BinaryExpr { left, op, right }) => {
                use Operator::{Divide, Minus, Modulo, Multiply, Plus};
                let arithmetic = matches!(op, Plus | Minus | Multiply | Divide | Modulo);
                (arithmetic && is_number(left).is_some() && is_number(right).is_some())
                    .then_some(Does::Operator(*op))?
            }
            Expr::Negative(_) => Does::Negate,
            Expr::ScalarFunction(call) => {
                (!Self::is(call) && expr.get_type(schema).ok()?.is_floating()).then_some(Does::Canonical)?
            }
            Expr::Cast(Cast { expr: from, .. }) | Expr::TryCast(TryCast { expr: from, .. }) => {
                let floats = expr.get_type(schema).ok()?.is_floating();
                (floats && from.get_type(schema).ok()?.is_string()).then_some(Does::Canonical)?
            }
            Expr::Literal(ScalarValue::Float64(Some(v)), _) => {
                (v.is_nan() || v.to_bits() == (-0.0f64).to_bits()).then_some(Does::Canonical)?
            }
            _ => return None,
        };
        Some(Self::new(does, expr, is_number(expr)?))
    }

    fn call(&self, args: Vec<Expr>) -> Expr {
        ScalarUDF::new_from_impl(self.clone()).call(args)
    }

    fn is(call: &ScalarFunction) -> bool {
        (call.func.inner().as_ref() as &dyn Any).is::<Self>()
    }

    /// The expression that a checked call was made from.
    fn undone(ScalarFunction { func, mut args }: ScalarFunction) -> Expr {
        let check = (func.inner().as_ref() as &dyn Any).downcast_ref::<Self>();
        let (last, first) = (args.pop(), args.pop());
        match (check.map(|check| &check.does), first, last) {
            (Some(Does::Operator(operator)), Some(left), Some(right)) => {
                Expr::BinaryExpr(BinaryExpr::new(Box::new(left), *operator, Box::new(right)))
            }
            (Some(Does::Negate), _, Some(of)) => Expr::Negative(Box::new(of)),
            (.., of) => of.unwrap_or_default(),
        }
    }

    /// The error in terms of the SQL as it was written.
    fn said(&self, error: DataFusionError) -> DataFusionError {
        let DataFusionError::ArrowError(arrow, backtrace) = error else { return error };
        let of_type = type_name(&self.returns);
        let integer = self.returns.is_integer();
        let (what, cure) = match (*arrow, &self.does) {
            (ArrowError::DivideByZero, _) => (
                "divides by zero".to_owned(),
                "write nullif(…, 0) around what it is divided by: the result is then null, and coalesce(…, 0) makes it a number",
            ),
            (ArrowError::ArithmeticOverflow(text), _) => {
                let values = text.strip_prefix("Overflow happened on: ").map(|values| format!(": {values}"));
                (
                    format!("is beyond {of_type}{}", values.unwrap_or_default()),
                    match integer {
                        true => "write cast(… as decimal(38, 0)) or cast(… as double) around one side",
                        false => "write cast(… as double) around one side",
                    },
                )
            }
            (ArrowError::InvalidArgumentError(_), Does::Operator(_) | Does::Negate)
                if self.returns.is_decimal() =>
            {
                (format!("is beyond {of_type}"), "write cast(… as double) around one side")
            }
            (ArrowError::CastError(_) | ArrowError::InvalidArgumentError(_), Does::Narrow) => (
                format!("is beyond {of_type}"),
                match integer {
                    true => "sum cast(… as decimal(38, 0))",
                    false => "make what is summed smaller: divide it by a power of 2, or take fewer digits",
                },
            ),
            (other, _) => return DataFusionError::ArrowError(Box::new(other), backtrace),
        };
        let place =
            self.place.map(|place| format!("line {}, column {}: ", place.start.line, place.start.column));
        let message = format!("{}`{}` {what}", place.unwrap_or_default(), self.written);
        NoNumber::beyond(message, cure)
    }

    /// Checks that a decimal has no more digits than its type allows: Arrow only reports an overflow of the
    /// 128 bits.
    fn within(&self, computed: ColumnarValue) -> Result<ColumnarValue> {
        let DataType::Decimal128(digits, _) = self.returns else { return Ok(computed) };
        on_one(&computed, |array| {
            let decimals = array.as_primitive::<Decimal128Type>();
            decimals.validate_decimal_precision(digits)?;
            Ok(Arc::new(decimals.clone()))
        })
    }

    fn computed(&self, args: &[ColumnarValue]) -> Result<ColumnarValue> {
        match (&self.does, args) {
            (Does::Operator(operator), [left, right]) => match operator {
                Operator::Plus => apply(left, right, add),
                Operator::Minus => apply(left, right, sub),
                Operator::Multiply => apply(left, right, mul),
                Operator::Divide => apply(left, right, div),
                Operator::Modulo => apply(left, right, rem),
                other => internal_err!("{other} is no arithmetic"),
            },
            (Does::Negate, [value]) => on_one(value, |array| Ok(neg(array)?)),
            (Does::Narrow, [value]) => {
                on_one(value, |array| Ok(cast_with_options(array, &self.returns, &STRICT)?))
            }
            (Does::Canonical, [value]) => Ok(value.clone()),
            (does, args) => internal_err!("{does:?} of {} arguments", args.len()),
        }
    }
}

/// A cast fails on a number that does not fit its type, instead of returning a null.
const STRICT: CastOptions<'static> = CastOptions { safe: false, format_options: FormatOptions::new() };

impl ScalarUDFImpl for Checked {
    fn name(&self) -> &str {
        match self.does {
            Does::Operator(_) => "checked",
            Does::Negate => "checked_minus",
            Does::Narrow => "checked_sum",
            Does::Canonical => "checked_float",
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(self.returns.clone())
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> Result<FieldRef> {
        let nullable = self.returns.is_floating() || args.arg_fields.iter().any(|field| field.is_nullable());
        Ok(Arc::new(Field::new(self.name(), self.returns.clone(), nullable)))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let computed = self.computed(&args.args).and_then(|computed| self.within(computed));
        let computed = computed.map_err(|e| self.said(e))?;
        match self.returns {
            DataType::Float64 => on_one(&computed, |array| Ok(canonical::<Float64Type>(array, f64::is_nan))),
            DataType::Float32 => on_one(&computed, |array| Ok(canonical::<Float32Type>(array, f32::is_nan))),
            _ => Ok(computed),
        }
    }
}

/// The floats with null for NaN and 0 for −0.
fn canonical<T: ArrowPrimitiveType>(array: &dyn Array, is_nan: fn(T::Native) -> bool) -> ArrayRef
where
    T::Native: std::ops::Add<Output = T::Native> + Default,
{
    let zero = T::Native::default();
    let array: &PrimitiveArray<T> = array.as_primitive();
    Arc::new(match array.values().iter().any(|value| is_nan(*value)) {
        true => array.unary_opt::<_, T>(|value| (!is_nan(value)).then(|| value + zero)),
        false => array.unary::<_, T>(|value| value + zero),
    })
}

fn on_one(
    value: &ColumnarValue,
    compute: impl FnOnce(&dyn Array) -> Result<ArrayRef>,
) -> Result<ColumnarValue> {
    Ok(match value {
        ColumnarValue::Array(array) => ColumnarValue::Array(compute(array)?),
        ColumnarValue::Scalar(scalar) => {
            let array = compute(scalar.to_array()?.as_ref())?;
            ColumnarValue::Scalar(ScalarValue::try_from_array(&array, 0)?)
        }
    })
}

/// The longest expression that a message shows, in characters.
const MAX_SHOWN: usize = 80;

/// An expression as SQL, without casts: the planner added most of them.
fn written(expr: &Expr) -> String {
    let plain = expr.clone().transform_down(|mut expr| {
        loop {
            expr = match expr {
                Expr::Cast(Cast { expr, .. }) => *expr,
                Expr::ScalarFunction(call) if Checked::is(&call) => Checked::undone(call),
                other => return Ok(Transformed::yes(other)),
            }
        }
    });
    let sql = plain.and_then(|plain| expr_to_sql(&plain.data)).map(|sql| match sql {
        SqlExpr::Nested(inner) => inner.to_string(),
        sql => sql.to_string(),
    });
    let sql = sql.unwrap_or_else(|_| expr.human_display().to_string());
    match sql.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}…", &sql[..end]),
        None => sql,
    }
}

/// A type's name in SQL.
fn type_name(of_type: &DataType) -> String {
    match of_type {
        DataType::Int64 => "bigint".to_owned(),
        DataType::Int32 => "int".to_owned(),
        DataType::Decimal128(digits, scale) | DataType::Decimal256(digits, scale) => {
            format!("decimal({digits}, {scale})")
        }
        other => other.to_string(),
    }
}

/// The place where the first column of some expressions was written.
pub fn first_place<'e>(exprs: impl IntoIterator<Item = &'e Expr>) -> Option<Span> {
    let mut place = None;
    for expr in exprs {
        let _ = expr.apply(|expr| {
            place = place.or_else(|| expr.try_as_col().and_then(|column| column.spans().first()));
            Ok(if place.is_some() { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
        });
    }
    place
}

/// Replaces RANGE by GROUPS in windows that are ordered by a `doc_id`. RANGE is the default frame, but
/// DataFusion supports it only over numbers, texts and times. Without a distance, GROUPS is the same frame.
#[derive(Debug)]
struct Frames;

impl FunctionRewrite for Frames {
    fn name(&self) -> &str {
        "frames"
    }

    fn rewrite(&self, expr: Expr, schema: &DFSchema, _: &ConfigOptions) -> Result<Transformed<Expr>> {
        let Expr::WindowFunction(mut call) = expr else { return Ok(Transformed::no(expr)) };
        let WindowFunction { params, .. } = call.as_mut();
        let frame = &params.window_frame;
        let no_distance = |bound: &WindowFrameBound| match bound {
            WindowFrameBound::Preceding(value) | WindowFrameBound::Following(value) => value.is_null(),
            WindowFrameBound::CurrentRow => true,
        };
        let key = params.order_by.first().and_then(|sort| sort.expr.get_type(schema).ok());
        let of_bytes = key.is_some_and(|key| key.is_binary() || matches!(key, DataType::FixedSizeBinary(_)));
        if frame.units != WindowFrameUnits::Range
            || !of_bytes
            || !no_distance(&frame.start_bound)
            || !no_distance(&frame.end_bound)
        {
            return Ok(Transformed::no(Expr::WindowFunction(call)));
        }
        let (start, end) = (frame.start_bound.clone(), frame.end_bound.clone());
        params.window_frame = WindowFrame::new_bounds(WindowFrameUnits::Groups, start, end);
        Ok(Transformed::yes(Expr::WindowFunction(call)))
    }
}

#[cfg(test)]
mod tests {
    use arrow::util::display::array_value_to_string;

    use super::*;

    /// The values of a query's only column, joined by commas, or its error.
    async fn ask(sql: &str) -> Result<String, crate::Error> {
        let failed = |e| crate::sql::engine::query("cannot run", e);
        let session = crate::sql::engine::Engine::new(2, 64 << 20, None)?.session();
        let rows = session.sql(sql).await.map_err(failed)?.collect().await.map_err(failed)?;
        let values = rows.iter().flat_map(|rows| {
            let column = rows.column(0);
            (0..rows.num_rows()).map(|row| match column.is_null(row) {
                true => "null".to_owned(),
                false => array_value_to_string(column, row).unwrap(),
            })
        });
        Ok(values.collect::<Vec<_>>().join(", "))
    }

    /// Evaluates `expr` on one row with the columns `x` (bigint), `unit` = 1 and `zero` = 0, so that no
    /// operand is a constant.
    async fn of(x: &str, expr: &str) -> Result<String, crate::Error> {
        let rows = format!("(values (cast({x} as bigint), 1, 0)) as t(x, unit, zero)");
        ask(&format!("select {expr} from {rows}")).await
    }

    const LEAST: &str = "'-9223372036854775808'";
    const MOST: &str = "9223372036854775807";

    #[tokio::test]
    async fn integers_that_overflow_are_an_error_that_names_the_place_and_the_cure() {
        for (x, expr, message) in [
            (MOST, "x + unit", "line 1, column 8: `t.x + t.unit` is beyond bigint: 9223372036854775807 + 1"),
            (LEAST, "x - unit", "`t.x - t.unit` is beyond bigint: -9223372036854775808 - 1"),
            (MOST, "x * 2", "`t.x * 2` is beyond bigint: 9223372036854775807 * 2"),
            (LEAST, "-x", "`-t.x` is beyond bigint"),
            (LEAST, "x / -unit", "is beyond bigint"),
            (MOST, "9000000000 * 9000000000", "`9000000000 * 9000000000` is beyond bigint"),
            (MOST, "coalesce(x, 0) + (x + unit) * zero", "`t.x + t.unit` is beyond bigint"),
            ("1", "(select max(x) + 9223372036854775807 from (values (1)) as u(x))", "is beyond bigint"),
            (
                MOST,
                "sum(x) from (values (9223372036854775807), (1)) as u(x) where 1 < 2 --",
                "is beyond bigint",
            ),
            (MOST, "sum(x) over () from (values (9223372036854775807), (1)) as u(x) --", "`sum(u.x) OVER"),
            (MOST, "sum(distinct x) from (values (9223372036854775807), (1)) as u(x) --", "is beyond bigint"),
        ] {
            let error = of(x, expr).await.expect_err(expr);
            let help = miette::Diagnostic::help(&error).map(|help| help.to_string()).unwrap_or_default();
            assert!(error.to_string().contains(message), "{expr}: {error}");
            assert!(help.contains("cast(… as decimal(38, 0))"), "{expr}: {help}");
            assert_eq!(error.exit_code(), 3);
        }
        for (x, expr, value) in [
            (MOST, "x - unit + 1", MOST),
            (LEAST, "x % -unit", "0"),
            (MOST, "cast(x as decimal(38, 0)) * x", "85070591730234615847396907784232501249"),
            (
                MOST,
                "sum(cast(x as decimal(38, 0))) from (values (9223372036854775807), (1)) as u(x) --",
                "9223372036854775808",
            ),
            ("5", "sum(x) filter (where x > 3) + count(*) from (values (5), (4), (1)) as u(x) --", "12"),
        ] {
            assert_eq!(of(x, expr).await.unwrap(), value, "{expr}");
        }
    }

    #[tokio::test]
    async fn decimals_that_overflow_are_an_error_and_so_are_their_sums() {
        const BIG: &str = "cast(9e37 as decimal(38, 0))";
        for expr in [
            format!("{BIG} * x"),
            format!("{BIG} + {BIG}"),
            format!("sum(y) from (values ({BIG}), ({BIG})) as u(y) --"),
            format!("sum(y) from (values ({BIG}), ({BIG}), ({BIG}), ({BIG})) as u(y) group by 1 = 1 --"),
            format!("sum(y) over () from (values ({BIG}), ({BIG})) as u(y) --"),
            format!("sum(distinct y) from (values ({BIG}), ({BIG} - 1)) as u(y) --"),
        ] {
            let error = of("3", &expr).await.expect_err(&expr).to_string();
            assert!(error.contains("is beyond decimal(38, 0)"), "{expr}: {error}");
        }
        let most = "9".repeat(38);
        let of_two = |sum: &str| {
            format!(
                "{sum} from (values (cast('1' as decimal(38, 0))), (cast('{most}' as decimal(38, 0)) - 1)) as u(y) --"
            )
        };
        for (sum, values) in
            [("sum(y)", most.clone()), ("sum(y) over (order by y rows 1 preceding)", format!("1, {most}"))]
        {
            assert_eq!(of("3", &of_two(sum)).await.unwrap(), values, "{sum}");
        }
        // half of `most`, rounded either way
        let median = of("3", &of_two("median(y)")).await.unwrap();
        assert!(
            median == format!("4{}", "9".repeat(37)) || median == format!("5{}", "0".repeat(37)),
            "{median}"
        );
    }

    #[tokio::test]
    async fn a_division_by_zero_names_the_place_and_the_cure() {
        for expr in ["x / zero", "x % zero", "cast(x as decimal(38, 0)) / zero", "5 / 0"] {
            let error = of("7", expr).await.expect_err(expr);
            let help = miette::Diagnostic::help(&error).unwrap().to_string();
            assert!(error.to_string().contains("divides by zero"), "{expr}: {error}");
            assert!(help.contains("nullif(…, 0)"), "{help}");
        }
        assert_eq!(of("7", "case when zero <> 0 then x / zero else -1 end").await.unwrap(), "-1");
    }

    #[tokio::test]
    async fn numbers_that_do_not_fit_where_they_are_cast_to_are_an_error() {
        for expr in [
            "cast(x as int)",
            "cast(x * 1e10 as bigint)",
            "cast(0.0 / zero as bigint) is not null or cast(1e300 * x as decimal(38, 0)) > 0",
            "cast(cast(x as decimal(38, 0)) * 1000000000000 as bigint)",
            "abs(x - 9223372036854775807 - 1000000000001)",
            "lcm(x, x - 1)",
            "factorial(x)",
        ] {
            let answer = of("1000000000000", expr).await;
            assert!(answer.is_err(), "{expr}: {answer:?}");
        }
        assert_eq!(of("1000000000000", "try_cast(x as int)").await.unwrap(), "null");
    }

    #[tokio::test]
    async fn a_null_that_a_check_made_is_known_to_be_one_in_every_plan() {
        let union = "(select 1.0 as u union all select 0.0 / 0.0) as t";
        for (expr, value) in [
            (format!("count(*) filter (where u is null) from {union} --"), "1"),
            (format!("sum(cast(coalesce(u, 9.0) as decimal(38, 0))) from {union} --"), "10"),
            (format!("count(distinct u) from {union} --"), "1"),
            (format!("median(u) from {union} --"), "1.0"),
            ("count(*) filter (where u is null) from (values (0.0 / 0.0), (1.0)) as t(u) --".to_owned(), "1"),
            (
                "count(*) from (select 1 as k, 0.0 / 0.0 as u) as o \
                 where exists (select 1 from (values (1)) as d(k) where d.k = o.k and coalesce(o.u, 9.0) > 5) --"
                    .to_owned(),
                "1",
            ),
        ] {
            assert_eq!(of("3", &expr).await.unwrap(), value, "{expr}");
        }
    }

    #[tokio::test]
    async fn a_decimal_of_more_digits_than_there_are_is_an_error() {
        let nines = "9".repeat(37);
        for expr in ["y * 17", "y * 10 + 9 + 1", "-y * 10 - 99"] {
            let expr = format!("{expr} from (values (cast('{nines}' as decimal(38, 0)))) as u(y) --");
            let error = of("3", &expr).await.expect_err(&expr).to_string();
            assert!(error.contains("is beyond decimal(38, 0)"), "{expr}: {error}");
        }
    }

    #[tokio::test]
    async fn what_is_no_number_is_null_and_minus_zero_is_zero() {
        for (expr, value) in [
            ("0.0 / zero", "null"),
            ("cast(x as double) / zero - 1.0 / zero", "null"),
            ("ln(-x)", "null"),
            ("power(-x, 0.5)", "null"),
            ("cast('nan' as double)", "null"),
            ("cast('-0' as double)", "0.0"),
            ("-0.0", "0.0"),
            ("zero * -1.0", "0.0"),
            ("-(zero * 1.0)", "0.0"),
            ("round(-0.3 * x)", "-1.0"),
            ("round(-0.1 * x)", "0.0"),
            ("ceil(-0.1 * x)", "0.0"),
            ("1.0 / (zero * -1.0)", "inf"),
            ("max(y) from (values (0.0), (-0.0)) as u(y) --", "0.0"),
            ("median(y) from (values (1.0 / 0), (-1.0 / 0)) as u(y) --", "null"),
            ("avg(y) over () from (values (1.0 / 0)) as u(y) --", "inf"),
        ] {
            assert_eq!(of("3", expr).await.unwrap(), value, "{expr}");
        }
    }

    #[tokio::test]
    async fn columns_keep_the_names_that_they_have_without_checks() {
        let session = crate::sql::engine::Engine::new(1, 64 << 20, None).unwrap().session();
        let plain = SessionContext::new();
        for sql in [
            "select x + 1, -x, sum(x) over () from (values (1)) as t(x)",
            "select x % 2, sum(x + 1), median(x * 0.5) from (values (1)) as t(x) group by x % 2 having sum(x) > 0",
            "select y + 1 from (select sum(x) as y from (values (1)) as t(x)) as u order by y + 1",
            "with recursive n as (select 1 as i, 1.0 as f union all select i + 1, f * 0.5 from n where i < 5) select * from n",
            "select count(*) from (values (1)) as t(x) where x + 1 in (select y * 2 from (values (1)) as u(y))",
        ] {
            let batches = session.sql(sql).await.unwrap().collect().await.unwrap();
            let wanted = plain.sql(sql).await.unwrap().collect().await.unwrap();
            let names = |rows: &[arrow::array::RecordBatch]| {
                let schema = rows[0].schema();
                schema.fields().iter().map(|f| (f.name().clone(), f.data_type().clone())).collect::<Vec<_>>()
            };
            assert_eq!(names(&batches), names(&wanted), "{sql}");
            assert_eq!(
                batches.iter().map(|b| b.num_rows()).sum::<usize>(),
                wanted.iter().map(|b| b.num_rows()).sum::<usize>()
            );
        }
    }

    #[tokio::test]
    async fn a_window_may_be_ordered_by_an_id() {
        let sql = "select row_number() over (order by id) + sum(n) over (partition by n order by id) from \
                   (values (arrow_cast(x'01', 'FixedSizeBinary(1)'), 1), (arrow_cast(x'02', 'FixedSizeBinary(1)'), 1)) as t(id, n)";
        assert_eq!(ask(sql).await.unwrap(), "2, 4");
    }
}

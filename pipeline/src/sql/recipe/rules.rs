//! Rules that keep a recipe's rows independent of machines, partitions and the clock, and of anything that is
//! not in the file.
//!
//! A rule that can be decided on the syntax tree is checked there. The others are checked on the query plan,
//! where functions are resolved and expressions have types. Columns in the plan record where they were
//! written, and give the error its place.

use std::collections::BTreeSet;
use std::ops::{ControlFlow, Range};

use arrow::datatypes::DataType;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::logical_expr::expr::{AggregateFunction, WindowFunction};
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{
    AggregateUDF, Cast, Distinct, Expr, ExprSchemable, JoinType, LogicalPlan, Operator, SortExpr, TryCast,
    Unnest, WindowFrame, WindowFrameBound, WindowFrameUnits, WindowFunctionDefinition,
};
use datafusion::sql::sqlparser::ast::{
    BinaryOperator, Cte, Expr as SqlExpr, FunctionArg, FunctionArgExpr, ObjectName, Query, Select, SetExpr,
    Spanned, TableFactor, UnaryOperator, Visit, Visitor,
};

use super::allowed;
use super::place::{Places, Text, nearest};
use crate::sql::functions::exact::first_place;
use crate::{Error, Result};

/// The tables that a recipe may read.
const TABLES: [&str; 3] = ["documents", "domains", "shares"];

/// Refuses SQL, in any text, that means something else than it seems to mean, or that DataFusion does not
/// support.
pub fn check_words(text: &Text, query: &Query) -> Result<()> {
    match query.visit(&mut Words(text)) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(error) => Err(*error),
    }
}

struct Words<'a>(&'a Text);

impl Words<'_> {
    fn refuse(&self, at: &impl Spanned, message: &str, label: &str, cure: &str) -> ControlFlow<Box<Error>> {
        ControlFlow::Break(Box::new(self.0.wrong(self.0.range(at.span()), message, label, cure)))
    }

    /// Refuses computed arguments of a function in FROM. DataFusion evaluates them while it plans, with
    /// integers that wrap and with the clock.
    fn fixed(&self, argument: &SqlExpr) -> ControlFlow<Box<Error>> {
        match argument {
            SqlExpr::Value(_) | SqlExpr::TypedString(_) => ControlFlow::Continue(()),
            SqlExpr::Interval(interval) => self.fixed(&interval.value),
            SqlExpr::UnaryOp { op: UnaryOperator::Minus | UnaryOperator::Plus, expr }
            | SqlExpr::Cast { expr, .. }
            | SqlExpr::Nested(expr) => self.fixed(expr),
            other => self.refuse(
                other,
                "a function in FROM takes numbers as they stand",
                "computed",
                "write the number or a parameter, or select from unnest(range(…)), which may compute",
            ),
        }
    }
}

impl Visitor for Words<'_> {
    type Break = Box<Error>;

    fn pre_visit_table_factor(&mut self, table: &TableFactor) -> ControlFlow<Box<Error>> {
        const JOIN: &str = "join the table, or write unnest(…) in SELECT";
        let arguments = match table {
            TableFactor::Derived { lateral: true, .. } | TableFactor::Function { lateral: true, .. } => {
                return self.refuse(table, "LATERAL is not understood here", "here", JOIN);
            }
            TableFactor::Function { args, .. } => args,
            TableFactor::Table { args: Some(args), .. } => &args.args,
            _ => return ControlFlow::Continue(()),
        };
        arguments.iter().try_for_each(|argument| match argument {
            FunctionArg::Unnamed(FunctionArgExpr::Expr(argument))
            | FunctionArg::Named { arg: FunctionArgExpr::Expr(argument), .. }
            | FunctionArg::ExprNamed { arg: FunctionArgExpr::Expr(argument), .. } => self.fixed(argument),
            _ => ControlFlow::Continue(()),
        })
    }

    fn pre_visit_expr(&mut self, expr: &SqlExpr) -> ControlFlow<Box<Error>> {
        use BinaryOperator::{
            BitwiseXor, DuckIntegerDivide, PGBitwiseShiftLeft, PGBitwiseShiftRight, PGBitwiseXor,
        };
        let SqlExpr::BinaryOp { op, .. } = expr else { return ControlFlow::Continue(()) };
        let (message, cure) = match op {
            DuckIntegerDivide => ("there is no operator `//`", "`/` of two integers is an integer"),
            BitwiseXor | PGBitwiseXor => {
                ("this is the exclusive or of bits, and no power", "write power(x, 2)")
            }
            PGBitwiseShiftLeft | PGBitwiseShiftRight => {
                ("a shift of bits loses some of them in silence", "write `* 1024` or `/ 1024`")
            }
            _ => return ControlFlow::Continue(()),
        };
        self.refuse(expr, message, "here", cure)
    }
}

/// Refuses tables that a recipe may not read, and clauses that do more than select.
pub fn check_tables(text: &Text, query: &Query) -> Result<()> {
    let mut steps = Steps::default();
    let _ = query.visit(&mut steps);
    match query.visit(&mut Syntax { text, steps: &steps.0 }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(error) => Err(*error),
    }
}

/// The names of all CTEs.
#[derive(Default)]
struct Steps(Vec<String>);

impl Visitor for Steps {
    type Break = ();

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        let steps = query.with.iter().flat_map(|with| &with.cte_tables);
        self.0.extend(steps.map(|Cte { alias, .. }| alias.name.value.clone()));
        ControlFlow::Continue(())
    }
}

struct Syntax<'a> {
    text: &'a Text,
    steps: &'a [String],
}

impl Syntax<'_> {
    fn refuse(
        &self,
        at: &impl Spanned,
        message: impl Into<String>,
        label: &str,
        cure: impl Into<String>,
    ) -> ControlFlow<Box<Error>> {
        ControlFlow::Break(Box::new(self.text.wrong(self.text.range(at.span()), message, label, cure)))
    }

    fn table(&self, name: &ObjectName) -> ControlFlow<Box<Error>> {
        let parts: Vec<_> = name.0.iter().filter_map(|part| part.as_ident()).collect();
        let written = parts.iter().map(|part| part.value.as_str()).collect::<Vec<_>>().join(".");
        let is_file =
            parts.iter().any(|part| part.quote_style == Some('\'') || part.value.contains(['/', '.', '*']));
        let suffix = parts.last().map(|part| part.value.to_lowercase()).unwrap_or_default();
        let is_file = is_file
            || (parts.len() > 1 && ["parquet", "csv", "json", "jsonl", "arrow"].contains(&suffix.as_str()));
        if is_file {
            let cure = "everything about a mixture is in its recipe: it reads documents, domains and shares; \
                 a small table of your own can be written as `(values ('Book', 2.0), …) as weights(domain, weight)`";
            // the parser gives a quoted name no span
            let found = || self.text.text.find(&written).map(|at| at..at + written.len());
            let place = self.text.range(name.span()).or_else(found);
            let message = format!("a recipe reads no files, but here is `{written}`");
            return ControlFlow::Break(Box::new(self.text.wrong(place, message, "a file", cure)));
        }
        let known = || TABLES.into_iter().chain(self.steps.iter().map(String::as_str));
        if parts.len() == 1 && known().any(|known| known.eq_ignore_ascii_case(&written)) {
            return ControlFlow::Continue(());
        }
        let last = parts.last().map(|part| part.value.as_str()).unwrap_or_default();
        let like = nearest(last, known()).map_or("a".to_owned(), |like| format!("did you mean `{like}`? A"));
        let steps: Vec<&str> =
            self.steps.iter().map(String::as_str).filter(|step| !TABLES.contains(step)).collect();
        let steps = if steps.is_empty() {
            String::new()
        } else {
            format!(", and its own steps: {}", steps.join(", "))
        };
        let cure = format!("{like} recipe reads {}{steps}", TABLES.join(", "));
        self.refuse(name, format!("there is no table `{written}`"), "not a table", cure)
    }

    fn table_function(&self, name: &ObjectName) -> ControlFlow<Box<Error>> {
        let written = name.to_string().to_lowercase();
        if allowed::TABLES.contains(&written.as_str()) {
            return ControlFlow::Continue(());
        }
        let cure = format!(
            "a recipe reads documents, domains and shares; it may also select from {}",
            allowed::TABLES.join(", ")
        );
        self.refuse(name, format!("a recipe cannot read from `{written}(…)`"), "this function", cure)
    }
}

impl Visitor for Syntax<'_> {
    type Break = Box<Error>;

    fn pre_visit_table_factor(&mut self, table: &TableFactor) -> ControlFlow<Box<Error>> {
        const SAMPLE: &str =
            "keep a share of documents by their hash: `where unit_hash($seed, doc_id, 0) < 0.1`";
        match table {
            TableFactor::Table { sample: Some(_), .. } | TableFactor::Derived { sample: Some(_), .. } => {
                self.refuse(table, "TABLESAMPLE takes other rows on every run", "a sample of this", SAMPLE)
            }
            TableFactor::Table { name, args: Some(_), .. } | TableFactor::Function { name, .. } => {
                self.table_function(name)
            }
            TableFactor::Table { name, .. } => self.table(name),
            _ => ControlFlow::Continue(()),
        }
    }

    fn pre_visit_expr(&mut self, expr: &SqlExpr) -> ControlFlow<Box<Error>> {
        match expr {
            SqlExpr::Identifier(ident) if ident.value.starts_with('@') => {
                let cure = "parameters are written `$name` and declared in the header";
                self.refuse(expr, format!("a recipe has no variables, but here is `{ident}`"), "here", cure)
            }
            _ => ControlFlow::Continue(()),
        }
    }

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<Box<Error>> {
        match query.body.as_ref() {
            SetExpr::Insert(_) | SetExpr::Update(_) | SetExpr::Delete(_) | SetExpr::Merge(_) => {
                self.refuse(query, "a recipe selects rows and changes none", "here", "write one SELECT")
            }
            _ => ControlFlow::Continue(()),
        }
    }

    fn pre_visit_select(&mut self, select: &Select) -> ControlFlow<Box<Error>> {
        match &select.into {
            Some(into) => self.refuse(
                &into.name,
                "a recipe writes no tables",
                "written here",
                "leave INTO out: the rows of the SELECT are the result",
            ),
            None => ControlFlow::Continue(()),
        }
    }
}

/// Something in a query plan that is refused.
struct Refusal {
    place: Option<Range<usize>>,
    message: String,
    label: &'static str,
    cure: String,
}

/// Refuses a plan whose rows would depend on anything but the tables and the parameters. The error names the
/// first such place in the text.
pub fn check_plan(text: &Text, places: &Places<'_>, plan: &LogicalPlan) -> Result<()> {
    let mut walk = Walk { places, refusals: vec![] };
    let walked = plan.apply_with_subqueries(|node| {
        walk.node(node)?;
        Ok(TreeNodeRecursion::Continue)
    });
    walked.map_err(|e| places.unplanned(&e))?;
    let first = walk
        .refusals
        .into_iter()
        .min_by_key(|refusal| refusal.place.as_ref().map_or(usize::MAX, |at| at.start));
    match first {
        None => Ok(()),
        Some(Refusal { place, message, label, cure }) => Err(text.wrong(place, message, label, cure)),
    }
}

struct Walk<'a> {
    places: &'a Places<'a>,
    refusals: Vec<Refusal>,
}

impl Walk<'_> {
    fn node(&mut self, node: &LogicalPlan) -> datafusion::error::Result<()> {
        let inputs = node.inputs();
        let group: &[Expr] = match node {
            LogicalPlan::Aggregate(aggregate) => &aggregate.group_expr,
            LogicalPlan::Limit(limit) => {
                self.limit(&limit.input);
                &[]
            }
            LogicalPlan::Distinct(Distinct::On(distinct)) => {
                let sorts = distinct.sort_expr.iter().flatten().map(|sort| &sort.expr);
                if let Some(missing) = ties(distinct.on_expr.iter().chain(sorts), &distinct.input) {
                    let what = "DISTINCT ON takes one of the rows that tie, in any order";
                    self.refuse(self.places.distinct_on(), what, "here", order_cure(&missing));
                }
                &[]
            }
            _ => &[],
        };
        node.apply_expressions(|expr| {
            expr.apply(|expr| {
                match (expr, inputs.first()) {
                    (Expr::ScalarFunction(call), _) => {
                        self.named(call.func.name(), call.func.aliases(), &call.args);
                    }
                    (Expr::HigherOrderFunction(call), _) => {
                        self.named(call.func.name(), call.func.aliases(), &call.args);
                    }
                    (Expr::Cast(Cast { expr, field }) | Expr::TryCast(TryCast { expr, field }), _) => {
                        self.cast(expr, field.data_type());
                    }
                    (Expr::AggregateFunction(call), Some(input)) => self.aggregate(call, group, input),
                    (Expr::WindowFunction(call), Some(input)) => self.window(call, input),
                    _ => {}
                }
                Ok(TreeNodeRecursion::Continue)
            })
        })?;
        Ok(())
    }

    fn refuse(
        &mut self,
        place: Option<Range<usize>>,
        message: impl Into<String>,
        label: &'static str,
        cure: impl Into<String>,
    ) {
        self.refusals.push(Refusal { place, message: message.into(), label, cure: cure.into() });
    }

    /// Refuses a scalar function that is not allowed.
    fn named(&mut self, name: &str, aliases: &[String], args: &[Expr]) {
        if let Some((message, cure)) = allowed::refused(name) {
            let site = self.places.call(&all_names(name, aliases), first_place(args));
            self.refuse(site.place, message, "here", cure);
        }
    }

    /// Refuses casts to lists: a list of texts may hold "NaN", and its cast to floats is not checked.
    fn cast(&mut self, of: &Expr, to: &DataType) {
        if to.is_nested() {
            let place = first_place([of]).and_then(|at| self.places.range(at));
            self.refuse(place, "a recipe casts no lists", "here", "cast their values, one by one");
        }
    }

    fn aggregate(&mut self, call: &AggregateFunction, group: &[Expr], input: &LogicalPlan) {
        let params = &call.params;
        let keys = group.iter().chain(params.order_by.iter().map(|sort| &sort.expr));
        let names = all_names(call.func.name(), call.func.aliases());
        let site = self.places.call(&names, first_place(&params.args));
        if let Some((message, cure)) = adding(&call.func, &params.args, &site.argument, keys, input) {
            self.refuse(site.place, message, "here", cure);
        }
    }

    fn window(&mut self, call: &WindowFunction, input: &LogicalPlan) {
        let params = &call.params;
        let keys =
            || params.partition_by.iter().chain(params.order_by.iter().map(|sort: &SortExpr| &sort.expr));
        let names = match &call.fun {
            WindowFunctionDefinition::AggregateUDF(function) => {
                all_names(function.name(), function.aliases())
            }
            WindowFunctionDefinition::WindowUDF(function) => all_names(function.name(), function.aliases()),
        };
        let columns: Vec<Expr> = params.args.iter().chain(keys()).cloned().collect();
        let site = self.places.call(&names, first_place(&columns));
        let of_ties = |missing: Vec<String>| {
            (
                format!("{}({}) depends on the order of rows that tie", names[0], site.argument),
                order_cure(&missing),
            )
        };
        let refused = match &call.fun {
            WindowFunctionDefinition::WindowUDF(_) if !allowed::WINDOWS.contains(&names[0]) => {
                Some(allowed::unknown(names[0]))
            }
            WindowFunctionDefinition::AggregateUDF(function) => {
                adding(function, &params.args, &site.argument, keys(), input).or_else(|| {
                    ties(keys(), input).filter(|_| splits_ties(&params.window_frame)).map(of_ties)
                })
            }
            // rows that tie get the same number
            WindowFunctionDefinition::WindowUDF(_)
                if ["rank", "dense_rank", "percent_rank", "cume_dist"].contains(&names[0]) =>
            {
                None
            }
            WindowFunctionDefinition::WindowUDF(_) => ties(keys(), input).map(of_ties),
        };
        if let Some((message, cure)) = refused {
            self.refuse(site.place, message, "here", cure);
        }
    }

    fn limit(&mut self, input: &LogicalPlan) {
        let mut below = input;
        let missing = loop {
            match below {
                LogicalPlan::Projection(projection) => below = &projection.input,
                LogicalPlan::SubqueryAlias(alias) => below = &alias.input,
                LogicalPlan::Sort(sort) => {
                    break ties(sort.expr.iter().map(|key| &key.expr), &sort.input);
                }
                other => break ties([].into_iter(), other),
            }
        };
        if let Some(missing) = missing {
            let message = "LIMIT takes any of the rows, unless ORDER BY leaves no two of them equal";
            self.refuse(self.places.limit(), message, "here", order_cure(&missing));
        }
    }
}

/// What is wrong with an aggregate function, and the cure; `None` if it is allowed. `argument` is its
/// argument as written, and `keys` order its rows.
fn adding<'e>(
    function: &AggregateUDF,
    args: &[Expr],
    argument: &str,
    keys: impl Iterator<Item = &'e Expr>,
    input: &LogicalPlan,
) -> Option<(String, String)> {
    let name = function.name();
    let of_type = args.first().and_then(|arg| arg.get_type(input.schema().as_ref()).ok());
    let cure = format!("write exact_sum({argument})");
    match name {
        _ if allowed::AGGREGATES.contains(&name) => None,
        // if the type is unknown, the planner's own message is better
        "sum" => match of_type? {
            DataType::Decimal128(..) | DataType::Decimal256(..) => None,
            integer if integer.is_integer() || integer.is_null() => {
                Some((format!("sum({argument}) adds up {integer}: the sum may be beyond it"), cure))
            }
            float => Some((
                format!("sum({argument}) adds up {float}: its last bits depend on the order of the rows"),
                cure,
            )),
        },
        "avg" => Some((
            format!("avg({argument}) adds up floats: its last bits depend on the order of the rows"),
            format!("write (exact_sum(cast({argument} as double)) / count({argument}))"),
        )),
        "first_value" | "last_value" | "nth_value" | "array_agg" | "string_agg" => {
            let keys: Vec<&Expr> = keys.collect();
            // all arguments are among the keys, so rows that tie give the same values
            let literal = |arg: &Expr| matches!(arg, Expr::Literal(..));
            if args.iter().all(|arg| literal(arg) || keys.contains(&arg)) {
                return None;
            }
            let missing = ties(keys.into_iter(), input)?;
            Some((format!("{name}({argument}) depends on the order of rows that tie"), order_cure(&missing)))
        }
        "any_value" => Some((
            format!("any_value({argument}) may be another one on every run"),
            format!("write min({argument})"),
        )),
        "approx_distinct" => Some((
            format!("`{name}` depends on how rows are split"),
            format!("write count(distinct {argument})"),
        )),
        "approx_median" | "approx_percentile_cont" | "approx_percentile_cont_with_weight" => Some((
            format!("`{name}` depends on how rows are split"),
            format!(
                "median({argument}) and percentile_cont({argument}, 0.5) are exact; `domains` has p25, p50, p75, p90, p99"
            ),
        )),
        _ if allowed::FLOAT_SUMS.contains(&name) => Some((
            format!("`{name}` adds up floats: its last bits depend on the order of the rows"),
            "write it with exact_sum, which adds up floats the same in any order".to_owned(),
        )),
        _ => Some(allowed::unknown(name)),
    }
}

/// The columns that ORDER BY lacks for a total order of a plan's rows; `None` if the order is total. It is
/// total if the keys contain a unique set of columns, or all columns, in which case rows that tie are equal.
fn ties<'e>(keys: impl Iterator<Item = &'e Expr>, input: &LogicalPlan) -> Option<Vec<String>> {
    let schema = input.schema();
    let ordered: Columns = keys
        .filter_map(|key| key.try_as_col())
        .filter_map(|column| schema.maybe_index_of_column(column))
        .collect();
    let all: Columns = (0..schema.fields().len()).collect();
    let mut known = unique(input);
    known.push(all);
    let missing = known.iter().map(|key| key - &ordered).min_by_key(|missing| missing.len())?;
    let name = |i: usize| schema.field(i).name().clone();
    (!missing.is_empty()).then(|| missing.into_iter().map(name).collect())
}

/// Columns of a plan, by index.
type Columns = BTreeSet<usize>;

/// Sets of columns that are unique: no two rows of the plan have the same values in them. Only sets that are
/// certain to be unique are returned.
fn unique(plan: &LogicalPlan) -> Vec<Columns> {
    let schema = plan.schema();
    let place = |expr: &Expr, of: &LogicalPlan| of.schema().maybe_index_of_column(expr.try_as_col()?);
    match plan {
        LogicalPlan::TableScan(scan) => {
            let key = match scan.table_name.table() {
                // if some documents are held out, `documents` is a view of `all_documents`
                "documents" | "all_documents" => "doc_id",
                "domains" | "shares" => "domain",
                _ => return vec![],
            };
            schema.index_of_column_by_name(None, key).map(|i| Columns::from([i])).into_iter().collect()
        }
        LogicalPlan::Filter(_) | LogicalPlan::Sort(_) | LogicalPlan::Limit(_) | LogicalPlan::SubqueryAlias(_)
        // a window appends its columns to those of its input
        | LogicalPlan::Window(_) => plan.inputs().first().map(|input| unique(input)).unwrap_or_default(),
        LogicalPlan::Projection(projection) => {
            let from: Vec<Option<usize>> =
                projection.expr.iter().map(|expr| place(&expr.clone().unalias_nested().data, &projection.input)).collect();
            let kept = |key: Columns| {
                key.into_iter().map(|column| from.iter().position(|from| *from == Some(column))).collect()
            };
            unique(&projection.input).into_iter().filter_map(kept).collect()
        }
        LogicalPlan::Aggregate(aggregate) => {
            // one row per group; without grouping sets the grouping columns come first
            let plain = !aggregate.group_expr.iter().any(|expr| matches!(expr, Expr::GroupingSet(_)));
            plain.then(|| (0..aggregate.group_expr.len()).collect()).into_iter().collect()
        }
        LogicalPlan::Unnest(unnest) => unnested(unnest),
        LogicalPlan::Distinct(Distinct::All(input)) => unique(input),
        LogicalPlan::Join(join) => {
            let (left, right) = (unique(&join.left), unique(&join.right));
            let width = join.left.schema().fields().len();
            let shifted = |key: &Columns| key.iter().map(|column| column + width).collect::<Columns>();
            match join.join_type {
                JoinType::LeftSemi | JoinType::LeftAnti => return left,
                JoinType::RightSemi | JoinType::RightAnti => return right,
                JoinType::Inner | JoinType::Left | JoinType::Right | JoinType::Full => {}
                _ => return vec![],
            }
            // before optimization, equalities may still be in the filter
            let equalities = join.filter.iter().flat_map(split_conjunction).filter_map(|expr| match expr {
                Expr::BinaryExpr(equal) if equal.op == Operator::Eq => Some((&*equal.left, &*equal.right)),
                _ => None,
            });
            let pairs = join.on.iter().map(|(l, r)| (l, r)).chain(equalities);
            let places = |l, r| Some((place(l, &join.left)?, place(r, &join.right)?));
            let on: (Columns, Columns) =
                pairs.filter_map(|(l, r)| places(l, r).or_else(|| places(r, l))).unzip();
            let mut keys = vec![];
            // a row that matches at most one row of the other side appears at most once
            let one = |keys: &[Columns], on: &Columns| keys.iter().any(|key| key.is_subset(on));
            if matches!(join.join_type, JoinType::Inner | JoinType::Left) && one(&right, &on.1) {
                keys.extend(left.iter().cloned());
            }
            if matches!(join.join_type, JoinType::Inner | JoinType::Right) && one(&left, &on.0) {
                keys.extend(right.iter().map(shifted));
            }
            for l in &left {
                keys.extend(right.iter().map(|r| l | &shifted(r)));
            }
            keys
        }
        _ => vec![],
    }
}

/// The unique columns of `unnest(range(…))`: a unique set of its input together with the number.
fn unnested(unnest: &Unnest) -> Vec<Columns> {
    let ([(list, _)], [], LogicalPlan::Projection(below)) =
        (unnest.list_type_columns.as_slice(), unnest.struct_type_columns.as_slice(), &*unnest.input)
    else {
        return vec![];
    };
    let counts = match below.expr[*list].clone().unalias_nested().data {
        Expr::ScalarFunction(call) => ["range", "generate_series"].contains(&call.func.name()),
        _ => false,
    };
    let place = |column: usize| unnest.dependency_indices.iter().position(|from| *from == column);
    let kept = |key: Columns| key.into_iter().chain([*list]).map(place).collect();
    match counts {
        true => unique(&unnest.input).into_iter().filter_map(kept).collect(),
        false => vec![],
    }
}

fn order_cure(missing: &[String]) -> String {
    // a column without an alias is named by its expression
    let is_named = |name: &String| name.chars().all(|c| c.is_alphanumeric() || c == '_');
    let columns = if missing.len() == 1 { "the column" } else { "the columns" };
    match missing.iter().all(is_named) {
        true => format!("add {} to ORDER BY", missing.join(" and ")),
        false => format!("give {columns} {} a name with AS, and add it to ORDER BY", missing.join(" and ")),
    }
}

/// Whether the frame may separate rows that tie.
fn splits_ties(frame: &WindowFrame) -> bool {
    let unbounded = |bound: &WindowFrameBound| match bound {
        WindowFrameBound::Preceding(value) | WindowFrameBound::Following(value) => value.is_null(),
        WindowFrameBound::CurrentRow => false,
    };
    frame.units == WindowFrameUnits::Rows && !(unbounded(&frame.start_bound) && unbounded(&frame.end_bound))
}

fn all_names<'n>(name: &'n str, aliases: &'n [String]) -> Vec<&'n str> {
    [name].into_iter().chain(aliases.iter().map(String::as_str)).collect()
}

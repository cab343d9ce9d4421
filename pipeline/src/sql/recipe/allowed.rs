//! The functions that recipes may call, and what to write instead of those that they may not. Every function
//! of this version of DataFusion was reviewed and is in one of these lists, which a test compares with the
//! library. A function in no list is refused.
//!
//! An allowed function returns the same result for the same arguments on every machine, at any time, and in
//! any order of rows.

/// Scalar functions that are allowed.
#[rustfmt::skip]
pub const SCALARS: &[&str] = &[
    // ours
    "exp", "length_bucket", "ln", "log2", "log10", "power", "unit_hash",
    // numbers
    "abs", "ceil", "degrees", "factorial", "floor", "gcd", "iszero", "lcm", "pi", "radians", "round", "signum", "sqrt",
    "trunc",
    // one of several values
    "coalesce", "greatest", "least", "nullif", "nvl", "nvl2",
    // texts
    "ascii", "bit_length", "btrim", "character_length", "chr", "concat", "concat_ws", "contains", "decode", "digest",
    "encode", "ends_with", "find_in_set", "initcap", "left", "levenshtein", "lower", "lpad", "ltrim", "md5",
    "octet_length", "overlay", "regexp_count", "regexp_instr", "regexp_like", "regexp_match", "regexp_replace", "repeat",
    "replace", "reverse", "right", "rpad", "rtrim", "sha224", "sha256", "sha384", "sha512", "split_part", "starts_with",
    "strpos", "substr", "substr_index", "to_hex", "translate", "upper",
    // times
    "date_bin", "date_part", "date_trunc", "from_unixtime", "make_date", "make_time", "to_char", "to_date", "to_time",
    "to_timestamp", "to_timestamp_micros", "to_timestamp_millis", "to_timestamp_nanos", "to_timestamp_seconds",
    "to_unixtime",
    // lists, structs, maps
    "array_any_value", "array_append", "array_compact", "array_concat", "array_dims", "array_distinct", "array_element",
    "array_except", "array_has", "array_has_all", "array_has_any", "array_intersect", "array_length", "array_max",
    "array_min", "array_ndims", "array_pop_back", "array_pop_front", "array_position", "array_positions",
    "array_prepend", "array_remove", "array_remove_all", "array_remove_n", "array_repeat", "array_replace",
    "array_replace_all", "array_replace_n", "array_resize", "array_reverse", "array_slice", "array_sort",
    "array_to_string", "array_union", "arrays_zip", "cardinality", "empty", "flatten", "generate_series", "get_field",
    "make_array", "map", "map_entries", "map_extract", "map_keys", "map_values", "named_struct", "range",
    "string_to_array", "struct",
    "arrow_typeof",
];

/// Scalar functions that are refused: their names, the reason, and what to write instead.
#[rustfmt::skip]
pub const REFUSED: &[(&[&str], &str, &str)] = &[
    (
        &["random", "uuid"],
        "gives something else on every run",
        "`unit_hash($seed, doc_id, start)` is a number in [0, 1) that depends on nothing but its arguments",
    ),
    (
        &["current_date", "current_time", "now"],
        "depends on when or where the recipe runs",
        "make it a parameter: declare it in the header, and give the value in the conf",
    ),
    (
        &["log"],
        "comes from the machine's math library: its last bits differ between machines",
        "write ln(x), log2(x), log10(x), or ln(x) / ln(base): those are the same everywhere",
    ),
    (
        &["cbrt"],
        "comes from the machine's math library: its last bits differ between machines",
        "write power(x, 1.0 / 3): power is the same everywhere",
    ),
    (
        &[
            "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cos", "cosh", "cot", "sin", "sinh", "tan",
            "tanh",
        ],
        "comes from the machine's math library: its last bits differ between machines",
        "power, sqrt, exp, ln, log2 and log10 are the same everywhere",
    ),
    (
        &["arrow_field", "arrow_metadata", "file_row_index", "input_file_name", "version", "with_metadata"],
        "depends on how the tables are stored or on this build, not on their rows",
        "use the columns of documents: doc_id, domain, tokens, bytes, origin",
    ),
    (
        &["isnan", "nanvl"],
        "has nothing to find: what is no number is null in a recipe",
        "write `x is null` or coalesce(x, …)",
    ),
    (
        &["arrow_cast", "arrow_try_cast", "cast_to_type", "try_cast_to_type"],
        "names the types of a library",
        "write cast(x as bigint), double, decimal(38, 0), varchar, …",
    ),
    (
        &["to_local_time"],
        "depends on where the recipe runs",
        "times are in UTC: add an interval",
    ),
    (
        &["union_extract", "union_tag"],
        "is of unions, which no table has",
        "use the columns of documents: doc_id, domain, tokens, bytes, origin",
    ),
    (
        &[
            "array_add", "array_avg", "array_distance", "array_normalize", "array_product", "array_scale",
            "array_subtract", "array_sum", "cosine_distance", "inner_product",
        ],
        "computes with lists of floats, which nothing checks",
        "give the list's values rows of their own with unnest(…), and compute with those",
    ),
    (
        &["array_any_match", "array_filter", "array_first", "array_transform"],
        "computes inside a list, where nothing checks it",
        "give the list's values rows of their own with unnest(…), and compute with those",
    ),
];

/// Aggregate functions whose result does not depend on the order of the rows.
#[rustfmt::skip]
pub const AGGREGATES: &[&str] = &[
    "bit_and", "bit_or", "bit_xor", "bool_and", "bool_or", "count", "exact_sum", "grouping", "max", "median", "min",
    "percentile_cont",
];

/// Aggregate functions that sum floats, so that their last bits depend on the order of the rows: refused.
#[rustfmt::skip]
pub const FLOAT_SUMS: &[&str] = &[
    "corr", "covar_pop", "covar_samp", "regr_avgx", "regr_avgy", "regr_count", "regr_intercept", "regr_r2", "regr_slope",
    "regr_sxx", "regr_sxy", "regr_syy", "stddev", "stddev_pop", "var", "var_pop",
];

/// The other aggregate functions. Whether they are allowed depends on their arguments; `rules` handles each
/// by name.
#[cfg(test)]
#[rustfmt::skip]
pub const OTHER_AGGREGATES: &[&str] = &[
    "any_value", "approx_distinct", "approx_median", "approx_percentile_cont", "approx_percentile_cont_with_weight",
    "array_agg", "avg", "first_value", "last_value", "nth_value", "string_agg", "sum",
];

/// Window functions that are allowed. `rules` may still require an order without ties.
#[rustfmt::skip]
pub const WINDOWS: &[&str] = &[
    "cume_dist", "dense_rank", "first_value", "lag", "last_value", "lead", "nth_value", "ntile", "percent_rank", "rank",
    "row_number",
];

/// Table functions that are allowed: they read nothing but their arguments.
pub const TABLES: &[&str] = &["unnest", "generate_series", "range"];

/// Why a scalar function is refused, and the cure; `None` if it is allowed.
pub fn refused(name: &str) -> Option<(String, String)> {
    if SCALARS.contains(&name) {
        return None;
    }
    let known = REFUSED.iter().find(|(names, ..)| names.contains(&name));
    Some(match known {
        Some((_, why, cure)) => (format!("`{name}` {why}"), (*cure).to_owned()),
        None => unknown(name),
    })
}

/// The message and the cure for a function that is in no list.
pub fn unknown(name: &str) -> (String, String) {
    (
        format!("nobody has looked yet at whether `{name}` gives the same everywhere"),
        "write it with functions that recipes have: power, round, greatest, coalesce, case …".to_owned(),
    )
}

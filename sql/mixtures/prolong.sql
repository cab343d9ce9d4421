-- ProLong's mix: most of the budget from very long documents, the rest from all others.
-- After Gao et al. 2024, "How to Train Long-Context Language Models (Effectively)", §3: 60 % long
-- and 40 % short data.
-- One row: a span of at most $max_span tokens to draw from, with its expected copies.
-- Long here means at least $long_min tokens. Each part is divided by the shares of the domains that
-- have such documents. With documents of one kind only, the whole budget comes from them.
--   $long_share  double = 0.60    share of the budget that comes from long documents
--   $long_min    bigint = 65536   a document of as many tokens is long
--   $budget      bigint           tokens to draw
--   $max_span    bigint           a longer document gives several spans
with documents as (
    select doc_id, domain, tokens from documents
),

shares as (
    select domain, share from shares
),

-- shares in units of 2^-32, so that their sums are exact
domains as (
    select
        documents.domain,
        max(shares.share) as share,
        exact_sum(tokens) filter (where tokens >= $long_min) as long_tokens,
        exact_sum(tokens) filter (where tokens < $long_min) as short_tokens
    from documents
    inner join shares on documents.domain = shares.domain
    where tokens > 0 and share > 0
    group by documents.domain
),

-- of each kind of document: the shares of all domains that have some
parts as (
    select
        domain,
        share,
        cast(long_tokens as double) as long_tokens,
        cast(short_tokens as double) as short_tokens,
        exact_sum(case when long_tokens > 0 then share end) over () as all_long,
        exact_sum(case when short_tokens > 0 then share end) over () as all_short
    from domains
),

budgets as (
    select
        *,
        $budget * case when all_short is null then 1.0 else $long_share end as long_budget,
        $budget * case when all_long is null then 1.0 else 1.0 - $long_share end as short_budget
    from parts
),

weights as (
    select
        domain,
        long_budget * share / all_long / long_tokens as long_copies,
        short_budget * share / all_short / short_tokens as short_copies
    from budgets
),

spans as (
    select
        documents.doc_id,
        documents.tokens,
        weights.long_copies,
        weights.short_copies,
        unnest(range(0, documents.tokens, $max_span)) as start
    from weights
    inner join documents on weights.domain = documents.domain
),

prolong as (
    select
        doc_id,
        start,
        least(start + $max_span, tokens) as stop,
        case when tokens >= $long_min then long_copies else short_copies end as copies,
        case when tokens >= $long_min then 'long' else 'short' end as stratum
    from spans
)

select doc_id, start, stop, copies, stratum from prolong

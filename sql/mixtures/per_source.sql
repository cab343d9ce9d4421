-- Per-source length upsampling, the paper's recommendation.
-- Fu et al. 2024, §3, "Per-source Upsampling".
-- One row: a span of at most $max_span tokens to draw from, with its expected copies.
-- Each domain keeps its share of the budget. Inside it, tokens of long documents are raised to
-- $long_share; where they have more already, they keep it. Where $max_copies of the long (short)
-- documents are not enough, short (long) ones fill the domain's budget.
--   $long_share   double = 0.70   share of each domain's tokens that come from long documents
--   $short_keep   double = null   instead: weight of short tokens, long ones' being 1; authors: 0.1
--   $budget       bigint          tokens to draw
--   $long_tokens  bigint          a document of more tokens is long
--   $max_copies   bigint          how often a span may be drawn
--   $max_span     bigint          a longer document gives several spans
with documents as (
    select doc_id, domain, tokens from documents
),

domains as (
    select
        domain,
        cast(tokens as double) as tokens,
        cast(long_tokens as double) as long_tokens,
        cast(tokens - long_tokens as double) as short_tokens
    from domains
    where tokens > 0
),

shares as (
    select domain, share from shares
),

wanted as (
    select
        domains.domain,
        domains.tokens,
        domains.long_tokens,
        domains.short_tokens,
        shares.share * $budget as budget,
        shares.share * $budget * case
            when $short_keep is null then greatest($long_share, long_tokens / tokens)
            else coalesce(long_tokens / nullif(long_tokens + $short_keep * short_tokens, 0), 0)
        end as long_budget
    from domains
    inner join shares on domains.domain = shares.domain
),

-- what the long documents can give, and at least what the short ones cannot
supplied as (
    select
        *,
        greatest(
            least(long_budget, $max_copies * long_tokens),
            budget - $max_copies * short_tokens
        ) as long_supply
    from wanted
),

-- a domain with less than its budget is asked for all of it alike, so that the run can say what
-- falls short
weights as (
    select
        domain,
        case
            when budget > $max_copies * tokens then budget / tokens
            else long_supply / nullif(long_tokens, 0)
        end as long_copies,
        case
            when budget > $max_copies * tokens then budget / tokens
            else (budget - long_supply) / nullif(short_tokens, 0)
        end as short_copies
    from supplied
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

per_source as (
    select
        doc_id,
        start,
        least(start + $max_span, tokens) as stop,
        case when tokens > $long_tokens then long_copies else short_copies end as copies,
        case when tokens > $long_tokens then 'long' else 'short' end as stratum
    from spans
)

select doc_id, start, stop, copies, stratum from per_source

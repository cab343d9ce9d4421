-- Global length upsampling: long documents up, whatever their domain.
-- Fu et al. 2024, §3, "Global Upsampling".
-- One row: a span of at most $max_span tokens to draw from, with its expected copies.
-- Weights are those of the original mixture, times one number for long documents and one for short
-- ones, so that $long_share of all tokens are in long documents, unless they are already. Domains
-- with many long documents gain: the mixture shifts a little. No span's weight is raised above
-- $max_copies.
--   $long_share   double = 0.70   share of all tokens that come from long documents
--   $budget       bigint          tokens to draw
--   $long_tokens  bigint          a document of more tokens is long
--   $max_copies   bigint          how often a span may be drawn
--   $max_span     bigint          a longer document gives several spans
with documents as (
    select doc_id, domain, tokens from documents
),

domains as (
    select domain, tokens, long_tokens from domains where tokens > 0
),

shares as (
    select domain, share from shares
),

original as (
    select
        domains.domain,
        domains.tokens,
        domains.long_tokens,
        shares.share * $budget / domains.tokens as copies
    from domains
    inner join shares on domains.domain = shares.domain
),

corpus as (
    select
        exact_sum(copies * long_tokens) as long_tokens,
        exact_sum(copies * (tokens - long_tokens)) as short_tokens,
        max(case when long_tokens > 0 then copies end) as most_copies
    from original
),

-- how much long documents are raised: never lowered, and not beyond $max_copies
raised as (
    select
        *,
        greatest(
            1.0,
            least(
                $long_share * (long_tokens + short_tokens) / nullif(long_tokens, 0),
                $max_copies / nullif(most_copies, 0)
            )
        ) as long_factor
    from corpus
),

factors as (
    select
        long_factor,
        coalesce(
            1.0 - (long_factor - 1.0) * long_tokens / nullif(short_tokens, 0), 1.0
        ) as short_factor
    from raised
),

weights as (
    select
        original.domain,
        original.copies * factors.long_factor as long_copies,
        original.copies * factors.short_factor as short_copies
    from original
    cross join factors
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

global as (
    select
        doc_id,
        start,
        least(start + $max_span, tokens) as stop,
        case when tokens > $long_tokens then long_copies else short_copies end as copies,
        case when tokens > $long_tokens then 'long' else 'short' end as stratum
    from spans
)

select doc_id, start, stop, copies, stratum from global

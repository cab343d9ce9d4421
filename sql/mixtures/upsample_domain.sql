-- More of one domain: its weight is set to 0.60, then all are normalised.
-- Fu et al. 2024, §3, "Upsample Arxiv / Book / Github".
-- One row: a span of at most $max_span tokens to draw from, with its expected copies.
-- The mixture of domains changes, and lengths only as far as domains differ: inside a domain all
-- tokens are alike.
--   $domain    domain = required    the domain, as documents name it
--   $weight    double = 0.60        its weight; the other domains' weights are their shares
--   $budget    bigint               tokens to draw
--   $max_span  bigint               a longer document gives several spans
with documents as (
    select doc_id, domain, tokens from documents
),

domains as (
    select domain, tokens from domains
),

shares as (
    select domain, share from shares
),

weighted as (
    select domain, share as weight from shares where domain <> $domain
    union all
    select $domain as domain, $weight as weight
),

-- in units of 2^-32, so that the sum is exact
total as (
    select exact_sum(weight) as weight from weighted
),

weights as (
    select
        domains.domain,
        weighted.weight / total.weight * $budget / domains.tokens as copies
    from domains
    inner join weighted on domains.domain = weighted.domain
    cross join total
    where domains.tokens > 0
),

spans as (
    select
        documents.doc_id,
        documents.tokens,
        weights.copies,
        unnest(range(0, documents.tokens, $max_span)) as start
    from weights
    inner join documents on weights.domain = documents.domain
),

upsample_domain as (
    select doc_id, start, least(start + $max_span, tokens) as stop, copies
    from spans
)

select doc_id, start, stop, copies from upsample_domain

-- The original mixture: documents whole, up to 128K (Fu et al. 2024, §3, "Cut at 128K").
-- One row: a span of at most $max_span tokens to draw from, with its expected copies.
-- Each domain gets its share of the budget; inside a domain all tokens are alike.
--   $budget    bigint   tokens to draw
--   $max_span  bigint   a longer document gives several spans
with documents as (
    select doc_id, domain, tokens from documents
),

domains as (
    select domain, tokens from domains
),

shares as (
    select domain, share from shares
),

weights as (
    select domains.domain, shares.share * $budget / domains.tokens as copies
    from domains
    inner join shares on domains.domain = shares.domain
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

cut_128k as (
    select doc_id, start, least(start + $max_span, tokens) as stop, copies
    from spans
)

select doc_id, start, stop, copies from cut_128k

-- Ordinary pretraining: documents cut into pieces of 4K (Fu et al. 2024, §3, "Cut at 4K").
-- One row: a piece of at most $piece_tokens tokens to draw from, with its expected copies.
-- Each domain gets its share of the budget; inside a domain all tokens are alike.
--   $piece_tokens  bigint = 4096   length of a piece; the last one of a document may be shorter
--   $budget        bigint          tokens to draw
--   $max_span      bigint          no piece is longer
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
    select
        domains.domain,
        shares.share * $budget / domains.tokens as copies,
        least($piece_tokens, $max_span) as piece_tokens
    from domains
    inner join shares on domains.domain = shares.domain
    where domains.tokens > 0
),

pieces as (
    select
        documents.doc_id,
        documents.tokens,
        weights.copies,
        weights.piece_tokens,
        unnest(range(0, documents.tokens, weights.piece_tokens)) as start
    from weights
    inner join documents on weights.domain = documents.domain
),

cut_4k as (
    select doc_id, start, least(start + piece_tokens, tokens) as stop, copies
    from pieces
)

select doc_id, start, stop, copies from cut_4k

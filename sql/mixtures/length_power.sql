-- Weights as a power of length: the longer a document, the likelier each of its tokens.
-- Not in Fu et al. 2024; a smooth form of its per-source upsampling (§3), without a border between
-- long and short.
-- One row: a span of at most $max_span tokens to draw from, with its expected copies.
-- Each domain keeps its share of the budget. Inside it, a token's weight is its document's length
-- to the power $exponent: 0 is the original mixture, 1 draws a token of an 8K document twice as
-- often as one of a 4K document.
--   $exponent     double = 0.5   from -2 to 2
--   $budget       bigint         tokens to draw
--   $long_tokens  bigint         the unit of length; the mixture does not depend on it
--   $max_span     bigint         a longer document gives several spans
with documents as (
    select doc_id, domain, tokens from documents where tokens > 0
),

shares as (
    select domain, share from shares
),

-- an integer, in units of 2^-32: sums are exact, and every use of a weight is the same number
weighted as (
    select
        doc_id,
        domain,
        tokens,
        power(cast(tokens as double) / $long_tokens, $exponent) as weight
    from documents
),

totals as (
    select domain, exact_sum(weight * tokens) as weight
    from weighted
    group by domain
),

weights as (
    select
        totals.domain,
        shares.share * $budget / totals.weight as copies_of_weight_one
    from totals
    inner join shares on totals.domain = shares.domain
),

spans as (
    select
        weighted.doc_id,
        weighted.tokens,
        weighted.weight * weights.copies_of_weight_one as copies,
        unnest(range(0, weighted.tokens, $max_span)) as start
    from weights
    inner join weighted on weights.domain = weighted.domain
),

length_power as (
    select doc_id, start, least(start + $max_span, tokens) as stop, copies
    from spans
)

select doc_id, start, stop, copies from length_power

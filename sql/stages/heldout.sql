-- heldout: the documents that no recipe sees, for evaluation.
-- A text is held out in every domain that has it or in none, so that no domain trains on what
-- another holds out.
-- One row: a document held out, as a span that is drawn once, whole.
--   $seed       bigint   the run's seed
--   $place      bigint   texts are candidates whose hash of 63 bits is below: their share
--   $millionths bigint   the share again: of no domain's tokens is more held out
with catalog as (
    select doc_id, domain, tokens, text_id from catalog
),

limits as (
    select domain, sum(cast(tokens as decimal(38, 0))) * $millionths as millionths
    from catalog
    group by domain
),

candidates as (
    select
        catalog.doc_id,
        catalog.domain,
        catalog.tokens,
        catalog.text_id,
        cast(catalog.tokens as decimal(38, 0)) * 1000000 as millionths,
        limits.millionths as most,
        heldout_hash($seed, catalog.text_id) as place
    from catalog
    inner join limits on catalog.domain = limits.domain
    where heldout_hash($seed, catalog.text_id) < $place
),

-- of a domain's candidates in their order, each that is not larger than the whole limit takes its
-- room: one that is must not keep the smaller ones from being held out
summed as (
    select
        *,
        sum(case when millionths <= most then millionths else 0 end) over (
            partition by domain order by place, text_id
            rows between unbounded preceding and current row
        ) as millionths_so_far
    from candidates
),

texts as (
    select text_id
    from summed
    group by text_id
    having bool_and(millionths <= most and millionths_so_far <= most)
)

select
    summed.doc_id,
    cast(0 as bigint) as start,
    summed.tokens as stop,
    cast(0 as int) as copy,
    '' as stratum,
    summed.domain,
    summed.tokens
from summed
inner join texts on summed.text_id = texts.text_id
order by summed.doc_id

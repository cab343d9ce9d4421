-- heldout: the documents that no recipe sees, for evaluation.
-- One row: a document held out, as a span that is drawn once, whole.
--   $seed       bigint   the run's seed
--   $place      bigint   a document is a candidate where its hash, 63 bits, is below: the share of documents
--   $millionths bigint   the share again: of no domain's tokens is more held out
with catalog as (
    select doc_id, domain, tokens from catalog
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
        cast(catalog.tokens as decimal(38, 0)) * 1000000 as millionths,
        limits.millionths as most,
        heldout_hash($seed, catalog.doc_id) as place
    from catalog
    inner join limits on catalog.domain = limits.domain
    where heldout_hash($seed, catalog.doc_id) < $place
),

-- one document that is larger than the whole limit must not keep the smaller ones from being held out
fitting as (
    select * from candidates where millionths <= most
),

summed as (
    select
        doc_id,
        domain,
        tokens,
        most,
        sum(millionths) over (
            partition by domain order by place, doc_id
            rows between unbounded preceding and current row
        ) as millionths_so_far
    from fitting
)

select
    doc_id,
    cast(0 as bigint) as start,
    tokens as stop,
    cast(0 as int) as copy,
    '' as stratum,
    domain,
    tokens
from summed
where millionths_so_far <= most
order by doc_id

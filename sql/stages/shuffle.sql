-- shuffle: the order of training. Every drawn copy gets a place by a hash of its own, another one
-- than the draw's, so that domains and lengths are mixed to the end (paper §3: "concatenated, then
-- packed").
-- One row: a copy of a span, in the order of training.
--   $seed  bigint   the run's seed
with drawn as (
    select * from drawn
),

catalog as (
    select doc_id, part from catalog
),

placed as (
    select
        place_hash($seed, drawn.doc_id, drawn.start, drawn.copy) as place,
        drawn.doc_id,
        drawn.start,
        drawn.stop,
        drawn.copy,
        drawn.domain,
        drawn.tokens,
        catalog.part
    from drawn
    inner join catalog on drawn.doc_id = catalog.doc_id
)

select doc_id, start, stop, domain, tokens, part
from placed
order by place, doc_id, start, copy

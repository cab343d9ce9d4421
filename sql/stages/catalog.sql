-- catalog: exact duplicates fall together, whatever file they came from.
-- It is run for ranges of doc_id, each by itself: a row depends on documents of its own id alone.
-- One row: a distinct document. `part` is one of the places that hold its ids; any would do.
with documents as (
    select * from documents
),

distinct_documents as (
    select
        doc_id,
        min(domain) as domain,
        min(tokens) as tokens,
        min(bytes) as bytes,
        min(origin) as origin,
        min(text_id) as text_id,
        min(part) as part
    from documents
    group by doc_id
)

select doc_id, domain, tokens, bytes, origin, text_id, part
from distinct_documents
order by doc_id

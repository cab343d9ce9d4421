-- One row: a domain whose numbers are not those of its documents.
with documents as (
    select
        domain,
        count(*) as documents,
        sum(cast(tokens as decimal(38, 0))) as tokens
    from documents
    group by domain
),

domains as (
    select * from domains
)

select
    documents.domain,
    documents.documents,
    documents.tokens
from documents
left join domains on documents.domain = domains.domain
where
    domains.domain is null
    or documents.documents <> domains.documents
    or documents.tokens <> domains.tokens

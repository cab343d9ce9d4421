-- shares: the corpus's own mixture, the target of a recipe unless the conf names another.
-- One row: a domain and its share of all tokens, held-out documents included.
with catalog as (
    select domain, tokens from catalog
),

domains as (
    select domain, sum(cast(tokens as decimal(38, 0))) as tokens
    from catalog
    group by domain
),

corpus as (
    select sum(tokens) as tokens from domains
),

shares as (
    select
        domains.domain,
        cast(domains.tokens as double) / cast(corpus.tokens as double) as share
    from domains
    cross join corpus
    where corpus.tokens > 0
)

select domain, share from shares order by domain

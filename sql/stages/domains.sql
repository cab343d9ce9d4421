-- domains: what each domain's documents are like, in exact integers.
-- One row: a domain, over the documents a recipe may draw from (held-out documents are not among them).
--   $long_tokens  bigint   a document of more tokens is long
-- Lists by length have a number for each bucket of the paper's Figure 2: up to 1K, 2K, … 128K tokens, and above.
with documents as (
    select domain, tokens from documents
),

-- one row a domain and length: few rows whatever the corpus, for lengths repeat
lengths as (
    select
        domain,
        tokens,
        cast(count(*) as decimal(38, 0)) as documents,
        cast(count(*) as decimal(38, 0)) * tokens as sum_tokens
    from documents
    group by domain, tokens
),

totals as (
    select
        domain,
        sum(documents) as documents,
        sum(sum_tokens) as tokens,
        coalesce(sum(documents) filter (where tokens > $long_tokens), 0) as long_documents,
        coalesce(sum(sum_tokens) filter (where tokens > $long_tokens), 0) as long_tokens,
        max(tokens) as longest,
        make_array(
            coalesce(sum(documents) filter (where tokens < 1024), 0),
            coalesce(sum(documents) filter (where tokens >= 1024 and tokens < 2048), 0),
            coalesce(sum(documents) filter (where tokens >= 2048 and tokens < 4096), 0),
            coalesce(sum(documents) filter (where tokens >= 4096 and tokens < 8192), 0),
            coalesce(sum(documents) filter (where tokens >= 8192 and tokens < 16384), 0),
            coalesce(sum(documents) filter (where tokens >= 16384 and tokens < 32768), 0),
            coalesce(sum(documents) filter (where tokens >= 32768 and tokens < 65536), 0),
            coalesce(sum(documents) filter (where tokens >= 65536 and tokens < 131072), 0),
            coalesce(sum(documents) filter (where tokens >= 131072), 0)
        ) as documents_by_length,
        make_array(
            coalesce(sum(sum_tokens) filter (where tokens < 1024), 0),
            coalesce(sum(sum_tokens) filter (where tokens >= 1024 and tokens < 2048), 0),
            coalesce(sum(sum_tokens) filter (where tokens >= 2048 and tokens < 4096), 0),
            coalesce(sum(sum_tokens) filter (where tokens >= 4096 and tokens < 8192), 0),
            coalesce(sum(sum_tokens) filter (where tokens >= 8192 and tokens < 16384), 0),
            coalesce(sum(sum_tokens) filter (where tokens >= 16384 and tokens < 32768), 0),
            coalesce(sum(sum_tokens) filter (where tokens >= 32768 and tokens < 65536), 0),
            coalesce(sum(sum_tokens) filter (where tokens >= 65536 and tokens < 131072), 0),
            coalesce(sum(sum_tokens) filter (where tokens >= 131072), 0)
        ) as tokens_by_length
    from lengths
    group by domain
),

all_domains as (
    select sum(tokens) as tokens from totals
),

ranked as (
    select
        domain,
        tokens,
        sum(documents) over (
            partition by domain order by tokens
            rows between unbounded preceding and current row
        ) as documents_up_to
    from lengths
),

-- the p-quantile is the smallest length that at least p of the documents do not exceed
quantiles as (
    select
        ranked.domain,
        min(ranked.tokens) filter (where documents_up_to * 100 >= totals.documents * 25) as p25,
        min(ranked.tokens) filter (where documents_up_to * 100 >= totals.documents * 50) as p50,
        min(ranked.tokens) filter (where documents_up_to * 100 >= totals.documents * 75) as p75,
        min(ranked.tokens) filter (where documents_up_to * 100 >= totals.documents * 90) as p90,
        min(ranked.tokens) filter (where documents_up_to * 100 >= totals.documents * 99) as p99
    from ranked
    inner join totals on ranked.domain = totals.domain
    group by ranked.domain
),

described as (
    select
        totals.domain,
        totals.documents,
        totals.tokens,
        cast(totals.tokens as double) / greatest(cast(all_domains.tokens as double), 1.0) as share,
        totals.long_documents,
        totals.long_tokens,
        quantiles.p25,
        quantiles.p50,
        quantiles.p75,
        quantiles.p90,
        quantiles.p99,
        totals.longest,
        totals.documents_by_length,
        totals.tokens_by_length
    from totals
    inner join quantiles on totals.domain = quantiles.domain
    cross join all_domains
)

select * from described order by domain

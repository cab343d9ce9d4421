-- domains: what each domain's documents are like, in exact integers.
-- One row: a domain, over the documents a recipe may draw from (none of them is held out).
--   $long_tokens  bigint   a document of more tokens is long
-- Lists by length have a number for each bucket of the paper's Figure 2: up to 1K, 2K, … 128K
-- tokens, and above.
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

-- all of it from here on comes of one reading of the documents: a step that two others read would
-- be computed twice
ranked as (
    select
        *,
        length_bucket(tokens) as bucket,
        sum(documents) over (partition by domain) as domain_documents,
        sum(documents) over (
            partition by domain order by tokens
            rows between unbounded preceding and current row
        ) as documents_up_to
    from lengths
),

-- the p-quantile is the smallest length that at least p of the documents do not exceed
totals as (
    select
        domain,
        sum(documents) as documents,
        sum(sum_tokens) as tokens,
        coalesce(sum(documents) filter (where tokens > $long_tokens), 0) as long_documents,
        coalesce(sum(sum_tokens) filter (where tokens > $long_tokens), 0) as long_tokens,
        min(tokens) filter (where documents_up_to * 100 >= domain_documents * 25) as p25,
        min(tokens) filter (where documents_up_to * 100 >= domain_documents * 50) as p50,
        min(tokens) filter (where documents_up_to * 100 >= domain_documents * 75) as p75,
        min(tokens) filter (where documents_up_to * 100 >= domain_documents * 90) as p90,
        min(tokens) filter (where documents_up_to * 100 >= domain_documents * 99) as p99,
        max(tokens) as longest,
        make_array(
            coalesce(sum(documents) filter (where bucket = 0), 0),
            coalesce(sum(documents) filter (where bucket = 1), 0),
            coalesce(sum(documents) filter (where bucket = 2), 0),
            coalesce(sum(documents) filter (where bucket = 3), 0),
            coalesce(sum(documents) filter (where bucket = 4), 0),
            coalesce(sum(documents) filter (where bucket = 5), 0),
            coalesce(sum(documents) filter (where bucket = 6), 0),
            coalesce(sum(documents) filter (where bucket = 7), 0),
            coalesce(sum(documents) filter (where bucket = 8), 0)
        ) as documents_by_length,
        make_array(
            coalesce(sum(sum_tokens) filter (where bucket = 0), 0),
            coalesce(sum(sum_tokens) filter (where bucket = 1), 0),
            coalesce(sum(sum_tokens) filter (where bucket = 2), 0),
            coalesce(sum(sum_tokens) filter (where bucket = 3), 0),
            coalesce(sum(sum_tokens) filter (where bucket = 4), 0),
            coalesce(sum(sum_tokens) filter (where bucket = 5), 0),
            coalesce(sum(sum_tokens) filter (where bucket = 6), 0),
            coalesce(sum(sum_tokens) filter (where bucket = 7), 0),
            coalesce(sum(sum_tokens) filter (where bucket = 8), 0)
        ) as tokens_by_length
    from ranked
    group by domain
),

described as (
    select
        domain,
        documents,
        tokens,
        cast(tokens as double) / greatest(cast(sum(tokens) over () as double), 1.0) as share,
        long_documents,
        long_tokens,
        p25,
        p50,
        p75,
        p90,
        p99,
        longest,
        documents_by_length,
        tokens_by_length
    from totals
)

select * from described order by domain

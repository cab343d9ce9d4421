-- One row: a domain of the packed dataset, with its share and the share of its ids in long documents, in %.
with segments as (select unnest(source) as segment from packed),
ids as (select segment['source'] as domain, segment['doc_id'] as doc_id, cast(segment['end'] - segment['start'] as bigint) as ids from segments),
sums as (select ids.domain, sum(ids) as ids, sum(ids) filter (where c.tokens > 4096) as long_ids from ids join catalog c on encode(c.doc_id, 'hex') = ids.doc_id group by ids.domain)
select sums.domain, sums.ids, round(100.0 * sums.ids / (select sum(ids) from sums), 2) as share, round(100.0 * target.share, 2) as target, round(100.0 * coalesce(long_ids, 0) / sums.ids, 2) as long, round(100.0 * d.long_tokens / d.tokens, 2) as long_before from sums join domains d on d.domain = sums.domain join shares target on target.domain = sums.domain order by 1

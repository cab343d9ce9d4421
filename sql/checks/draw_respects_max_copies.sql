-- One row: a span that was drawn more often than $max_copies.
--   $max_copies  bigint   the most copies of a span
select doc_id, start, count(*) as copies
from drawn
group by doc_id, start
having count(*) > $max_copies

-- One row: a span that is not inside its document.
select doc_id, start, stop, tokens
from mixture
where start < 0 or start >= stop or stop > tokens

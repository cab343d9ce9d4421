-- One row: a document that is in the catalog more than once.
select doc_id, count(*) as times
from catalog
group by doc_id
having count(*) > 1

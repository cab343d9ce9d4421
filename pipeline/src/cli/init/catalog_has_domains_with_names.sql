-- One row: a document whose domain is nothing but white space.
-- A check of this project's own, to begin with: it runs after the catalog is made, and a row of it
-- stops the run.
select doc_id, domain
from catalog
where trim(domain) = ''

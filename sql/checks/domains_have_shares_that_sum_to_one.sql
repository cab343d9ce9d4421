-- One row: the sum of the target shares in billionths, where it is not a billion.
with shares as (
    select sum(cast(round(share * 1000000000) as decimal(38, 0))) as billionths from shares
)

select billionths
from shares
where billionths not between 999999900 and 1000000100

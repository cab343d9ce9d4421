-- One row: the sum of the target shares in units of 10^-18, where it is not one.
-- Each share is off by its rounding at most, so the number of domains bounds the error.
with shares as (
    select
        sum(cast(round(share * 1000000000000000000) as decimal(38, 0))) as sum_of_shares,
        count(*) as domains
    from shares
)

select sum_of_shares, domains
from shares
where
    sum_of_shares not between 1000000000000000000 - 1000 - domains
    and 1000000000000000000 + 1000 + domains

-- The texts of a table's fields in the row index, nothing in place of each that is not there.
-- KEYS: those that every operation has, then the table's
-- ARGV: new epoch, fields…
load_state()
local key = KEYS[#KEYS]
if redis.call('HEXISTS', INDEX, key) == 0 then return {} end
return redis.call('HMGET', key, unpack(ARGV, 2))

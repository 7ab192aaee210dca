-- The texts of a table's fields in the row index, nothing in place of each that is not there. If they are larger than
-- they may be: their size instead.
-- KEYS: those that every operation has, then the table's
-- ARGV: new epoch, bytes, fields…
load_state()
local key, size = KEYS[#KEYS], 0
if redis.call('HEXISTS', INDEX, key) == 0 then return {} end
local texts = redis.call('HMGET', key, unpack(ARGV, 3))
for _, found in ipairs(texts) do size = size + #(found or '') end
return size > tonumber(ARGV[2]) and size or texts

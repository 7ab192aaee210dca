-- The fields of a table in the row index; nothing if there are more than so many beside the note. If their names are
-- larger than they may be: their size instead.
-- KEYS: those that every operation has, then the table's
-- ARGV: new epoch, bytes, most fields
load_state()
local key, most, size = KEYS[#KEYS], tonumber(ARGV[3]), 0
if redis.call('HEXISTS', INDEX, key) == 0 then return {} end
if redis.call('HLEN', key) - redis.call('HEXISTS', key, '') > most then return false end
local names = redis.call('HKEYS', key)
for _, name in ipairs(names) do size = size + #name end
return size > tonumber(ARGV[2]) and size or names

-- The fields of a table in the row index; nothing if there are more than so many beside the note.
-- KEYS: those that every operation has, then the table's
-- ARGV: new epoch, most fields
load_state()
local key, most = KEYS[#KEYS], tonumber(ARGV[2])
if redis.call('HEXISTS', INDEX, key) == 0 then return {} end
if redis.call('HLEN', key) - redis.call('HEXISTS', key, '') > most then return false end
return redis.call('HKEYS', key)

-- The key of a ticket, or nothing. What the hash holds of a ticket: 'seconds until when it may be used first, key' and,
-- once a client has it that may come back, that client.
-- ARGV: new epoch, ticket, seconds that an untouched namespace is kept, client or '', '1' if it is resuming
local kept = redis.call('HGET', TICKETS, ARGV[2])
if not kept then return false end
local now = redis.call('TIME')
local fresh_until, key, client = kept:match('^(%d+) (%S+) ?(%S*)$')
if client == '' then
  if tonumber(now[1]) > tonumber(fresh_until) then return false end
elseif ARGV[5] ~= '1' or client ~= ARGV[4] then
  return false
end
if ARGV[4] == '' then
  redis.call('HDEL', TICKETS, ARGV[2])
  redis.call('ZREM', TOUCHED, ARGV[2])
else
  redis.call('HSET', TICKETS, ARGV[2], fresh_until .. ' ' .. key .. ' ' .. ARGV[4])
  touch_ticket(now)
end
return key

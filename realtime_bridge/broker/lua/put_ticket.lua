-- Keep a ticket that has just been issued; of too many, those touched longest ago are forgotten.
-- ARGV: new epoch, ticket, seconds that an untouched namespace is kept, key, seconds until its first use, most tickets
local now = redis.call('TIME')
redis.call('HSET', TICKETS, ARGV[2], text(now[1] + ARGV[5]) .. ' ' .. ARGV[4])
touch_ticket(now)
local over = redis.call('ZCARD', TOUCHED) - ARGV[6]
if over > 0 then
  for i, word in ipairs(redis.call('ZPOPMIN', TOUCHED, over)) do
    if i % 2 == 1 then redis.call('HDEL', TICKETS, word) end -- every other word is a score
  end
end

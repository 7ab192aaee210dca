-- Remember what users see: for each sight the number since which nothing else has been in use. Nothing if the numbers are
-- not those of today's epoch.
-- A field holds the digests of one user and table, that told of longest ago first: 'digest since last told', each with a
-- ';' behind it. `told` is 0 where nobody has that digest any more. A digest is 'policy.token.rest': those of two tokens
-- are rivals, which may be in use at the same time; of others the one told of later has taken the other's place, and what
-- comes back is news.
-- ARGV: new epoch, seconds kept, most fields, seconds in use, most digests, epoch of the numbers,
--       then of each sight: field, digest, number, changed, least, digest before
local MOST_FORGOTTEN = 1000
if load_state().epoch ~= ARGV[6] then return false end
local now = tonumber(redis.call('TIME')[1])
local kept, most_fields, in_use, most_digests = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])

local function forget(fields)
  if #fields > 0 then
    redis.call('HDEL', SIGHTS, unpack(fields))
    redis.call('ZREM', TOLD, unpack(fields))
  end
end
forget(redis.call('ZRANGEBYSCORE', TOLD, '-inf', '(' .. now - kept, 'LIMIT', 0, MOST_FORGOTTEN))
local over = math.min(redis.call('ZCARD', TOLD) - most_fields, MOST_FORGOTTEN)
if over > 0 then forget(redis.call('ZRANGE', TOLD, 0, over - 1)) end

local function parts(digest)
  local policy, token = string.match(digest, '^([^.]*)%.([^.]*)%.')
  return policy or '', token or digest
end

local function recall(field, digest, number, changed, least, before)
  local others, own, is_news = {}, nil, false
  local policy, token = parts(digest)
  for d, since, last, told in string.gmatch(redis.call('HGET', SIGHTS, field) or '', '(%S+) (%d+) (%d+) (%d+);') do
    local seen = {d = d, since = tonumber(since), last = tonumber(last), told = tonumber(told)}
    local its_policy, its_token = parts(d)
    seen.is_rival = its_policy == policy and its_token ~= token
    if d == digest then own = seen else others[#others + 1] = seen end
    is_news = own ~= nil and seen ~= own and (is_news or not seen.is_rival)
  end
  local since = own and not is_news and own.since or #others > 0 and changed or number
  for _, other in ipairs(others) do
    if other.d == before then other.last, other.told = changed - 1, 0 end
    local is_in_use = other.is_rival and now - other.told < in_use
    since = math.max(since, (is_in_use and number or other.last) + 1)
  end
  since = math.max(since, least)
  others[#others + 1] = {d = digest, since = since, last = number, told = now}
  local words = {}
  for i = math.max(1, #others - most_digests + 1), #others do
    local seen = others[i]
    words[#words + 1] = seen.d .. ' ' .. text(seen.since) .. ' ' .. text(seen.last) .. ' ' .. text(seen.told) .. ';'
  end
  redis.call('HSET', SIGHTS, field, table.concat(words))
  redis.call('ZADD', TOLD, now, field)
  return since
end

local answer = {}
for i = 7, #ARGV, 6 do
  answer[#answer + 1] =
    recall(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4]), ARGV[i + 5])
end
return answer

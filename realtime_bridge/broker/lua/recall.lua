-- Remember what users see: for each sight the number since which nothing else can have been in use. Nothing if the numbers
-- are not those of today's epoch.
-- A field holds the digests of one user and table, that told of longest ago first: 'digest since told', each with a ';'
-- behind it. A digest is 'rights.alone.rest': see `Sight`.
-- ARGV: new epoch, seconds kept, most fields, seconds in use, most digests, epoch of the numbers,
--       then of each sight: field, digest, changed or '', least, digest before, number
local MOST_FORGOTTEN = 1000
local state = load_state()
if state.epoch ~= ARGV[6] then return false end
local following = state.number + 1
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
  return string.match(digest, '^([^.]*)%.?([^.]*)')
end

local function recall(field, digest, changed, least, before, number)
  local others, own, is_news, has_followed, told_last = {}, nil, true, false, -in_use
  local rights, alone = parts(digest)
  local known = redis.call('HGET', SIGHTS, field)
  for d, since, told in string.gmatch(known or '', '(%S+) (%d+) (%d+);') do
    local its_rights, its_alone = parts(d)
    local seen = {d = d, since = tonumber(since), told = math.min(tonumber(told), now)} -- a clock can be set back
    if d == digest then
      own, is_news = seen, false
    elseif d == before then
      has_followed = true
    else
      others[#others + 1] = seen
      if its_rights == rights and its_alone ~= alone then
        told_last = math.max(told_last, seen.told)
      else
        is_news = true
      end
    end
  end
  local since = own and own.since or 0
  if not known then
    since = number
  elseif told_last + in_use > (own and own.told or now) then
    since = following
  elseif is_news or has_followed then
    since = math.max(since, changed or following)
  end
  since = math.min(math.max(since, least), following)
  others[#others + 1] = {d = digest, since = since, told = now}
  local words = {}
  for i = math.max(1, #others - most_digests + 1), #others do
    local seen = others[i]
    words[#words + 1] = seen.d .. ' ' .. text(seen.since) .. ' ' .. text(seen.told) .. ';'
  end
  redis.call('HSET', SIGHTS, field, table.concat(words))
  redis.call('ZADD', TOLD, now, field)
  return since
end

local answer = {}
for i = 7, #ARGV, 6 do
  answer[#answer + 1] =
    recall(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), ARGV[i + 4], tonumber(ARGV[i + 5]))
end
return answer

-- Append bodies as the next entries, trim, and notify. Answers a head with the status 'ok', or with the reason why
-- nothing was appended: 'lease', 'epoch', 'fork', 'lost' (the newest append of the term is not there, though it brought
-- no entry), or 'relations' (one is missing: send them all).
-- KEYS: those that every operation has, then those of tables in the row index
-- ARGV: new epoch, token, seen epoch, seen number, seen id, nonce of the newest append or '', nonce, watermark,
--       proven until, most entries, bytes, milliseconds kept, most bytes to notify with, most bytes of the row index,
--       count of versions used, count of relations, count of bodies, count of row changes,
--       versions…, (version, relation)…, bodies…, (table: 0 for the last of KEYS, what to do, field, text)…
local MOST_TRIMMED = 20000
local state = load_state()
local token, newest_nonce, nonce, watermark, proven = ARGV[2], ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local most, most_bytes, most_time, most_notified, most_indexed =
  tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])
local versions, relations, count, row_changes =
  tonumber(ARGV[15]), tonumber(ARGV[16]), tonumber(ARGV[17]), tonumber(ARGV[18])
local first_version = 19
local first_relation = first_version + versions
local first_body = first_relation + 2 * relations
local first_row = first_body + count

if state.nonce == nonce then return head('ok', state) end -- the same call again: it had happened
local status = verify(state, ARGV[3], tonumber(ARGV[4]), ARGV[5])
if state.token ~= token and (state.token ~= '' or status ~= 'epoch') then status = 'lease' end
if status == 'ok' and newest_nonce ~= '' and newest_nonce ~= state.nonce then status = 'lost' end
if status ~= 'ok' then return head(status, state) end

local brought = {}
for i = first_relation, first_body - 1, 2 do brought[ARGV[i]] = true end
for i = first_version, first_relation - 1 do
  if not brought[ARGV[i]] and redis.call('HEXISTS', RELATIONS, ARGV[i]) == 0 then return head('relations', state) end
end

-- Store. The first write is one that Redis refuses when it is out of memory.
for i = first_relation, first_body - 1, 2 do redis.call('HSET', RELATIONS, ARGV[i], ARGV[i + 1]) end
local clock = redis.call('TIME')
state.time = math.max(state.time, clock[1] * 1000 + math.floor(clock[2] / 1000))
local start, previous, before, lengths = state.number + 1, state.id, state.bytes, {}
for i = 1, count do
  local body, id = ARGV[first_body + i - 1], nonce .. '.' .. (i - 1)
  state.number = state.number + 1
  redis.call('XADD', HISTORY, text(state.number) .. '-0', 'i', id, 'p', state.id, 't', text(state.time),
    'c', text(state.bytes), 'b', body)
  state.id, state.bytes, lengths[i] = id, state.bytes + #body, #body
end
if count > 0 then
  for i = first_version, first_relation - 1 do redis.call('ZADD', USED, text(state.number), ARGV[i]) end
end

-- Trim: the oldest entries by count, and those that stand before too many bytes or are too old. Bytes and times only
-- rise, so the first to keep is found by doubling steps, then by halving. What was just appended always stays.
local function must_go(number)
  local fields = fields_of(number)
  return state.bytes - tonumber(fields[8]) > most_bytes or tonumber(fields[6]) < state.time - most_time
end
local first = first_number(state)
local newest = math.min(start - 1, first + MOST_TRIMMED)
local keep = math.max(first, math.min(state.number - most + 1, newest + 1))
if keep <= newest and must_go(keep) then
  local step = 1
  while keep + step <= newest and must_go(keep + step) do
    keep, step = keep + step, step * 2
  end
  local high = math.min(keep + step, newest + 1) -- stays; `keep` goes
  while high - keep > 1 do
    local middle = math.floor((keep + high) / 2)
    if must_go(middle) then keep = middle else high = middle end
  end
  keep = high
end
if keep > first then
  redis.call('XTRIM', HISTORY, 'MAXLEN', text(state.number - keep + 1))
  local unused = redis.call('ZRANGEBYSCORE', USED, '-inf', '(' .. text(keep), 'LIMIT', 0, 100)
  if #unused > 0 then
    redis.call('HDEL', RELATIONS, unpack(unused))
    redis.call('ZREM', USED, unpack(unused))
  end
end

-- Change the row index. A table's fields that INDEX does not know of have outlived it (an eviction, a lost state): they
-- count for nothing.
local FIELD_BYTES = 64 -- as in broker.base
local function cost(field, length)
  return length == 0 and 0 or #field + length + FIELD_BYTES
end
local function change_rows()
  local sizes, left_out, total = {}, {}, 0
  local known = redis.call('HGETALL', INDEX)
  for i = 1, #known, 2 do
    local size, out = string.match(known[i + 1], '(%d+) (%d+)')
    sizes[known[i]], left_out[known[i]], total = tonumber(size), tonumber(out), total + tonumber(size)
  end
  for i = first_row, first_row + 4 * row_changes - 1, 4 do
    local key, what, field, row = KEYS[#KEYS - tonumber(ARGV[i])], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
    if what == 'forget all' or not sizes[key] then
      redis.call('UNLINK', key)
      total, sizes[key], left_out[key] = total - (sizes[key] or 0), 0, 0
    end
    local before, growth = redis.call('HSTRLEN', key, field), 0 -- 0: not there, since no text is empty
    if what == 'forget' and before > 0 then
      redis.call('HDEL', key, field)
      growth = -cost(field, before)
    elseif what == 'put' or (what == 'put new' and before == 0) then
      growth = cost(field, #row) - cost(field, before)
      if before == 0 and field ~= '' and total + growth > most_indexed then
        left_out[key], growth = left_out[key] + 1, 0
      else
        redis.call('HSET', key, field, row)
      end
    end
    total, sizes[key] = total + growth, sizes[key] + growth
  end
  for key, size in pairs(sizes) do
    if size == 0 and left_out[key] == 0 then
      redis.call('HDEL', INDEX, key)
    else
      redis.call('HSET', INDEX, key, text(size) .. ' ' .. text(left_out[key]))
    end
  end
end
if row_changes > 0 then change_rows() end

if watermark ~= '' then state.watermark = watermark end
if proven ~= '' then state.proven = proven end
redis.call('HSET', STATE, 'number', text(state.number), 'id', state.id, 'bytes', text(state.bytes),
  'time', text(state.time), 'nonce', nonce, 'watermark', state.watermark, 'proven', state.proven)
if state.bytes - before <= most_notified then
  notify(state, start, count, previous, nonce, lengths, table.concat(ARGV, '', first_body, first_body + count - 1))
else
  notify(state, start, count, previous, nonce, {}, '')
end
return head('ok', state)

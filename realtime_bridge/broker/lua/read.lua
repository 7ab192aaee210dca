-- The entries after a number: the newest number, then number, id, previous id and body of each. If the first alone is
-- larger than it may be: its size instead.
-- ARGV: new epoch, bytes, after, limit
local CHUNK = 64
local state = load_state()
local room, after, limit = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local answer, taken, bytes = {state.number}, 0, nil -- bytes of all entries up to `after`

-- How many to fetch next. Redis copies whole bodies, so several only if it is known that all of them fit.
local chunk_size = CHUNK
local function count()
  local most = math.min(chunk_size, limit - taken, state.number - after)
  if taken == 0 or most < 2 then return 1 end
  local following = fields_of(after + most + 1)
  if (following and tonumber(following[8]) or state.bytes) - bytes > room then chunk_size = 1 end
  return math.min(chunk_size, most)
end

while taken < limit do
  local chunk = redis.call('XRANGE', HISTORY, text(after + 1), '+', 'COUNT', count())
  if #chunk == 0 then break end
  for _, entry in ipairs(chunk) do
    local fields = entry[2]
    local size = #fields[10]
    if size > room then return taken == 0 and size or answer end
    room, bytes = room - size, tonumber(fields[8]) + size
    after = tonumber(string.match(entry[1], '^%d+'))
    answer[#answer + 1] = after
    answer[#answer + 1] = fields[2]
    answer[#answer + 1] = fields[4]
    answer[#answer + 1] = fields[10]
    taken = taken + 1
  end
end
return answer

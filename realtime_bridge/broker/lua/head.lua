-- Where the history ends, whether it continues what the caller has seen, and the epochs, newest first. To a caller who
-- has seen nothing also the newest ids, newest first, by which it will know a fork when it meets one.
-- ARGV: new epoch, seen epoch ('' for none), seen number, seen id
local CHUNK, MOST_IDS, MOST_BYTES = 50, 1000, 4 * 1024 * 1024
local state = load_state()

-- Redis copies whole bodies: several entries are fetched together only if it is known that all of them are few bytes.
local function newest_ids()
  local ids, number, bytes, room, chunk_size = {state.id}, state.number, state.bytes, MOST_BYTES, CHUNK
  while number > 1 and #ids < MOST_IDS and room > 0 do
    if chunk_size > 1 then
      local first = fields_of(math.max(number - chunk_size + 1, 1))
      if not first or bytes - tonumber(first[8]) > room then chunk_size = 1 end
    end
    local chunk = redis.call('XREVRANGE', HISTORY, text(number), '-', 'COUNT', chunk_size)
    if #chunk == 0 then break end
    for _, entry in ipairs(chunk) do
      local previous = entry[2][4]
      number = number - 1
      if number > 0 then ids[#ids + 1] = previous end
    end
    local before = tonumber(chunk[#chunk][2][8])
    room, bytes = room - (bytes - before), before
  end
  return ids
end

local answer = head(verify(state, ARGV[2], tonumber(ARGV[3]), ARGV[4]), state)
answer[8] = redis.call('LRANGE', EPOCHS, 0, -1)
answer[9] = ARGV[2] == '' and state.number > 0 and newest_ids() or {}
return answer

-- Where the history ends, whether it continues what the caller has seen, and the epochs, newest first. To a caller who
-- has seen nothing also the newest ids, newest first, by which it will know a fork when it meets one.
-- ARGV: new epoch, seen epoch ('' for none), seen number, seen id
local CHUNK, MOST_CHUNKS, MOST_BYTES = 50, 20, 4 * 1024 * 1024
local state = load_state()

local function newest_ids()
  local ids, bytes, number = {}, 0, state.number
  if number > 0 then ids[1] = state.id end
  for _ = 1, MOST_CHUNKS do
    local chunk = redis.call('XREVRANGE', HISTORY, text(number), '-', 'COUNT', CHUNK)
    for _, entry in ipairs(chunk) do
      local previous, body = entry[2][4], entry[2][10]
      number, bytes = number - 1, bytes + #body
      if number > 0 then ids[#ids + 1] = previous end
    end
    if #chunk < CHUNK or bytes > MOST_BYTES then break end
  end
  return ids
end

local answer = head(verify(state, ARGV[2], tonumber(ARGV[3]), ARGV[4]), state)
answer[8] = redis.call('LRANGE', EPOCHS, 0, -1)
answer[9] = ARGV[2] == '' and newest_ids() or {}
return answer

-- The entries after a number: the newest number, then number, id, previous id and body of each.
-- ARGV: new epoch, after, limit, bytes
local CHUNK = 64
local state = load_state()
local after, limit, room = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local answer, taken = {state.number}, 0
while taken < limit do
  local chunk = redis.call('XRANGE', HISTORY, text(after + 1), '+', 'COUNT', math.min(CHUNK, limit - taken))
  if #chunk == 0 then break end
  for _, entry in ipairs(chunk) do
    local fields = entry[2]
    room = room - #fields[10]
    if room < 0 and taken > 0 then return answer end
    after = tonumber(string.match(entry[1], '^%d+'))
    answer[#answer + 1] = after
    answer[#answer + 1] = fields[2]
    answer[#answer + 1] = fields[4]
    answer[#answer + 1] = fields[10]
    taken = taken + 1
  end
end
return answer

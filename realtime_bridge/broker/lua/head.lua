-- Where the history ends, whether it continues what the caller has seen, and the epochs, newest first.
-- ARGV: new epoch, seen epoch ('' for none), seen number, seen id
local state = load_state()
local answer = head(verify(state, ARGV[2], tonumber(ARGV[3]), ARGV[4]), state)
answer[8] = redis.call('LRANGE', EPOCHS, 0, -1)
return answer

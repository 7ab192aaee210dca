-- Take the lease if it is free: {'ok', token, nonce of the newest append}, or {'held', milliseconds until it ends by
-- itself}.
-- ARGV: new epoch, random part of the token, milliseconds, random parts of the tokens that the caller has given up
local state = load_state()
local holder = redis.call('GET', LEASE)
if holder and not string.find(ARGV[4], string.match(holder, '[^.]*$'), 1, true) then
  -- Redis dates what runs out by a clock that may be set back: no lease may last longer than it was given for.
  local left = redis.call('PTTL', LEASE)
  local most = tonumber(redis.call('HGET', STATE, 'ttl') or left)
  if left > most then redis.call('PEXPIRE', LEASE, most) end
  return {'held', math.min(left, most)}
end
-- A server that was started again, or another one, may have lost the newest entries while nobody was there who remembers
-- them. What is appended from now on would have the same numbers.
local run = run_of_server()
if run ~= '' and run ~= redis.call('HGET', STATE, 'run') then
  leave_epoch(state, state.number)
  redis.call('HSET', STATE, 'run', run)
end
-- An append that was refused half way, by an ACL, has left entries that nobody was told of. Streams take no number back.
local newest = redis.call('XREVRANGE', HISTORY, '+', '-', 'COUNT', 1)[1]
if newest and tonumber(string.match(newest[1], '^%d+')) > state.number then redis.call('DEL', HISTORY) end
local counter = redis.call('HINCRBY', STATE, 'counter', 1)
local token = state.epoch .. '.' .. text(counter) .. '.' .. ARGV[2]
redis.call('HSET', STATE, 'token', token, 'ttl', ARGV[3])
redis.call('SET', LEASE, token, 'PX', ARGV[3])
redis.call('DEL', RELEASED)
return {'ok', token, state.nonce}

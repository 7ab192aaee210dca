-- Take the lease if it is free: {'ok', token}, or {'held', milliseconds until it ends by itself}.
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
local counter = redis.call('HINCRBY', STATE, 'counter', 1)
local token = state.epoch .. '.' .. text(counter) .. '.' .. ARGV[2]
redis.call('HSET', STATE, 'token', token, 'ttl', ARGV[3])
redis.call('SET', LEASE, token, 'PX', ARGV[3])
redis.call('DEL', RELEASED)
return {'ok', token}

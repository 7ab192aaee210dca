-- Take the lease if it is free: {'ok', token}, or {'held', milliseconds until it ends by itself}.
-- ARGV: new epoch, random part of the token, milliseconds, random parts of the tokens that the caller has given up
local state = load_state()
local holder = redis.call('GET', LEASE)
if holder and not string.find(ARGV[4], string.match(holder, '[^.]*$'), 1, true) then
  return {'held', redis.call('PTTL', LEASE)}
end
local counter = redis.call('HINCRBY', STATE, 'counter', 1)
local token = state.epoch .. '.' .. text(counter) .. '.' .. ARGV[2]
redis.call('HSET', STATE, 'token', token)
redis.call('SET', LEASE, token, 'PX', ARGV[3])
redis.call('DEL', RELEASED)
return {'ok', token}

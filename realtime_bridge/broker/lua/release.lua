-- Give the lease up if it is still this token's, and wake one who waits for it. The token is good for nothing more.
-- ARGV: new epoch, token
if redis.call('HGET', STATE, 'token') == ARGV[2] then redis.call('HSET', STATE, 'token', '') end
if redis.call('GET', LEASE) ~= ARGV[2] then return 0 end
redis.call('DEL', LEASE, RELEASED)
redis.call('RPUSH', RELEASED, '1')
return redis.call('PEXPIRE', RELEASED, 1000)

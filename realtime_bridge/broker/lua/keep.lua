-- Extend the lease if it is still this token's: 1, else 0.
-- ARGV: new epoch, token, milliseconds
if redis.call('GET', LEASE) ~= ARGV[2] then return 0 end
return redis.call('PEXPIRE', LEASE, ARGV[3])

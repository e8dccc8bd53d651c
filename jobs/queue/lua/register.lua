-- Say that a worker is alive, for a while; others whose time is over are dropped.
--
-- ARGV: 1 worker   2 what it says of itself, JSON   3 lifetime, ms
-- Returns nothing.

redis.call('SET', key('worker', ARGV[1]), ARGV[2], 'PX', ARGV[3])
redis.call('ZADD', key('workers'), NOW + ARGV[3], ARGV[1])
redis.call('ZREMRANGEBYSCORE', key('workers'), '-inf', NOW)

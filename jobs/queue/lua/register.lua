-- Register a worker as alive for a while, and remove expired registrations.
--
-- ARGV: 1 worker   2 its report, JSON   3 lifetime in ms
-- Returns nothing.
--
-- Writes                what                                          expires
--   worker:<id>         string: the report                            after ARGV[3]
--   workers             zset: the worker, by the end of its time      removed by the next register

redis.call('SET', key('worker', ARGV[1]), ARGV[2], 'PX', ARGV[3])
redis.call('ZADD', key('workers'), NOW + ARGV[3], ARGV[1])
redis.call('ZREMRANGEBYSCORE', key('workers'), '-inf', NOW)

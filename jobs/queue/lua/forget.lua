-- Forget a job that due.lua returned and whose files are gone. One that is readable is kept.
--
-- ARGV: 1 job
-- Returns 1 if there was anything to forget.

if redis.call('EXISTS', key('job', ARGV[1])) == 1 then return 0 end
return redis.call('ZREM', key('gc'), ARGV[1])

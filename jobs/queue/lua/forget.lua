-- Forget a job from due.lua whose files are gone. A job that can still be read is kept.
--
-- ARGV: 1 job
-- Returns 1 if there was anything to forget, else 0.
--
-- Writes                what
--   gc                  zset: - the job

if redis.call('EXISTS', key('job', ARGV[1])) == 1 then return 0 end
return redis.call('ZREM', key('gc'), ARGV[1])

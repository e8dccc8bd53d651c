-- Remove a job at once, whatever its state; its files go by due.lua. Workers lose its leases.
--
-- ARGV: 1 job   2 tenant, or '' for any   3 nonce; the same again answers 'ok'
-- Returns 'ok' or 'missing'.

local once = key('once', ARGV[3])
if redis.call('EXISTS', once) == 1 then return 'ok' end
local job = job_owned_by(ARGV[2], ARGV[1])
if not job then return 'missing' end
local was_running = job.running > 0
if not job.finished then halt(job) end
emit(job, 'deleted')
redis.call('UNLINK', key('job', job.id), key('requests', job.id), key('images', job.id),
  key('steps', job.id))
redis.call('ZREM', key('jobs', job.tenant), job.id)
redis.call('ZADD', key('gc'), NOW + (was_running and LIFETIME.deleted_grace or 0), job.id)
redis.call('HSET', once, 'job', job.id)
redis.call('PEXPIRE', once, LIFETIME.once_without_key)
return 'ok'

-- Remove a job at once, whatever its state; its files go by due.lua. Workers lose its leases. If any
-- image ever ran, the files go later: a worker may still write one, also of an image cancelled before.
--
-- ARGV: 1 job   2 tenant, or '' for any   3 nonce; the same again answers 'ok'
-- Returns 'ok' or 'missing'.

local once = key('once', ARGV[3])
if redis.call('EXISTS', once) == 1 then return 'ok' end
local job = job_owned_by(ARGV[2], ARGV[1])
if not job then return 'missing' end
if not job.finished then halt(job) end
emit(job, 'deleted')
redis.call('UNLINK', key('job', job.id), key('requests', job.id), key('images', job.id),
  key('steps', job.id))
redis.call('ZREM', key('jobs', job.tenant), job.id)
redis.call('ZADD', key('gc'), NOW + (job.started and LIFETIME.deleted_grace or 0), job.id)
redis.call('HSET', once, 'job', job.id)
redis.call('PEXPIRE', once, LIFETIME.once_without_key)
return 'ok'

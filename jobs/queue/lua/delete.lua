-- Remove a job at once, whatever its state; its workers lose their leases. Its files are removed
-- later, through due.lua. If any image ever ran, they're kept for a grace period, because a worker
-- may still be writing one, even of an image that was cancelled before.
--
-- ARGV: 1 job   2 tenant, or '' for any   3 nonce: repeating a call with it returns 'ok'
-- Returns 'ok' or 'missing'.
--
-- Writes                what                                          expires
--   job:<id>, :requests, :images, :steps   deleted                    -
--   jobs:<tenant>       zset: - the job                               90 days after the last job
--   gc                  zset: + the job, due now or in a minute       removed by forget.lua
--   once:<nonce>        hash: the job, to recognise a repeated call   after 10 minutes
--   events              stream: one entry                             trimmed to 100,000
-- and what `halt` in halt.lua writes.

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

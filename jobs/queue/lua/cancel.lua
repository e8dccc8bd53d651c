-- Cancel what is not finished of a job. The quota is free at once; workers learn at their beat.
--
-- ARGV: 1 job   2 tenant, or '' for any   3 nonce; the same again changes nothing, so that a repeat
--       does not cancel what somebody has retried in between
-- Returns 'ok', also for a job that is over already, or 'missing'.

local job = job_owned_by(ARGV[2], ARGV[1])
if not job then return 'missing' end
if redis.call('HGET', key('job', job.id), 'halted') == ARGV[3] then return 'ok' end
redis.call('HSET', key('job', job.id), 'halted', ARGV[3])
if not job.finished then
  halt(job)
  save_jobs()
end
return 'ok'

-- Cancel a job's unfinished images. This frees their quota at once; workers learn of it at their
-- next beat.
--
-- ARGV: 1 job   2 tenant, or '' for any   3 nonce: repeating a call with it changes nothing, so a
--       resent call doesn't cancel what was retried in between
-- Returns 'ok', also for a job that is already finished, or 'missing'.
--
-- Writes                what                                          expires
--   job:<id>            hash: the nonce, as `halted`                  with the job
--   job:<id>, events, gc   the job's new state (save_job in prelude.lua)
-- and what `halt` in halt.lua writes.

local job = job_owned_by(ARGV[2], ARGV[1])
if not job then return 'missing' end
if redis.call('HGET', key('job', job.id), 'halted') == ARGV[3] then return 'ok' end
redis.call('HSET', key('job', job.id), 'halted', ARGV[3])
if not job.finished then
  halt(job)
  save_jobs()
end
return 'ok'

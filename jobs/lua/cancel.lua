-- Cancel what is not finished of a job. The quota is free at once; workers learn at their beat.
--
-- ARGV: 1 job   2 tenant, or '' for any
-- Returns 'ok', also for a job that is over already, or 'missing'.

local job = job_owned_by(ARGV[2], ARGV[1])
if not job then return 'missing' end
if not job.finished then
  halt(job)
  save_jobs()
end
return 'ok'

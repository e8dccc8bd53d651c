-- Report that a leased image failed. It's queued again if that may help, and fails otherwise.
--
-- ARGV: 1 job   2 index   3 token   4 error   5 '1' if trying again may help   6 delay in ms
-- Returns 'again', 'failed', 'already' (this token has reported before) or 'stale'.
--
-- Writes                what                                          expires
--   job:<id>:images     hash: the image's record, with the error      with the job
--   job:<id>:steps, leases   - the image                              -
--   if again:           what `requeue` in order.lua writes
--   tallies             hash: + 1 retried                             never
--   if failed: quota    hash: - 1 for the tenant                      never
--   job:<id>, events, gc   the new counts (save_job in prelude.lua), and an event if it failed

local index = tonumber(ARGV[2])
local job, record, state = held_image(ARGV[1], index, ARGV[3])
if not job then
  return (state == 'queued' or state == 'failed') and 'already' or 'stale'
end
local answer
record.error = ARGV[4]
if ARGV[5] == '1' and record.attempt < job.max_attempts then
  requeue(job, index, record, tonumber(ARGV[6]))
  tally('retried', job.model, 1)
  answer = 'again'
else
  finish_image(job, index, record, 'failed')
  emit(job, 'image_failed', index, {error = ARGV[4]})
  answer = 'failed'
end
save_jobs()
return answer

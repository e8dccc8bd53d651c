-- Finish images with their results, each only if the token is that of the image's current lease.
--
-- ARGV: job, index, token and result (JSON) of each image
-- Returns 'committed', 'already' (this token has committed it before) or 'stale' for each.
--
-- Writes                what                                          expires
--   job:<id>:images     hash: the image's record, with the result     with the job
--   job:<id>:steps, leases   - the image                              -
--   quota               hash: - 1 for the tenant                      never
--   tallies             hash: + 1 for each refused commit             never
--   job:<id>, events, gc   the new counts (save_job in prelude.lua), and an event for each image

local answers = {}
for i = 1, #ARGV, 4 do
  local id, index = ARGV[i], tonumber(ARGV[i + 1])
  local job, record, state = held_image(id, index, ARGV[i + 2])
  if job then
    record.result = ARGV[i + 3]
    finish_image(job, index, record, 'succeeded')
    emit(job, 'image', index)
  end
  local existing = job_of(id)
  if existing and not job and state ~= 'succeeded' then tally('refused', existing.model, 1) end
  local refusal = state == 'succeeded' and 'already' or 'stale'
  answers[#answers + 1] = job and 'committed' or refusal
end
save_jobs()
return answers

-- Finish images with their results, each only if its token is still the image's lease.
--
-- ARGV: job, index, token, result JSON of each image
-- Returns 'committed', 'already' (this token has committed it before) or 'stale' for each.

local answers = {}
for place = 1, #ARGV, 4 do
  local index = tonumber(ARGV[place + 1])
  local job, record, state = held_image(ARGV[place], index, ARGV[place + 2])
  if job then
    record.result = ARGV[place + 3]
    finish_image(job, index, record, 'succeeded')
    emit(job, 'image', index)
  end
  local known = job_of(ARGV[place])
  if known and not job and state ~= 'succeeded' then tally('refused', known.model, 1) end
  local others = state == 'succeeded' and 'already' or 'stale'
  answers[#answers + 1] = job and 'committed' or others
end
save_jobs()
return answers

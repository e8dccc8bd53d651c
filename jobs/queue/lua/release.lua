-- Give leased images back unmade, ready at once for anybody; it does not count as an attempt.
--
-- ARGV: job, index, token of each image
-- Returns how many were still this worker's.

local released = 0
for place = 1, #ARGV, 3 do
  local index = tonumber(ARGV[place + 1])
  local job, record = held_image(ARGV[place], index, ARGV[place + 2])
  if job then
    record.attempt = record.attempt - 1
    requeue(job, index, record, 0)
    released = released + 1
  end
end
save_jobs()
return released

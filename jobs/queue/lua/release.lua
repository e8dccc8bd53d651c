-- Give leased images back unfinished. They are ready at once, and it doesn't count as an attempt.
--
-- ARGV: job, index and token of each image
-- Returns how many of them this worker still held.
--
-- Writes what `requeue` in order.lua and save_job in prelude.lua write.

local released = 0
for i = 1, #ARGV, 3 do
  local index = tonumber(ARGV[i + 1])
  local job, record = held_image(ARGV[i], index, ARGV[i + 2])
  if job then
    record.attempt = record.attempt - 1
    requeue(job, index, record, 0)
    released = released + 1
  end
end
save_jobs()
return released

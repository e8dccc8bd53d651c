-- Prepended to every script, after order.lua: how cancel.lua, delete.lua and claim.lua stop a job.
--
-- `halt` takes all of a job's images out of the queue and away from their workers.
--
-- Writes                what                                          expires
--   job:<id>:images     hash: a record for each image that ever ran   with the job
--   job:<id>:again, :later   deleted                                  -
--   job:<id>:steps, leases, delayed   - the job's images              -
--   quota               hash: - the images of the tenant              never
-- and what `withdraw` in order.lua writes.

-- Images that were never claimed have no record; the job's `cut` says that they are cancelled.
-- So a job of 10,000 images is cancelled without writing 10,000 records.
local function cut_untouched(job)
  if job.next == job.total then return end
  job.cut, job.next = job.next, job.total
end

local function cancel_image(job, index)
  local record = record_of(job, index)
  record.step = record.state == 'running' and end_lease(job, index) or 0
  record.state = 'cancelled'
  if record.step > 0 then job.steps_done = job.steps_done + steps_made(job, index, record) end
  put_record(job, index, record)
end

-- Afterwards no image of the job is queued or running. Finished images stay as they are.
local function halt(job)
  withdraw(job, job.waiting)
  cut_untouched(job)
  local again, later = key('again', job.id), key('later', job.id)
  for _, index in ipairs(redis.call('ZRANGE', again, 0, -1)) do cancel_image(job, index) end
  for _, index in ipairs(redis.call('ZRANGE', later, 0, -1)) do cancel_image(job, index) end
  for _, index in ipairs(redis.call('HKEYS', key('steps', job.id))) do cancel_image(job, index) end
  redis.call('DEL', again, later)
  redis.call('ZREM', key('delayed'), job.id)
  move(job, 'queued', 'cancelled', job.queued)
  move(job, 'running', 'cancelled', job.running)
end

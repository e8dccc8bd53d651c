-- Prepended to the scripts that stop a job: takes all its images out of the queue and from their
-- workers.

-- Untouched images have no record; the job's `cut` says that they are cancelled.
local function cut_untouched(job)
  if job.next == job.total then return end
  job.cut, job.next = job.next, job.total
end

local function cancel_image(job, index)
  local record = record_of(job, index)
  if record.state == 'running' then record.step = end_lease(job, index) end
  record.state = 'cancelled'
  put_record(job, index, record)
end

-- Nothing of the job is queued or running afterwards. Images that finished stay as they are.
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

-- Take images from workers that let their leases expire, and wake those whose delay is over.
-- A lost lease is a stall, not an attempt: the image goes back to run alone, in case it is what
-- kills its workers, and fails after too many.
--
-- ARGV: 1 most images to look at
-- Returns how many images moved.

local limit = tonumber(ARGV[1])
local moved = promote(limit)
local expired = redis.call('ZRANGEBYSCORE', key('leases'), '-inf', NOW, 'LIMIT', 0, limit)
for _, image in ipairs(expired) do
  local id, index = split(image)
  local job = job_of(id)
  local record = job and record_of(job, index)
  if not record or record.state ~= 'running' then
    redis.call('ZREM', key('leases'), image)
  else
    moved = moved + 1
    record.stalls = record.stalls + 1
    tally('lost', job.model, 1)
    record.attempt = record.attempt - 1
    if record.stalls <= job.max_stalls then
      requeue(job, index, record, 0)
    else
      record.error = string.format('its worker died or hung %d times', record.stalls)
      finish_image(job, index, record, 'failed')
      emit(job, 'image_failed', index, {error = record.error})
    end
  end
end
save_jobs()
return moved

-- Take images from workers that let their leases expire, and wake those whose delay is over.
-- A lost lease is a stall, not an attempt: the image goes back to run alone, in case it is what
-- kills its workers, and fails after too many.
--
-- If nobody has swept for longer than a lease, the queue was away, or all its workers were (an
-- outage, a laptop's sleep). Then what has expired gets a short grace, once, in which those who live
-- can beat: the first one back must not take the work of all others.
--
-- ARGV: 1 most images to look at
-- Returns how many images moved.

local GRACE_MS = 2000     -- four beats
local GRACE_SHARE = 2 / 3 -- and of a lease at most so much, in which there are four beats too
local PAUSE_MS = 6000     -- three sweeps of a worker: less is none, however short the leases

local limit = tonumber(ARGV[1])

local function was_paused()
  local found = redis.call('HMGET', key('swept'), 'at', 'lease')
  local lease = tonumber(found[2])
  return found[1] and lease and NOW - found[1] > math.max(lease, PAUSE_MS), lease
end

local function extend_expired(grace)
  for _, image in ipairs(redis.call('ZRANGEBYSCORE', key('leases'), '-inf', NOW)) do
    redis.call('ZADD', key('leases'), NOW + grace, image)
  end
end

local function take(image)
  local id, index = split(image)
  local job = job_of(id)
  local record = job and record_of(job, index)
  if not record or record.state ~= 'running' then
    redis.call('ZREM', key('leases'), image)
    return 0
  end
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
  return 1
end

local moved = promote(limit)
local is_late, lease = was_paused()
if is_late then extend_expired(math.floor(math.min(GRACE_MS, lease * GRACE_SHARE))) end
for _, image in ipairs(redis.call('ZRANGEBYSCORE', key('leases'), '-inf', NOW, 'LIMIT', 0, limit)) do
  moved = moved + take(image)
end
redis.call('HSET', key('swept'), 'at', NOW)
redis.call('PEXPIRE', key('swept'), LIFETIME.swept)
save_jobs()
return moved

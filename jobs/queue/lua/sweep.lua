-- Take images from workers whose leases have expired, and wake delayed images that are due. The
-- heartbeat of every worker runs this every two seconds (workers/heartbeat.py).
--
-- An expired lease counts as a stall, not as an attempt. The image is queued again. It will run
-- alone, because it may be the cause, and it fails after too many stalls.
--
-- ARGV: 1 largest number of images to look at
-- Returns how many images moved.
--
-- Writes                what                                          expires
--   leases              zset: - expired images, or + their grace      -
--   swept               hash: `at`, the time of this sweep            after 30 days without a sweep
--   tallies             hash: + 1 lost for each image taken           never
--   job:<id>:images     hash: the records of images taken             with the job
--   job:<id>, events, gc   the new counts (save_job in prelude.lua), and an event for each failure
-- and what `requeue` and `promote` in order.lua write.

local GRACE_MS = 2000     -- four beats
local GRACE_SHARE = 2 / 3 -- of a lease, at most: four beats fit into that too
local PAUSE_MS = 6000     -- three sweeps of one worker; no pause is shorter, even with short leases

local limit = tonumber(ARGV[1])

-- Whether the last sweep is longer ago than a lease. Workers sweep all the time, so in between
-- either the queue server or every worker was stopped (an outage, a suspended laptop).
local function was_paused()
  local swept = redis.call('HMGET', key('swept'), 'at', 'lease')
  local lease = tonumber(swept[2])
  return swept[1] and lease and NOW - swept[1] > math.max(lease, PAUSE_MS), lease
end

local function extend_expired(grace)
  for _, image in ipairs(redis.call('ZRANGEBYSCORE', key('leases'), '-inf', NOW)) do
    redis.call('ZADD', key('leases'), NOW + grace, image)
  end
end

local function take_back(image)
  local id, index = split(image)
  local job = job_of(id)
  local record = job and record_of(job, index)
  -- The job is gone and only the lease remains, for example after the server lost the end of its
  -- log.
  if not record or record.state ~= 'running' then
    redis.call('ZREM', key('leases'), image)
    return 0
  end
  record.stalls = record.stalls + 1
  tally('lost', job.model, 1)
  -- The claim counted an attempt. Undo that, because it was the worker that failed, not the image.
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
local is_after_pause, lease = was_paused()
-- After a pause every lease has expired, even those of live workers. They're extended once, for a
-- short time in which workers can beat. Without it, the first worker to come back would take the
-- images of all others.
if is_after_pause then extend_expired(math.floor(math.min(GRACE_MS, lease * GRACE_SHARE))) end
local expired = redis.call('ZRANGEBYSCORE', key('leases'), '-inf', NOW, 'LIMIT', 0, limit)
for _, image in ipairs(expired) do
  moved = moved + take_back(image)
end
redis.call('HSET', key('swept'), 'at', NOW)
redis.call('PEXPIRE', key('swept'), LIFETIME.swept)
save_jobs()
return moved

-- Who is next: prepended, after prelude.lua, to the scripts that put images into the queue or
-- take them out.
--
-- Start-time fair queueing in two levels. Each model and priority is a band: a zset of its tenants
-- by tag, and a zset of each tenant's jobs by tag. The lowest tenant's lowest job goes first, by
-- index, and both tags then rise by the image's cost (pixel-steps / weight). So tenants share
-- alike whatever they queue, and so do one tenant's jobs. Equal tags go by name; job ids begin
-- with their time of creation.
--
-- A tenant who joins starts at the lowest tag present, or at its own last one if that is higher
-- (`idle`, kept only while the band is not empty). A job joins at its tenant's lowest tag.

local PRIORITIES = {'9', '8', '7', '6', '5', '4', '3', '2', '1', '0'}
local AGEING_MS = 30000

local function band_name(model, priority)
  return string.format('%s:%s', model, priority)
end

local function lowest_tag(zset)
  return tonumber(redis.call('ZRANGE', zset, 0, 0, 'WITHSCORES')[2])
end

-- Ready images of a model per priority, highest first.
local function depths(model)
  local names = {}
  for place, priority in ipairs(PRIORITIES) do names[place] = band_name(model, priority) end
  local found = redis.call('HMGET', key('depth'), unpack(names))
  local total = 0
  for place = 1, #PRIORITIES do
    found[place] = tonumber(found[place] or 0)
    total = total + found[place]
  end
  return found, total
end

local function ring(model, times)
  local bell = key('bell', model)
  for _ = 1, math.min(times, BOUND.bell) do redis.call('LPUSH', bell, 1) end
  redis.call('LTRIM', bell, 0, BOUND.bell - 1)
  redis.call('PEXPIRE', bell, LIFETIME.bell)
end

local function set_depth(model, priority, depth)
  local band = band_name(model, priority)
  if depth > 0 then
    redis.call('HSET', key('depth'), band, depth)
    redis.call('HSETNX', key('times'), band, NOW)
    redis.call('HSETNX', key('times'), model, NOW)
    return
  end
  redis.call('HDEL', key('depth'), band)
  redis.call('HDEL', key('times'), band)
  local _, left = depths(model)
  if left == 0 then
    redis.call('HDEL', key('times'), model)
    redis.call('DEL', key('bell', model))
  end
end

local function change_depth(model, priority, by)
  local depth = tonumber(redis.call('HGET', key('depth'), band_name(model, priority)) or 0)
  set_depth(model, priority, depth + by)
end

local function change_load(job, by)
  local load = key('load', job.model, job.priority)
  redis.call('HINCRBY', load, 'n:' .. job.tenant, by)
  redis.call('HINCRBYFLOAT', load, 'c:' .. job.tenant, by * job.cost / job.weight)
  change_depth(job.model, job.priority, by)
end

-- The tenant has nothing ready in the band any more.
local function leave(model, priority, tenant)
  local ready, idle = key('ready', model, priority), key('idle', model, priority)
  local load = key('load', model, priority)
  local tag = redis.call('ZSCORE', ready, tenant)
  redis.call('ZREM', ready, tenant)
  redis.call('HDEL', load, 'n:' .. tenant, 'c:' .. tenant)
  local lowest = lowest_tag(ready)
  if not lowest then
    redis.call('DEL', idle)
  elseif tag then
    redis.call('ZADD', idle, tag, tenant)
    redis.call('ZREMRANGEBYSCORE', idle, '-inf', lowest)
  end
end

-- `many` more images of the job are ready.
local function offer(job, many)
  if many == 0 then return end
  local ready, idle = key('ready', job.model, job.priority), key('idle', job.model, job.priority)
  local fair = key('fair', job.model, job.priority, job.tenant)
  if job.waiting == 0 then redis.call('ZADD', fair, lowest_tag(fair) or 0, job.id) end
  if not redis.call('ZSCORE', ready, job.tenant) then
    local own = tonumber(redis.call('ZSCORE', idle, job.tenant) or 0)
    redis.call('ZADD', ready, math.max(own, lowest_tag(ready) or 0), job.tenant)
    redis.call('ZREM', idle, job.tenant)
  end
  job.waiting = job.waiting + many
  job.moved = true
  change_load(job, many)
  ring(job.model, many)
end

-- `many` fewer images of the job are ready.
local function withdraw(job, many)
  if many == 0 then return end
  job.waiting = job.waiting - many
  job.moved = true
  change_load(job, -many)
  if job.waiting > 0 then return end
  local fair = key('fair', job.model, job.priority, job.tenant)
  redis.call('ZREM', fair, job.id)
  if redis.call('EXISTS', fair) == 0 then leave(job.model, job.priority, job.tenant) end
end

-- The job's next image was taken: it and its tenant pay.
local function charge(job, cost)
  local paid = cost / job.weight
  redis.call('ZINCRBY', key('ready', job.model, job.priority), paid, job.tenant)
  redis.call('ZINCRBY', key('fair', job.model, job.priority, job.tenant), paid, job.id)
end

-- Count a band anew from its jobs, dropping those that are gone or have nothing ready. Only a
-- queue that lost data needs it.
local function recount(model, priority)
  local ready, load = key('ready', model, priority), key('load', model, priority)
  local total = 0
  redis.call('DEL', load)
  for _, tenant in ipairs(redis.call('ZRANGE', ready, 0, -1)) do
    local fair = key('fair', model, priority, tenant)
    local count, cost = 0, 0
    for _, id in ipairs(redis.call('ZRANGE', fair, 0, -1)) do
      local job = job_of(id)
      if job and job.waiting > 0 then
        count = count + job.waiting
        cost = cost + job.waiting * job.cost / job.weight
      else
        redis.call('ZREM', fair, id)
      end
    end
    if count > 0 then
      redis.call('HSET', load, 'n:' .. tenant, count, 'c:' .. tenant, cost)
      total = total + count
    else
      leave(model, priority, tenant)
    end
  end
  set_depth(model, priority, total)
end

-- Back into the queue -----------------------------------------------------------------------

-- A running image goes back, ready at once or after `delay` milliseconds.
local function requeue(job, index, record, delay)
  end_lease(job, index)
  record.state = 'queued'
  put_record(job, index, record)
  move(job, 'running', 'queued', 1)
  if delay > 0 then
    redis.call('ZADD', key('later', job.id), NOW + delay, index)
    redis.call('ZADD', key('delayed'), 'LT', NOW + delay, job.id)
  else
    redis.call('ZADD', key('again', job.id), index, index)
    offer(job, 1)
  end
end

-- Delayed images whose time has come are ready. Returns how many.
local function promote(limit)
  local promoted = 0
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('delayed'), '-inf', NOW, 'LIMIT', 0, limit)) do
    local job, later = job_of(id), key('later', id)
    local due = job and redis.call('ZRANGEBYSCORE', later, '-inf', NOW) or {}
    for _, index in ipairs(due) do
      redis.call('ZREM', later, index)
      redis.call('ZADD', key('again', id), index, index)
    end
    if job then offer(job, #due) end
    promoted = promoted + #due
    local following = job and lowest_tag(later)
    if following then
      redis.call('ZADD', key('delayed'), following, id)
    else
      redis.call('ZREM', key('delayed'), id)
    end
  end
  return promoted
end

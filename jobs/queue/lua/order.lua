-- Prepended to every script, after prelude.lua: the fair order, and how images enter and leave it.
--
-- It's start-time fair queueing in two levels. Each model and priority is a band: a zset of its
-- tenants by tag, and a zset of each tenant's jobs by tag. The tenant with the lowest tag goes
-- first, with its job that has the lowest tag, and that job's images go by index. Both tags then
-- rise by the image's cost (pixel-steps / weight). So tenants get equal shares however much they
-- queue, and so do the jobs of one tenant. Equal tags are ordered by name; job ids begin with their
-- creation time.
--
-- A tenant who joins starts at the lowest tag present, or at its own last tag if that is higher
-- (`idle`, kept only while the band isn't empty). A job joins at its tenant's lowest tag.
--
-- `offer`, `withdraw` and `charge` write                              expires
--   ready, fair, load   the tenant's and the job's place in the band  when nothing is ready
--   idle                zset: a tenant that left, with its last tag   when the band is empty
--   depth, times        hashes: ready images; since when, last served when nothing is ready
--   bell                list: a token for each worker to wake         after 60 s, or when empty
-- `requeue` and `promote` also write
--   job:<id>:images     hash: the image's record                      with the job
--   job:<id>:again, :later, delayed   the image, ready or delayed     when it's claimed
--   job:<id>:steps, leases   - the image                              -

local PRIORITIES = {'9', '8', '7', '6', '5', '4', '3', '2', '1', '0'}
local AGEING_MS = 30000

local function band_name(model, priority)
  return string.format('%s:%s', model, priority)
end

local function lowest_tag(zset)
  return tonumber(redis.call('ZRANGE', zset, 0, 0, 'WITHSCORES')[2])
end

-- Ready images of a model per priority, highest first, and in total.
local function depths(model)
  local names = {}
  for i, priority in ipairs(PRIORITIES) do names[i] = band_name(model, priority) end
  local counts = redis.call('HMGET', key('depth'), unpack(names))
  local total = 0
  for i = 1, #PRIORITIES do
    counts[i] = tonumber(counts[i] or 0)
    total = total + counts[i]
  end
  return counts, total
end

-- Wake up to `times` workers that block on the model's bell.
local function ring_bell(model, times)
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
  local _, total = depths(model)
  if total == 0 then
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

-- Take a tenant with nothing ready out of the band. Its tag stays in `idle` while it's above the
-- lowest one present. Otherwise the tenant could leave and come back, and would go first again.
local function leave_band(model, priority, tenant)
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

-- `count` more images of the job are ready.
local function offer(job, count)
  if count == 0 then return end
  local ready, idle = key('ready', job.model, job.priority), key('idle', job.model, job.priority)
  local fair = key('fair', job.model, job.priority, job.tenant)
  -- At the lowest tag present, a newcomer has neither an advantage nor a disadvantage.
  if job.waiting == 0 then redis.call('ZADD', fair, lowest_tag(fair) or 0, job.id) end
  if not redis.call('ZSCORE', ready, job.tenant) then
    local own = tonumber(redis.call('ZSCORE', idle, job.tenant) or 0)
    redis.call('ZADD', ready, math.max(own, lowest_tag(ready) or 0), job.tenant)
    redis.call('ZREM', idle, job.tenant)
  end
  job.waiting = job.waiting + count
  job.moved = true
  change_load(job, count)
  ring_bell(job.model, count)
end

-- `count` fewer images of the job are ready.
local function withdraw(job, count)
  if count == 0 then return end
  job.waiting = job.waiting - count
  job.moved = true
  change_load(job, -count)
  if job.waiting > 0 then return end
  local fair = key('fair', job.model, job.priority, job.tenant)
  redis.call('ZREM', fair, job.id)
  if redis.call('EXISTS', fair) == 0 then leave_band(job.model, job.priority, job.tenant) end
end

-- An image of the job was leased: raise the job's and its tenant's tag by the image's cost. Call it
-- before `withdraw`, which takes a job without ready images out of its zset.
local function charge(job, cost)
  local rise = cost / job.weight
  redis.call('ZINCRBY', key('ready', job.model, job.priority), rise, job.tenant)
  redis.call('ZINCRBY', key('fair', job.model, job.priority, job.tenant), rise, job.id)
end

-- Recount a band from its jobs, and drop jobs that are gone or have nothing ready. Every move keeps
-- the counts right, so this is only needed after the server has lost data.
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
      leave_band(model, priority, tenant)
    end
  end
  set_depth(model, priority, total)
end

-- Back into the queue -----------------------------------------------------------------------

-- Queue a running image again, ready at once or after `delay` ms.
local function requeue(job, index, record, delay)
  end_lease(job, index)
  record.state = 'queued'
  put_record(job, index, record)
  move(job, 'running', 'queued', 1)
  if delay > 0 then
    redis.call('ZADD', key('later', job.id), NOW + delay, index)
    -- LT keeps the earliest time of the job's delayed images.
    redis.call('ZADD', key('delayed'), 'LT', NOW + delay, job.id)
  else
    redis.call('ZADD', key('again', job.id), index, index)
    offer(job, 1)
  end
end

-- Make delayed images that are due ready, of at most `limit` jobs. Returns how many.
local function promote(limit)
  local promoted = 0
  local ids = redis.call('ZRANGEBYSCORE', key('delayed'), '-inf', NOW, 'LIMIT', 0, limit)
  for _, id in ipairs(ids) do
    local job, later = job_of(id), key('later', id)
    local due = job and redis.call('ZRANGEBYSCORE', later, '-inf', NOW) or {}
    for _, index in ipairs(due) do
      redis.call('ZREM', later, index)
      redis.call('ZADD', key('again', id), index, index)
    end
    if job then offer(job, #due) end
    promoted = promoted + #due
    -- Scores of `later` are times, so its lowest one is when the job's next image is due.
    local next_due = job and lowest_tag(later)
    if next_due then
      redis.call('ZADD', key('delayed'), next_due, id)
    else
      redis.call('ZREM', key('delayed'), id)
    end
  end
  return promoted
end

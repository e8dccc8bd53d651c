-- Lease the next images of a model to a worker, in the order of order.lua.
--
-- ARGV: 1 model   2 worker   3 limit in images   4 lease in ms
--       5, 6 preferred width and height, or ''   7 linger in ms   8 nonce
--       9 random part of tokens   10 '' or, for a full worker, the lowest priority to take from
--       11... job:index of each image that the worker holds now
-- Returns {'leases', {job, index, token, attempt, stalls, priority, request, trace, age in ms}...},
-- or {'linger', ms to wait}.
--
-- It's safe to repeat. The same nonce returns the same leases, if they are still valid. A different
-- nonce gives back those leases of the last claim that the worker doesn't hold, because it never
-- got that reply.
--
-- Writes                what                                          expires
--   leases              zset: each image, by its deadline             removed when the lease ends
--   job:<id>:images     hash: each image's record, with its token     with the job
--   job:<id>:steps      hash: step 0 of each image                    removed when the lease ends
--   job:<id>:again      zset: - each image that was queued again      -
--   claimed:<worker>    list: the nonce, then key and token of each lease   after an hour
--   fence               counter: + 1 for each lease                   never
--   times               hash: when this model and priority was last served   when nothing is ready
--   ready, fair         zsets: the tenant's and the job's tag, raised by the cost (order.lua)
--   swept               hash: `lease`, for sweep.lua                  after 30 days
--   tallies             hash: first claims, and how long they waited  never
--   job:<id>, events    the new counts (save_job in prelude.lua)
-- and what `promote`, `withdraw` and, after a lost reply, `requeue` in order.lua write.

local SEARCHED = 4         -- tenants, and jobs of each, searched for the preferred size
local SLACK = 4            -- images whose cost a preferred one may overtake
local PROMOTED = 64        -- delayed jobs looked at
local SEARCHED_TO_JOIN = 8 -- tenants, and jobs of each, searched for a job to join

local model, worker, limit = ARGV[1], ARGV[2], tonumber(ARGV[3])
local lease_ms, width, height = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local joins_from = tonumber(ARGV[10])
local held_images, held_jobs = {}, {}
for i = 11, #ARGV do
  held_images[ARGV[i]] = true
  held_jobs[split(ARGV[i])] = true
end

local leases, claimed = {}, {ARGV[8]}

local function add_lease(job, index, record, body)
  redis.call('ZADD', key('leases'), NOW + lease_ms, image_key(job, index))
  leases[#leases + 1] = {job.id, index, record.token, record.attempt, record.stalls,
    job.priority, body, job.trace or '', math.max(0, NOW - job.created)}
  claimed[#claimed + 1] = image_key(job, index)
  claimed[#claimed + 1] = record.token
end

-- Return the last claim's leases again, or give back those whose reply was lost.
local function settle_last_claim()
  local last = redis.call('LRANGE', key('claimed', worker), 0, -1)
  for i = 2, #last, 2 do
    local id, index = split(last[i])
    local job, record = held_image(id, index, last[i + 1])
    local request = job and request_of(job, index)
    if request and last[1] == ARGV[8] then
      add_lease(job, index, record, request.body)
    elseif job and not held_images[last[i]] then
      record.attempt = record.attempt - 1
      requeue(job, index, record, 0)
    end
  end
end

-- The priority to serve next: the highest. One that hasn't been served for AGEING_MS counts as one
-- higher, and so on, so that low priorities are slow but never starve.
local function next_priority()
  local ready, best, best_rank = depths(model), nil, nil
  for i, priority in ipairs(PRIORITIES) do
    if ready[i] > 0 then
      local served = tonumber(redis.call('HGET', key('times'), band_name(model, priority)) or NOW)
      local rank = tonumber(priority) + (NOW - served) / AGEING_MS
      if not best or rank > best_rank then best, best_rank = priority, rank end
    end
  end
  return best
end

-- The job's next image, or nil if it turns out to have none. A job whose requests are gone, for
-- example from an evicting server, is cancelled, because its images can never be made and would
-- count towards its tenant's quota forever.
local function peek(id)
  local job = job_of(id)
  if not job then return nil end
  local index = tonumber(redis.call('ZRANGE', key('again', id), 0, 0)[1])
  local is_again = index ~= nil
  if not is_again then index = job.next end
  local request = index < job.total and request_of(job, index)
  if not request then
    if index < job.total then halt(job) end
    job.waiting, job.moved = 0, true
    return nil
  end
  return {job = job, index = index, is_again = is_again, request = request,
    cost = request.width * request.height * request.steps}
end

-- The image to lease next in a band, or nil if the band holds a job that is gone.
--
-- Normally that's the first image of the fair order. But a worker prefers the size of its last
-- image, because images of one size can share a forward pass. So with a preferred size the first
-- few tenants and jobs are searched, and the first match is leased. To keep shares fair, a match
-- may overtake by the cost of SLACK images at most. Leasing an image raises its tags, so a job that
-- keeps overtaking is soon too far ahead to overtake again.
local function choose(priority)
  local ready, head = key('ready', model, priority), nil
  local last = width and SEARCHED - 1 or 0
  local tenants = redis.call('ZRANGE', ready, 0, last, 'WITHSCORES')
  for t = 1, #tenants, 2 do
    local fair = key('fair', model, priority, tenants[t])
    local jobs = redis.call('ZRANGE', fair, 0, last, 'WITHSCORES')
    for j = 1, #jobs, 2 do
      local image = peek(jobs[j])
      -- The band's counts are wrong, so stop here; `fill` recounts it and tries again.
      if not image then return nil end
      head = head or image
      -- How far this image is from its turn: its tenant's distance from the first tenant, or its
      -- job's from that tenant's first job, whichever is larger.
      local distance = math.max(tenants[t + 1] - tenants[2], jobs[j + 1] - jobs[2])
      local is_near = distance <= SLACK * image.cost / image.job.weight
      local is_preferred = image.request.width == width and image.request.height == height
      if not width or (is_preferred and is_near) then return image end
    end
  end
  -- Nothing near has the preferred size, so the worker gets the first image of the fair order.
  return head
end

-- The first image of a job that the worker holds nothing of, in the order of priorities, tenants
-- and jobs; nil if no such job is ready.
--
-- A full worker asks this way. It lets in some images of jobs that aren't running on it yet, so
-- that a long job on all workers doesn't keep every other job waiting. The order is the fair one,
-- so a tenant or job far behind is found first, and `lease_image` charges for what joins.
local function choose_to_join()
  local counts = depths(model)
  for i, priority in ipairs(PRIORITIES) do
    if counts[i] > 0 and tonumber(priority) >= joins_from then
      local ready = key('ready', model, priority)
      for _, tenant in ipairs(redis.call('ZRANGE', ready, 0, SEARCHED_TO_JOIN - 1)) do
        local fair = key('fair', model, priority, tenant)
        for _, id in ipairs(redis.call('ZRANGE', fair, 0, SEARCHED_TO_JOIN - 1)) do
          -- A job that is gone is skipped, not recounted: the next ordinary claim does that.
          local image = not held_jobs[id] and peek(id)
          if image then return image end
        end
      end
    end
  end
end

local function lease_image(image, record)
  local job, index = image.job, image.index
  -- Only an image's first claim measures the queue; a retried job's age isn't time spent waiting.
  if record.token == '' and not job.retried then
    tally_wait(job.model, math.max(0, NOW - job.created))
  end
  record.state, record.worker = 'running', worker
  record.token = string.format('%d-%s', redis.call('INCR', key('fence')), ARGV[9])
  record.attempt = record.attempt + 1
  put_record(job, index, record)
  redis.call('HSET', key('steps', job.id), index, 0)
  if image.is_again then
    redis.call('ZREM', key('again', job.id), index)
  else
    job.next = index + 1
  end
  redis.call('HSET', key('times'), band_name(model, job.priority), NOW)
  charge(job, image.cost)
  withdraw(job, 1)
  move(job, 'queued', 'running', 1)
  job.started = job.started or NOW
  add_lease(job, index, record, image.request.body)
end

-- Lease images in the fair order, up to the limit. The loop ends at the first image that can't be
-- leased and doesn't skip it, because others could then overtake it forever.
local function fill()
  while #leases < limit do
    local priority = next_priority()
    if not priority then return end
    local image = choose(priority)
    if not image then
      -- Each recount removes what is gone, so the loop can't get stuck in this band.
      recount(model, priority)
    else
      local record = record_of(image.job, image.index)
      -- An image that has stalled before may be what killed its worker, so it's leased alone.
      local is_solo = record.stalls > 0
      if is_solo and #leases > 0 then return end
      -- The image was cancelled and retried, and this worker hasn't noticed yet. It can't have two
      -- leases on one image, so it has to drop the old one at its next beat first.
      if held_images[image_key(image.job, image.index)] then return end
      lease_image(image, record)
      if is_solo then return end
    end
  end
end

-- Lease images of jobs that the worker holds nothing of, up to the limit.
local function join()
  while #leases < limit do
    local image = choose_to_join()
    local record = image and record_of(image.job, image.index)
    if not image or record.stalls > 0 then return end
    lease_image(image, record)
  end
end

promote(PROMOTED)
settle_last_claim()
if #leases == 0 and joins_from then
  join()
elseif #leases == 0 then
  local _, depth = depths(model)
  local since = tonumber(redis.call('HGET', key('times'), model) or NOW)
  local linger = since + tonumber(ARGV[7]) - NOW
  if depth > 0 and depth < limit and linger > 0 then
    save_jobs()
    return {'linger', linger}
  end
  fill()
end

redis.call('DEL', key('claimed', worker))
if #leases > 0 then
  redis.call('RPUSH', key('claimed', worker), unpack(claimed))
  redis.call('PEXPIRE', key('claimed', worker), LIFETIME.claimed)
  redis.call('HSET', key('swept'), 'lease', lease_ms)
  redis.call('PEXPIRE', key('swept'), LIFETIME.swept)
end
save_jobs()
return {'leases', unpack(leases)}

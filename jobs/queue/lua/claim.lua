-- Lease the next images of a model to a worker, in the order of order.lua.
--
-- ARGV: 1 model   2 worker   3 limit, images   4 limit, pixels in all   5 lease, ms
--       6, 7 preferred width and height, or ''   8 linger, ms   9 nonce   10 random part of tokens
--       11 '', or the priority from which on jobs may be joined   12... job:index that the worker
--       holds now
-- Returns {'leases', {job, index, token, attempt, stalls, priority, request, trace, age in ms}...},
-- or {'linger', ms to wait}.
--
-- Safe to repeat. The same nonce returns the same leases, if they still stand. Another nonce gives
-- back those of the last claim that the worker does not hold: their reply was lost.
-- An image that has stalled before comes alone. A first image comes whatever its pixels, if the
-- worker holds nothing. An image that the worker still believes to hold is not leased to it.

local LOOK = 4        -- tenants, and jobs of each, among which to find the preferred size
local SLACK = 4       -- images by whose cost a preferred one may overtake
local PROMOTED = 64   -- delayed jobs looked at
local JOINED = 8      -- tenants, and jobs of each, among which to find one to join

local model, worker, limit = ARGV[1], ARGV[2], tonumber(ARGV[3])
local pixels_left, lease_ms = tonumber(ARGV[4]), tonumber(ARGV[5])
local width, height = tonumber(ARGV[6]), tonumber(ARGV[7])
local joins_from = tonumber(ARGV[11])
local holds, holds_any, holds_of = {}, #ARGV > 11, {}
for place = 12, #ARGV do
  holds[ARGV[place]] = true
  holds_of[split(ARGV[place])] = true
end

local leases, remembered = {}, {ARGV[9]}

local function hand_over(job, index, record, body)
  redis.call('ZADD', key('leases'), NOW + lease_ms, image_key(job, index))
  leases[#leases + 1] = {job.id, index, record.token, record.attempt, record.stalls,
    job.priority, body, job.trace or '', math.max(0, NOW - job.created)}
  remembered[#remembered + 1] = image_key(job, index)
  remembered[#remembered + 1] = record.token
end

-- Return again, or give back, what the last claim leased.
local function look_back()
  local last = redis.call('LRANGE', key('claimed', worker), 0, -1)
  for place = 2, #last, 2 do
    local id, index = split(last[place])
    local job, record = held_image(id, index, last[place + 1])
    local request = job and request_of(job, index)
    if request and last[1] == ARGV[9] then
      hand_over(job, index, record, request.body)
    elseif job and not holds[last[place]] then
      record.attempt = record.attempt - 1
      requeue(job, index, record, 0)
    end
  end
end

-- The priority to serve next: the highest, where one that has waited long counts as higher.
local function next_priority()
  local found, best, best_rank = depths(model), nil, nil
  for place, priority in ipairs(PRIORITIES) do
    if found[place] > 0 then
      local served = tonumber(redis.call('HGET', key('times'), band_name(model, priority)) or NOW)
      local rank = tonumber(priority) + (NOW - served) / AGEING_MS
      if not best or rank > best_rank then best, best_rank = priority, rank end
    end
  end
  return best
end

-- The job's next image, or nil if there is none after all. A job whose requests are gone, as from a
-- server that evicts, is cancelled: nobody can make its images, and its tenant's quota must not stay.
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

-- The image to lease next in a band, or nil when the band held only jobs that are gone.
local function choose(priority)
  local ready, head, first_tag = key('ready', model, priority), nil, nil
  local look = width and LOOK - 1 or 0
  local tenants = redis.call('ZRANGE', ready, 0, look, 'WITHSCORES')
  for t = 1, #tenants, 2 do
    local jobs = redis.call('ZRANGE', key('fair', model, priority, tenants[t]), 0, look, 'WITHSCORES')
    for j = 1, #jobs, 2 do
      local image = peek(jobs[j])
      if not image then return nil end
      head = head or image
      local ahead = math.max(tenants[t + 1] - tenants[2], jobs[j + 1] - jobs[2])
      local is_near = ahead <= SLACK * image.cost / image.job.weight
      local fits = image.request.width == width and image.request.height == height
      if not width or (fits and is_near) then return image end
    end
  end
  return head
end

-- The first image, in the order of bands, tenants and jobs, of a job of which the worker holds none.
local function choose_to_join()
  local found = depths(model)
  for place, priority in ipairs(PRIORITIES) do
    if found[place] > 0 and tonumber(priority) >= joins_from then
      for _, tenant in ipairs(redis.call('ZRANGE', key('ready', model, priority), 0, JOINED - 1)) do
        local fair = key('fair', model, priority, tenant)
        for _, id in ipairs(redis.call('ZRANGE', fair, 0, JOINED - 1)) do
          local image = not holds_of[id] and peek(id)
          if image then return image end
        end
      end
    end
  end
end

local function take(image, record)
  local job, index = image.job, image.index
  if record.token == '' and not job.retried then
    tally_wait(job.model, math.max(0, NOW - job.created))
  end
  record.state, record.worker = 'running', worker
  record.token = string.format('%d-%s', redis.call('INCR', key('fence')), ARGV[10])
  record.attempt = record.attempt + 1
  put_record(job, index, record)
  redis.call('HSET', key('steps', job.id), index, 0)
  if image.is_again then redis.call('ZREM', key('again', job.id), index) else job.next = index + 1 end
  redis.call('HSET', key('times'), band_name(model, job.priority), NOW)
  charge(job, image.cost)
  withdraw(job, 1)
  move(job, 'queued', 'running', 1)
  job.started = job.started or NOW
  hand_over(job, index, record, image.request.body)
end

-- Lease up to the limits.
local function fill()
  while #leases < limit do
    local priority = next_priority()
    if not priority then return end
    local image = choose(priority)
    if not image then
      recount(model, priority)
    else
      local record = record_of(image.job, image.index)
      local pixels = image.request.width * image.request.height
      local is_first = #leases == 0
      local is_too_much = pixels > pixels_left and not (is_first and not holds_any)
      local is_solo = record.stalls > 0
      if is_too_much or (is_solo and not is_first) then return end
      if holds[image_key(image.job, image.index)] then return end
      take(image, record)
      pixels_left = pixels_left - pixels
      if is_solo then return end
    end
  end
end

-- Lease up to the limit of jobs that the worker does not have yet.
local function join()
  while #leases < limit do
    local image = choose_to_join()
    local record = image and record_of(image.job, image.index)
    if not image or record.stalls > 0 then return end
    take(image, record)
  end
end

promote(PROMOTED)
look_back()
if #leases == 0 and joins_from then
  join()
elseif #leases == 0 then
  local _, depth = depths(model)
  local since = tonumber(redis.call('HGET', key('times'), model) or NOW)
  local linger = since + tonumber(ARGV[8]) - NOW
  if depth > 0 and depth < limit and linger > 0 then
    save_jobs()
    return {'linger', linger}
  end
  fill()
end

redis.call('DEL', key('claimed', worker))
if #leases > 0 then
  redis.call('RPUSH', key('claimed', worker), unpack(remembered))
  redis.call('PEXPIRE', key('claimed', worker), LIFETIME.claimed)
  redis.call('HSET', key('swept'), 'lease', lease_ms)
  redis.call('PEXPIRE', key('swept'), LIFETIME.swept)
end
save_jobs()
return {'leases', unpack(leases)}

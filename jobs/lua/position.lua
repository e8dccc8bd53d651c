-- How many images go before a job's next and before its last ready one, if nobody joins.
--
-- In its tenant, the job's k-th image is claimed at tag + (k - 1) x cost; of another job go first
-- those with a lower tag (start, start + cost, ...). The same again among the tenants, from the
-- tag that ours has by then. A job's images, and a tenant's, are taken to cost their mean, so the
-- answer is exact where costs are equal. Higher bands go first whole; ageing is not foreseen.
--
-- Asked at every poll and every submission, so of a tenant with more than LOOK jobs only those with
-- the lowest tags are looked at; the others are taken to be alike, and to have our tag: the tags of a
-- tenant's jobs lie within an image of each other.
--
-- ARGV: 1 job
-- Returns {before the next, before the last, pixel-steps of others before the last (a text)}, or {}
-- if none of its images is ready.

local LOOK = 32

local us = job_of(ARGV[1])
if not us or us.waiting == 0 then return {} end
local ready, load = key('ready', us.model, us.priority), key('load', us.model, us.priority)
local fair = key('fair', us.model, us.priority, us.tenant)
local jobs = redis.call('ZRANGE', fair, 0, LOOK - 1, 'WITHSCORES')
local tenants = redis.call('ZRANGE', ready, 0, -1, 'WITHSCORES')

-- Of `count` images at tag, tag + cost, ..., how many come before `mark`; `is_first` wins ties.
local function before(mark, tag, cost, count, is_first)
  if tag > mark then return 0 end
  local passed = (mark - tag) / cost
  local many = is_first and math.floor(passed) + 1 or math.ceil(passed)
  return math.min(many, count)
end

local others, own_tenant_tag = {}, 0
local own_tag = tonumber(redis.call('ZSCORE', fair, us.id) or 0)
local seen = 0 -- ready images of the jobs looked at
for place = 1, #jobs, 2 do
  local id, tag = jobs[place], tonumber(jobs[place + 1])
  if id ~= us.id then
    local found = redis.call('HMGET', key('job', id), 'waiting', 'cost', 'weight')
    if found[1] then
      others[#others + 1] = {id = id, tag = tag, cost = found[2] / found[3], weight = found[3],
        count = tonumber(found[1])}
      seen = seen + found[1]
    end
  end
end
local rivals = {}
for place = 1, #tenants, 2 do
  local tenant = tenants[place]
  if tenant == us.tenant then
    own_tenant_tag = tonumber(tenants[place + 1])
  else
    local found = redis.call('HMGET', load, 'n:' .. tenant, 'c:' .. tenant)
    local count, cost = tonumber(found[1] or 0), tonumber(found[2] or 0)
    if count > 0 and cost > 0 then
      local first = redis.call('ZRANGE', key('fair', us.model, us.priority, tenant), 0, 0)[1]
      local weight = first and redis.call('HGET', key('job', first), 'weight') or 1
      rivals[#rivals + 1] = {id = tenant, tag = tonumber(tenants[place + 1]),
        cost = cost / count, weight = tonumber(weight), count = count}
    end
  end
end

-- The jobs that were not looked at: how many, and an average one of them.
local unseen = math.max(0, redis.call('ZCARD', fair) - #jobs / 2)
if redis.call('ZRANK', fair, us.id) >= LOOK then unseen = unseen - 1 end
local average = {tag = own_tag, count = 1, cost = us.cost / us.weight, weight = us.weight}
if unseen > 0 then
  local found = redis.call('HMGET', load, 'n:' .. us.tenant, 'c:' .. us.tenant)
  local ready_images, ready_cost = tonumber(found[1] or 0), tonumber(found[2] or 0)
  average.count = math.max(1, (ready_images - us.waiting - seen) / unseen)
  if ready_images > 0 then average.cost = ready_cost / ready_images end
end

-- Images that the jobs not looked at have before `mark`: those in front of us win ties.
local function unseen_before(mark)
  if unseen == 0 then return 0 end
  local front = math.max(0, redis.call('ZRANK', fair, us.id) - #jobs / 2)
  local tag, cost, count = average.tag, average.cost, average.count
  return front * before(mark, tag, cost, count, true)
    + (unseen - front) * before(mark, tag, cost, count, false)
end

local higher, higher_work = 0, 0
for place, depth in ipairs((depths(us.model))) do
  if tonumber(PRIORITIES[place]) > us.priority and depth > 0 then
    higher = higher + depth
    local found = redis.call('HGETALL', key('load', us.model, PRIORITIES[place]))
    for at = 1, #found, 2 do
      if string.sub(found[at], 1, 2) == 'c:' then higher_work = higher_work + found[at + 1] end
    end
  end
end

local function ahead_of(nth)
  local own_cost = us.cost / us.weight
  local spent = (nth - 1) * own_cost
  local mark, many, paid, work = own_tag + spent, nth - 1 + higher, spent, higher_work
  for _, job in ipairs(others) do
    local first = before(mark, job.tag, job.cost, job.count, job.id < us.id)
    many, paid = many + first, paid + first * job.cost
    work = work + first * job.cost * job.weight
  end
  local rest = unseen_before(mark)
  many, paid = many + rest, paid + rest * average.cost
  work = work + rest * average.cost * average.weight
  for _, rival in ipairs(rivals) do
    local first =
      before(own_tenant_tag + paid, rival.tag, rival.cost, rival.count, rival.id < us.tenant)
    many, work = many + first, work + first * rival.cost * rival.weight
  end
  return math.floor(many), work
end

local first = ahead_of(1)
local last, work = ahead_of(us.waiting)
return {first, last, string.format('%.0f', work)}

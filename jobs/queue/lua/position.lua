-- How many images go before a job's next and before its last ready one, if nobody joins.
--
-- In its tenant, the job's k-th image is claimed at tag + (k - 1) x cost; of another job go first
-- those with a lower tag (start, start + cost, ...). The same again among the tenants, from the
-- tag that ours has by then. A job's images, and a tenant's, are taken to cost their mean, so the
-- answer is exact where costs are equal. Higher bands go first whole; ageing is not foreseen.
--
-- Asked at every poll and every submission, so of more than LOOK jobs of the tenant, and of more than
-- LOOK tenants, only those with the lowest tags are looked at. The others are a crowd: alike, and with
-- our tag, since tags in one zset lie within an image of each other. Beyond LOOK the answer is
-- therefore exact only where the others hold alike too, and else right on average; so is the work of
-- a higher band.
--
-- ARGV: 1 job
-- Returns {before the next, before the last, pixel-steps of others before the last (a text)}, or {}
-- if none of its images is ready.

local LOOK = 32

local us = job_of(ARGV[1])
if not us or us.waiting == 0 then return {} end
local ready, load = key('ready', us.model, us.priority), key('load', us.model, us.priority)
local fair = key('fair', us.model, us.priority, us.tenant)
local own_cost = us.cost / us.weight
local depth_of = depths(us.model)

-- Of `count` images at tag, tag + cost, ..., how many come before `mark`; `is_first` wins ties.
local function before(mark, tag, cost, count, is_first)
  if tag > mark then return 0 end
  local passed = (mark - tag) / cost
  local many = is_first and math.floor(passed) + 1 or math.ceil(passed)
  return math.min(many, count)
end

-- Ready images of a tenant, and what they cost.
local function load_of(load, tenant)
  local found = redis.call('HMGET', load, 'n:' .. tenant, 'c:' .. tenant)
  return tonumber(found[1] or 0), tonumber(found[2] or 0)
end

-- Those in `zset` but us: those looked at, how many images they have, what these cost and what work
-- they are, and how many there are beyond LOOK, of them `front` before us. `describe` returns a
-- member's count, cost and weight.
local function look_at(zset, own_id, describe)
  local lowest = redis.call('ZRANGE', zset, 0, LOOK - 1, 'WITHSCORES')
  local rank = redis.call('ZRANK', zset, own_id)
  local found = {own_id = own_id, own_tag = tonumber(redis.call('ZSCORE', zset, own_id) or 0),
    count = 0, cost = 0, work = 0, front = rank and math.max(0, rank - LOOK) or 0,
    beyond = redis.call('ZCARD', zset) - #lowest / 2}
  if rank and rank >= LOOK then found.beyond = found.beyond - 1 end
  for place = 1, #lowest, 2 do
    local count, cost, weight = 0, 0, 1
    if lowest[place] ~= own_id then count, cost, weight = describe(lowest[place]) end
    if count > 0 and cost > 0 then
      found[#found + 1] = {id = lowest[place], tag = tonumber(lowest[place + 1]), count = count,
        cost = cost, weight = weight}
      found.count = found.count + count
      found.cost = found.cost + count * cost
      found.work = found.work + count * cost * weight
    end
  end
  return found
end

-- Those beyond LOOK have `images` together, which cost `cost` each.
local function count_beyond(others, images, cost, weight)
  others.each = {count = math.max(1, images / others.beyond), cost = cost, weight = weight}
end

-- Images of the others before `mark`, what their tenants pay for them, and what work they are.
local function before_of(others, mark)
  local many, paid, work = 0, 0, 0
  local function add(images, one)
    many, paid = many + images, paid + images * one.cost
    work = work + images * one.cost * one.weight
  end
  for _, one in ipairs(others) do
    add(before(mark, one.tag, one.cost, one.count, one.id < others.own_id), one)
  end
  local each = others.each
  if each then
    add(others.front * before(mark, others.own_tag, each.cost, each.count, true), each)
    local behind = others.beyond - others.front
    add(behind * before(mark, others.own_tag, each.cost, each.count, false), each)
  end
  return many, paid, work
end

local jobs = look_at(fair, us.id, function(id)
  local found = redis.call('HMGET', key('job', id), 'waiting', 'cost', 'weight')
  if not found[1] then return 0, 0, 1 end
  return tonumber(found[1]), found[2] / found[3], tonumber(found[3])
end)
local own_images, own_load = load_of(load, us.tenant)
if jobs.beyond > 0 then
  local cost = own_images > 0 and own_load / own_images or own_cost
  count_beyond(jobs, own_images - us.waiting - jobs.count, cost, us.weight)
end

local tenants = look_at(ready, us.tenant, function(tenant)
  local images, cost = load_of(load, tenant)
  local first = redis.call('ZRANGE', key('fair', us.model, us.priority, tenant), 0, 0)[1]
  local weight = first and redis.call('HGET', key('job', first), 'weight') or 1
  return images, cost / math.max(1, images), tonumber(weight)
end)
if tenants.beyond > 0 then
  local depth = depth_of[#PRIORITIES - us.priority]
  local cost = tenants.count > 0 and tenants.cost / tenants.count or own_cost
  local weight = tenants.cost > 0 and tenants.work / tenants.cost or 1
  count_beyond(tenants, depth - own_images - tenants.count, cost, weight)
end

-- What the ready images of a higher band cost, by those of the tenants who are next.
local function work_of(priority, depth)
  local load, images, cost = key('load', us.model, priority), 0, 0
  for _, tenant in ipairs(redis.call('ZRANGE', key('ready', us.model, priority), 0, LOOK - 1)) do
    local more, its_cost = load_of(load, tenant)
    images, cost = images + more, cost + its_cost
  end
  return images > 0 and cost * depth / images or 0
end

local higher, higher_work = 0, 0
for place, depth in ipairs(depth_of) do
  if tonumber(PRIORITIES[place]) > us.priority and depth > 0 then
    higher = higher + depth
    higher_work = higher_work + work_of(PRIORITIES[place], depth)
  end
end

local function ahead_of(nth)
  local spent = (nth - 1) * own_cost
  local of_jobs, paid, work = before_of(jobs, jobs.own_tag + spent)
  local of_tenants, _, rivals_work = before_of(tenants, tenants.own_tag + spent + paid)
  return math.floor(nth - 1 + higher + of_jobs + of_tenants), higher_work + work + rivals_work
end

local first = ahead_of(1)
local last, work = ahead_of(us.waiting)
return {first, last, string.format('%.0f', work)}

-- How many images go before a job's next image and before its last ready one, if no job joins.
--
-- ARGV: 1 job
-- Returns {before the next, before the last, others' pixel-steps before the last (as text)}, or {}
-- if none of the job's images is ready.
--
-- Writes nothing.
--
-- Within its tenant, the job's k-th image is claimed at tag + (k - 1) x cost. Before it go the
-- images of other jobs whose tags (start, start + cost, ...) are lower. The same holds among the
-- tenants, from the tag that ours has by then. A job's images, and a tenant's, are assumed to cost
-- their mean, so the answer is exact if costs are equal. All images of higher priorities go first;
-- ageing isn't predicted.
--
-- Every poll and every submit runs this, so it reads only the LOOK jobs and the LOOK tenants with
-- the lowest tags. The rest are approximated: treated as identical, with our own tag, because the
-- tags in one zset are within an image's cost of each other. Beyond LOOK the answer is therefore
-- exact only if the rest have equal numbers of images, and right on average otherwise. The same
-- goes for the work of higher priorities.

local LOOK = 32

local own_job = job_of(ARGV[1])
if not own_job or own_job.waiting == 0 then return {} end
local model, own_priority, own_tenant = own_job.model, own_job.priority, own_job.tenant
local ready, load = key('ready', model, own_priority), key('load', model, own_priority)
local fair = key('fair', model, own_priority, own_tenant)
local own_cost = own_job.cost / own_job.weight
local band_depths = depths(model)

-- Of `count` images at tag, tag + cost, ..., how many come before `mark`; `wins_ties` counts one at
-- exactly `mark` too. Ties are common: jobs that start together have equal tags, ordered by name.
local function images_before(mark, tag, cost, count, wins_ties)
  if tag > mark then return 0 end
  local distance = (mark - tag) / cost -- in images
  local passed = wins_ties and math.floor(distance) + 1 or math.ceil(distance)
  return math.min(passed, count)
end

-- A tenant's ready images, and what they cost.
local function load_of(load_key, tenant)
  local counts = redis.call('HMGET', load_key, 'n:' .. tenant, 'c:' .. tenant)
  return tonumber(counts[1] or 0), tonumber(counts[2] or 0)
end

-- The LOOK members of `zset` with the lowest tags, without our own, and totals over them: `count`
-- images, their `cost` and their `work` in pixel-steps. `unread` is how many members lie beyond
-- LOOK, `unread_before` how many of them are before us. `describe` returns a member's number of
-- images, cost per image and weight.
local function read_lowest(zset, own_id, describe)
  local lowest = redis.call('ZRANGE', zset, 0, LOOK - 1, 'WITHSCORES')
  local rank = redis.call('ZRANK', zset, own_id)
  local members = {own_id = own_id, own_tag = tonumber(redis.call('ZSCORE', zset, own_id) or 0),
    count = 0, cost = 0, work = 0, unread_before = rank and math.max(0, rank - LOOK) or 0,
    unread = redis.call('ZCARD', zset) - #lowest / 2}
  -- Our own member isn't one of the others, so don't count it among the unread ones either.
  if rank and rank >= LOOK then members.unread = members.unread - 1 end
  for i = 1, #lowest, 2 do
    local count, cost, weight = 0, 0, 1
    if lowest[i] ~= own_id then count, cost, weight = describe(lowest[i]) end
    if count > 0 and cost > 0 then
      members[#members + 1] = {id = lowest[i], tag = tonumber(lowest[i + 1]), count = count,
        cost = cost, weight = weight}
      members.count = members.count + count
      members.cost = members.cost + count * cost
      members.work = members.work + count * cost * weight
    end
  end
  return members
end

-- Describe the unread members by their average: they have `images` together, at `cost` each. At
-- least one each, because a member without ready images wouldn't be in the zset.
local function set_average(members, images, cost, weight)
  members.average = {count = math.max(1, images / members.unread), cost = cost, weight = weight}
end

-- How many images of `members` come before `mark`, their cost, and their work in pixel-steps.
local function totals_before(members, mark)
  local images, cost, work = 0, 0, 0
  local function add(count, member)
    images, cost = images + count, cost + count * member.cost
    work = work + count * member.cost * member.weight
  end
  for _, member in ipairs(members) do
    local wins_ties = member.id < members.own_id
    add(images_before(mark, member.tag, member.cost, member.count, wins_ties), member)
  end
  local average = members.average
  if average then
    -- At our own tag, the members before us in the zset win every tie, those behind us none.
    local of_one_before =
      images_before(mark, members.own_tag, average.cost, average.count, true)
    add(members.unread_before * of_one_before, average)
    local unread_behind = members.unread - members.unread_before
    local of_one_behind =
      images_before(mark, members.own_tag, average.cost, average.count, false)
    add(unread_behind * of_one_behind, average)
  end
  return images, cost, work
end

local jobs = read_lowest(fair, own_job.id, function(id)
  local fields = redis.call('HMGET', key('job', id), 'waiting', 'cost', 'weight')
  if not fields[1] then return 0, 0, 1 end
  return tonumber(fields[1]), fields[2] / fields[3], tonumber(fields[3])
end)
local own_images, own_load = load_of(load, own_tenant)
if jobs.unread > 0 then
  -- The tenant's totals are known exactly, so the unread jobs have what the read ones don't.
  local cost = own_images > 0 and own_load / own_images or own_cost
  set_average(jobs, own_images - own_job.waiting - jobs.count, cost, own_job.weight)
end

local tenants = read_lowest(ready, own_tenant, function(tenant)
  local images, cost = load_of(load, tenant)
  -- The weight of the tenant's first job stands for all of them: reading each would cost too much.
  local first = redis.call('ZRANGE', key('fair', model, own_priority, tenant), 0, 0)[1]
  local weight = first and redis.call('HGET', key('job', first), 'weight') or 1
  return images, cost / math.max(1, images), tonumber(weight)
end)
if tenants.unread > 0 then
  local depth = band_depths[#PRIORITIES - own_priority] -- PRIORITIES begins with 9
  local cost = tenants.count > 0 and tenants.cost / tenants.count or own_cost
  local weight = tenants.cost > 0 and tenants.work / tenants.cost or 1
  set_average(tenants, depth - own_images - tenants.count, cost, weight)
end

-- The work of a higher priority's ready images, extrapolated from the tenants who are next.
local function work_of(priority, depth)
  local band_load, images, cost = key('load', model, priority), 0, 0
  for _, tenant in ipairs(redis.call('ZRANGE', key('ready', model, priority), 0, LOOK - 1)) do
    local tenant_images, tenant_cost = load_of(band_load, tenant)
    images, cost = images + tenant_images, cost + tenant_cost
  end
  return images > 0 and cost * depth / images or 0
end

local higher, higher_work = 0, 0
for i, depth in ipairs(band_depths) do
  if tonumber(PRIORITIES[i]) > own_priority and depth > 0 then
    higher = higher + depth
    higher_work = higher_work + work_of(PRIORITIES[i], depth)
  end
end

-- What goes before the job's `nth` ready image: images, and others' work in pixel-steps.
local function ahead_of(nth)
  local own_spent = (nth - 1) * own_cost
  local of_jobs, spent, jobs_work = totals_before(jobs, jobs.own_tag + own_spent)
  -- By then the tenant has paid for our earlier images and for its other jobs', so its tag has
  -- risen by both: that is the mark that other tenants are compared with.
  local of_tenants, _, tenants_work = totals_before(tenants, tenants.own_tag + own_spent + spent)
  local images = math.floor(nth - 1 + higher + of_jobs + of_tenants)
  return images, higher_work + jobs_work + tenants_work
end

local before_next = ahead_of(1)
local before_last, work = ahead_of(own_job.waiting)
return {before_next, before_last, string.format('%.0f', work)}

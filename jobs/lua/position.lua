-- How many images go before a job's next and before its last ready one, if nobody joins.
--
-- In its tenant, the job's k-th image is claimed at tag + (k - 1) x cost; of another job go first
-- those with a lower tag (start, start + cost, ...). The same again among the tenants, from the
-- tag that ours has by then. A job's images, and a tenant's, are taken to cost their mean, so the
-- answer is exact where costs are equal. Higher bands go first whole; ageing is not foreseen.
--
-- ARGV: 1 job
-- Returns {before the next, before the last}, or {} if none of its images is ready.

local us = job_of(ARGV[1])
if not us or us.waiting == 0 then return {} end
local ready, load = key('ready', us.model, us.priority), key('load', us.model, us.priority)
local fair = key('fair', us.model, us.priority, us.tenant)
local jobs = redis.call('ZRANGE', fair, 0, -1, 'WITHSCORES')
local tenants = redis.call('ZRANGE', ready, 0, -1, 'WITHSCORES')

-- Of `count` images at tag, tag + cost, ..., how many come before `mark`; `is_first` wins ties.
local function before(mark, tag, cost, count, is_first)
  if tag > mark then return 0 end
  local passed = (mark - tag) / cost
  local many = is_first and math.floor(passed) + 1 or math.ceil(passed)
  return math.min(many, count)
end

local others, own_tag, own_tenant_tag = {}, 0, 0
for place = 1, #jobs, 2 do
  local id, tag = jobs[place], tonumber(jobs[place + 1])
  if id == us.id then
    own_tag = tag
  else
    local found = redis.call('HMGET', key('job', id), 'waiting', 'cost', 'weight')
    if found[1] then
      others[#others + 1] = {id = id, tag = tag, cost = found[2] / found[3],
        count = tonumber(found[1])}
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
      rivals[#rivals + 1] = {id = tenant, tag = tonumber(tenants[place + 1]),
        cost = cost / count, count = count}
    end
  end
end

local higher = 0
for place, depth in ipairs((depths(us.model))) do
  if tonumber(PRIORITIES[place]) > us.priority then higher = higher + depth end
end

local function ahead_of(nth)
  local own_cost = us.cost / us.weight
  local spent = (nth - 1) * own_cost
  local mark, many, paid = own_tag + spent, nth - 1 + higher, spent
  for _, job in ipairs(others) do
    local first = before(mark, job.tag, job.cost, job.count, job.id < us.id)
    many, paid = many + first, paid + first * job.cost
  end
  for _, rival in ipairs(rivals) do
    many = many
      + before(own_tenant_tag + paid, rival.tag, rival.cost, rival.count, rival.id < us.tenant)
  end
  return many
end

return {ahead_of(1), ahead_of(us.waiting)}

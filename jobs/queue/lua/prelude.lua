-- Shared by every script, and prepended to it: keys, the clock, jobs, image records, events.
--
-- KEYS[1] is the pool's prefix; all other names are made from it, in the same hash slot.
-- A script changes a job through the table that `job_of` returns and ends with `save_jobs()`.
-- Numbers are made text by redis.call (17 digits); never by `..`, which keeps 14 only.

local function key(name, ...)
  return KEYS[1] .. string.format(NAME[name], ...)
end

local TIME = redis.call('TIME')
local MICROSECONDS = TIME[1] * 1000000 + TIME[2]
local NOW = math.floor(MICROSECONDS / 1000) -- milliseconds, as all times but a job's creation

-- Jobs --------------------------------------------------------------------------------------

-- retried: when somebody had images run again, what tells that move from others.
local TEXTS = {'tenant', 'model', 'state', 'trace', 'retried'}
-- next: the first index never claimed. waiting: ready to be claimed, a part of queued; the other
-- part is delayed. cut: where a cancel cut the untouched images off (nil mostly). cost: the mean
-- image's pixel-steps. told: when the last event was sent.
local NUMBERS = {'priority', 'weight', 'total', 'next', 'cut', 'waiting', 'queued', 'running',
  'succeeded', 'failed', 'cancelled', 'steps_total', 'steps_done', 'cost', 'created', 'keep', 'max_attempts',
  'max_stalls', 'started', 'finished', 'expires', 'told', 'version'}
-- The numbers that scripts change, and so write back.
local CHANGING = {'next', 'cut', 'waiting', 'queued', 'running', 'succeeded', 'failed', 'cancelled',
  'steps_done', 'started', 'finished', 'expires', 'told', 'version'}

local loaded, in_order = {}, {}

-- The job of that id, or nil. Loaded once a script: every caller sees the same table.
local function job_of(id)
  if loaded[id] ~= nil then return loaded[id] or nil end
  local names = {}
  for _, name in ipairs(TEXTS) do names[#names + 1] = name end
  for _, name in ipairs(NUMBERS) do names[#names + 1] = name end
  local values = redis.call('HMGET', key('job', id), unpack(names))
  if not values[1] then
    loaded[id] = false
    return nil
  end
  local job = {id = id}
  for place, name in ipairs(names) do
    local value = values[place]
    if value then job[name] = place <= #TEXTS and value or tonumber(value) end
  end
  loaded[id] = job
  in_order[#in_order + 1] = job
  return job
end

-- The same, but nil also for a tenant who does not own it; '' owns everything.
local function job_owned_by(tenant, id)
  local job = job_of(id)
  if job and (tenant == '' or job.tenant == tenant) then return job end
  return nil
end

-- Events ------------------------------------------------------------------------------------

local PROGRESS_EVERY_MS = 250

local function emit(job, kind, index, data)
  redis.call('XADD', key('events'), 'MAXLEN', '~', BOUND.events, '*',
    'job', job.id, 'type', kind, 'index', index or '', 'data', data and cjson.encode(data) or '')
  job.told = NOW
end

-- Counts ------------------------------------------------------------------------------------

local UNFINISHED = {queued = true, running = true}

-- Count images of a tenant as unfinished, or no longer. Its list of jobs lives on while any are.
local function change_quota(tenant, by)
  if by == 0 then return end
  local index = key('jobs', tenant)
  local left = redis.call('HINCRBY', key('quota'), tenant, by)
  if left > 0 then
    redis.call('PERSIST', index)
  else
    redis.call('HDEL', key('quota'), tenant)
    redis.call('PEXPIRE', index, LIFETIME.jobs)
  end
end

-- Count `many` images of the job as having gone from one state to another.
local function move(job, from, to, many)
  job[from] = job[from] - many
  job[to] = job[to] + many
  job.changed = true
  if UNFINISHED[from] and not UNFINISHED[to] then change_quota(job.tenant, -many) end
  if UNFINISHED[to] and not UNFINISHED[from] then change_quota(job.tenant, many) end
end

-- jobs/job.py: job_state says the same.
local function state_of(job)
  if job.succeeded + job.failed + job.cancelled == job.total then
    if job.failed > 0 then return 'failed' end
    return job.cancelled > 0 and 'cancelled' or 'succeeded'
  end
  return job.queued == job.total and 'queued' or 'running'
end

-- Tallies -----------------------------------------------------------------------------------

-- What happens is counted for those who watch the pool: `what` of a model, so many more.
local tallied, tallied_in_order = {}, {}

local function tally(what, model, by)
  local name = string.format('%s:%s', what, model)
  if not tallied[name] then tallied_in_order[#tallied_in_order + 1] = name end
  tallied[name] = (tallied[name] or 0) + by
end

-- An image was claimed for the first time after so many milliseconds.
local function tally_wait(model, waited)
  for _, bound in ipairs(WAITS) do
    if waited <= bound then tally(string.format('wait_%d', bound), model, 1) end
  end
  tally('waits', model, 1)
  tally('waited_ms', model, waited)
end

-- Saving ------------------------------------------------------------------------------------

local KEPT = {'job', 'requests', 'images'}

local function begin_to_expire(job)
  job.steps_done = job.steps_total
  job.finished = NOW
  job.expires = NOW + job.keep
  redis.call('ZADD', key('gc'), job.expires, job.id)
  for _, name in ipairs(KEPT) do
    redis.call('PEXPIRE', key(name, job.id), job.keep + LIFETIME.job_grace)
  end
end

local function no_longer_expire(job)
  job.finished, job.expires = nil, nil
  redis.call('ZREM', key('gc'), job.id)
  for _, name in ipairs(KEPT) do redis.call('PERSIST', key(name, job.id)) end
end

local function write_back(job)
  local given, gone = {'state', job.state}, {}
  for _, name in ipairs(CHANGING) do
    if job[name] == nil then
      gone[#gone + 1] = name
    else
      given[#given + 1] = name
      given[#given + 1] = job[name]
    end
  end
  redis.call('HSET', key('job', job.id), unpack(given))
  if #gone > 0 then redis.call('HDEL', key('job', job.id), unpack(gone)) end
end

-- Write the jobs back. What a caller can see of one changed if `changed`: then its version rises,
-- its state follows from its counts, and an event tells of it.
local function save_job(job)
  if job.changed then
    job.version = job.version + 1
    local state = state_of(job)
    local is_over = not UNFINISHED[state]
    if is_over and not job.finished then begin_to_expire(job) end
    if job.finished and not is_over then no_longer_expire(job) end
    if state ~= job.state then
      job.state = state
      emit(job, state)
    elseif NOW - (job.told or 0) >= PROGRESS_EVERY_MS then
      emit(job, 'progress')
    end
  end
  if job.changed or job.moved then write_back(job) end
end

local function save_jobs()
  for _, job in ipairs(in_order) do save_job(job) end
  for _, name in ipairs(tallied_in_order) do
    redis.call('HINCRBY', key('tallies'), name, tallied[name])
  end
end

-- Images ------------------------------------------------------------------------------------

-- The job id and the index in `job:index`.
local function split(image)
  local id, index = string.match(image, '^(.+):(%d+)$')
  return id, tonumber(index)
end

local function image_key(job, index)
  return string.format('%s:%d', job.id, index)
end

-- state, token, worker, attempt, stalls; result, error and step once it is over.
local function record_of(job, index)
  local text = redis.call('HGET', key('images', job.id), index)
  if text then return cjson.decode(text) end
  return {state = 'queued', token = '', attempt = 0, stalls = 0}
end

local function put_record(job, index, record)
  redis.call('HSET', key('images', job.id), index, cjson.encode(record))
end

-- The job and the record if `token` is the image's current lease, else nil. The third value is
-- what the record says of the token otherwise: its state if it held the image last, or 'stale'.
local function held_image(id, index, token)
  local job = job_of(id)
  if not job then return nil, nil, 'stale' end
  local record = record_of(job, index)
  if token == '' or record.token ~= token then return nil, nil, 'stale' end
  if record.state ~= 'running' then return nil, nil, record.state end
  return job, record, 'running'
end

-- Width, height, steps and JSON of a request, or nil.
local function request_of(job, index)
  local text = redis.call('LINDEX', key('requests', job.id), index)
  if not text then return nil end
  local width, height, steps, body = string.match(text, '^(%d+) (%d+) (%d+)\n(.*)$')
  return {width = tonumber(width), height = tonumber(height), steps = tonumber(steps), body = body}
end

-- The image's lease is over: nobody beats for it any more. Returns its last step.
local function end_lease(job, index)
  local step = tonumber(redis.call('HGET', key('steps', job.id), index) or 0)
  redis.call('HDEL', key('steps', job.id), index)
  redis.call('ZREM', key('leases'), image_key(job, index))
  return step
end

-- A running image is over, for good: its steps count as done, whole; none are known where a server
-- that evicts has dropped the job's requests.
local function finish_image(job, index, record, state)
  local request = request_of(job, index)
  record.state = state
  record.step = end_lease(job, index)
  put_record(job, index, record)
  job.steps_done = job.steps_done + (request and request.steps or 0)
  move(job, 'running', state, 1)
end

-- Prepended to every script: keys, the clock, jobs, image records, events.
--
-- KEYS[1] is the pool's prefix. All other names are made from it, so they are in one hash slot.
-- A script changes a job through the table that `job_of` returns, and ends with `save_jobs()`.
-- Numbers are passed to redis.call as numbers, because it keeps 17 digits and `..` only 14.
--
-- `save_jobs` writes    what                                          expires
--   job:<id>            hash: the job's changed fields                keep_ms + 1 day after its end
--   job:<id>:requests, :images   nothing, but they get the same TTL   as job:<id>
--   gc                  zset: a finished job, by keep_ms after its end   removed by forget.lua
--   events              stream: the new state, or progress            trimmed to 100,000
--   tallies             hash: what `tally` counted                    never
-- A job's keys go earlier if the collector removes its files (due.lua).

local function key(name, ...)
  return KEYS[1] .. string.format(NAME[name], ...)
end

local TIME = redis.call('TIME')
local MICROSECONDS = TIME[1] * 1000000 + TIME[2]
-- Milliseconds, like all times except those in job ids and in jobs:<tenant>.
local NOW = math.floor(MICROSECONDS / 1000)

-- Jobs --------------------------------------------------------------------------------------

-- state: only `save_job` sets it. trace: the traceparent. retried: the nonce of the last retry, if
-- any; it makes a repeated retry a no-op.
local TEXTS = {'tenant', 'model', 'state', 'trace', 'retried'}
-- next: the first index that was never claimed. waiting: images ready to be claimed; the other
-- queued ones are delayed. cut: the index from which a cancel cut off untouched images, usually
-- nil. cost: pixel-steps of the mean image. keep: ms that the job outlives its end. told: when its
-- last event was sent.
local NUMBERS = {'priority', 'weight', 'total', 'next', 'cut', 'waiting', 'queued', 'running',
  'succeeded', 'failed', 'cancelled', 'steps_total', 'steps_done', 'cost', 'created', 'keep',
  'max_attempts', 'max_stalls', 'started', 'finished', 'expires', 'told', 'version'}
-- The numbers that scripts change and write back.
local CHANGING = {'next', 'cut', 'waiting', 'queued', 'running', 'succeeded', 'failed', 'cancelled',
  'steps_done', 'started', 'finished', 'expires', 'told', 'version'}

local loaded, in_order = {}, {}

-- The job with that id, or nil. It's loaded once per script, so every caller sees the same table.
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
  for i, name in ipairs(names) do
    local value = values[i]
    if value then job[name] = i <= #TEXTS and value or tonumber(value) end
  end
  loaded[id] = job
  in_order[#in_order + 1] = job
  return job
end

-- The same, but nil for a tenant that doesn't own it; the tenant '' owns everything.
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

-- Change a tenant's count of unfinished images. Its list of jobs only expires while there are none.
local function change_quota(tenant, by)
  if by == 0 then return end
  local jobs = key('jobs', tenant)
  local unfinished = redis.call('HINCRBY', key('quota'), tenant, by)
  if unfinished > 0 then
    redis.call('PERSIST', jobs)
  else
    redis.call('HDEL', key('quota'), tenant)
    redis.call('PEXPIRE', jobs, LIFETIME.jobs)
  end
end

-- Record that `count` images of the job went from one state to another.
local function move(job, from, to, count)
  job[from] = job[from] - count
  job[to] = job[to] + count
  job.changed = true
  if UNFINISHED[from] and not UNFINISHED[to] then change_quota(job.tenant, -count) end
  if UNFINISHED[to] and not UNFINISHED[from] then change_quota(job.tenant, count) end
end

-- The same rule as `job_state` in jobs/job.py.
local function state_of(job)
  if job.succeeded + job.failed + job.cancelled == job.total then
    if job.failed > 0 then return 'failed' end
    return job.cancelled > 0 and 'cancelled' or 'succeeded'
  end
  return job.queued == job.total and 'queued' or 'running'
end

-- Tallies -----------------------------------------------------------------------------------

-- Counters for the metrics, per kind (`what`) and model. `save_jobs` adds them up in Redis, in a
-- fixed order.
local tallied, tallied_in_order = {}, {}

local function tally(what, model, by)
  local name = string.format('%s:%s', what, model)
  if not tallied[name] then tallied_in_order[#tallied_in_order + 1] = name end
  tallied[name] = (tallied[name] or 0) + by
end

-- Count an image's first claim, after it waited for `waited` ms.
local function tally_wait(model, waited)
  for _, bound in ipairs(WAITS) do
    if waited <= bound then tally(string.format('wait_%d', bound), model, 1) end
  end
  tally('waits', model, 1)
  tally('waited_ms', model, waited)
end

-- Saving ------------------------------------------------------------------------------------

-- The keys that outlive a job's end; the others are empty by then.
local KEPT = {'job', 'requests', 'images'}

local function begin_to_expire(job)
  -- All count, also those of images whose requests are gone. Cancelled images count as far as they
  -- came.
  if job.cancelled == 0 then job.steps_done = job.steps_total end
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
  local set, removed = {'state', job.state}, {}
  for _, name in ipairs(CHANGING) do
    if job[name] == nil then
      removed[#removed + 1] = name
    else
      set[#set + 1] = name
      set[#set + 1] = job[name]
    end
  end
  redis.call('HSET', key('job', job.id), unpack(set))
  if #removed > 0 then redis.call('HDEL', key('job', job.id), unpack(removed)) end
end

-- Write a job back. `changed` means that something visible to callers changed: its version rises,
-- its state follows from its counts, and an event reports it. `moved` means that only its place in
-- the queue changed.
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

-- An image's record: state, token, worker, attempt, stalls; once it's finished also result, error
-- and step. An image that was never claimed has none, so it gets a new one.
local function record_of(job, index)
  local text = redis.call('HGET', key('images', job.id), index)
  if text then return cjson.decode(text) end
  return {state = 'queued', token = '', attempt = 0, stalls = 0}
end

local function put_record(job, index, record)
  redis.call('HSET', key('images', job.id), index, cjson.encode(record))
end

-- The job and the record if `token` is that of the image's current lease, else nil. In that case
-- the third value is the image's state if `token` was that of its last lease, else 'stale'. Every
-- claim writes a new token (claim.lua), so a worker whose image was claimed again gets 'stale'.
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

-- Remove an image's lease and reported step. Returns the step.
local function end_lease(job, index)
  local step = tonumber(redis.call('HGET', key('steps', job.id), index) or 0)
  redis.call('HDEL', key('steps', job.id), index)
  redis.call('ZREM', key('leases'), image_key(job, index))
  return step
end

-- The steps of a cancelled image that were done, as far as its request has that many. Some
-- schedulers run more. None if an evicting server has dropped the request.
local function steps_made(job, index, record)
  local request = request_of(job, index)
  return request and math.min(record.step or 0, request.steps) or 0
end

-- Move a running image to its final state. All its steps count as done. If an evicting server has
-- dropped the job's requests, their number is unknown and none count.
local function finish_image(job, index, record, state)
  local request = request_of(job, index)
  record.state = state
  record.step = end_lease(job, index)
  put_record(job, index, record)
  job.steps_done = job.steps_done + (request and request.steps or 0)
  move(job, 'running', state, 1)
end

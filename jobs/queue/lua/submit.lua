-- Create a job, whole or not at all. The same Idempotency-Key finds the same job again.
--
-- ARGV: the values listed in `argument` below, then one "WIDTH HEIGHT STEPS\n" + JSON per image.
-- Returns {'created' | 'found', id}, {'mismatch', id} or {'quota', unfinished images}.
--
-- Writes                what                                          expires
--   job:<id>            hash: the job, written back by every move     with the job
--   job:<id>:requests   list: the requests, never written again       with the job
--   once:<digest>       hash: job id and body hash                    after once_ms
--   jobs:<tenant>       zset: the tenant's jobs by creation time      90 days after the last job
--   quota               hash: + the images of the tenant              never; falls as images finish
--   ready, fair, load, depth, times, bell   the job's place in the fair order (order.lua)
--   events              stream: one entry                             trimmed to 100,000
-- "With the job" means keep_ms plus a day after the job ends (`begin_to_expire` in prelude.lua), or
-- earlier if the collector has removed the job's files.

local CHUNK = 1000 -- more values than this aren't safe for Lua's unpack
local FIXED = 17   -- values before the requests

local argument = {
  once_digest = ARGV[1],        -- of tenant and Idempotency-Key
  body_hash = ARGV[2],
  once_ms = ARGV[3],
  id_suffix = ARGV[4],          -- random part of the job's id
  tenant = ARGV[5],
  model = ARGV[6],
  priority = ARGV[7],
  weight = ARGV[8],
  quota = tonumber(ARGV[9]),    -- unfinished images that the tenant may have
  keep_ms = ARGV[10],
  max_attempts = ARGV[11],
  max_stalls = ARGV[12],
  metadata = ARGV[13],
  spec = ARGV[14],
  steps_total = ARGV[15],
  mean_cost = ARGV[16],         -- pixel-steps
  traceparent = ARGV[17],       -- or ''
}

local once = key('once', argument.once_digest)
local earlier = redis.call('HMGET', once, 'job', 'body')
if earlier[1] and redis.call('EXISTS', key('job', earlier[1])) == 1 then
  return {earlier[2] == argument.body_hash and 'found' or 'mismatch', earlier[1]}
end

local total = #ARGV - FIXED
local unfinished = tonumber(redis.call('HGET', key('quota'), argument.tenant) or 0)
if unfinished + total > argument.quota then return {'quota', unfinished} end

local id = string.format('%013x%s', MICROSECONDS, argument.id_suffix)
for first = FIXED + 1, #ARGV, CHUNK do
  local last = math.min(first + CHUNK - 1, #ARGV)
  redis.call('RPUSH', key('requests', id), unpack(ARGV, first, last))
end
redis.call('HSET', key('job', id),
  'tenant', argument.tenant, 'model', argument.model, 'priority', argument.priority,
  'weight', argument.weight, 'state', '', 'keep', argument.keep_ms,
  'max_attempts', argument.max_attempts, 'max_stalls', argument.max_stalls,
  'metadata', argument.metadata, 'spec', argument.spec,
  'steps_total', argument.steps_total, 'steps_done', 0, 'cost', argument.mean_cost,
  'trace', argument.traceparent, 'created', NOW, 'version', 0,
  'total', total, 'next', 0, 'waiting', 0,
  'queued', total, 'running', 0, 'succeeded', 0, 'failed', 0, 'cancelled', 0)
redis.call('HSET', once, 'job', id, 'body', argument.body_hash)
redis.call('PEXPIRE', once, argument.once_ms)
redis.call('ZADD', key('jobs', argument.tenant), MICROSECONDS, id)
change_quota(argument.tenant, total)

local job = job_of(id)
job.changed = true
offer(job, total)
save_jobs()
return {'created', id}

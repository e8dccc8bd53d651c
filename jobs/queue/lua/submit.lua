-- Make a job of requests, whole or not at all; the same Idempotency-Key again finds the same job.
--
-- ARGV: 1 digest of tenant and Idempotency-Key   2 body hash   3 lifetime of 1 and 2, ms
--       4 random part of the id   5 tenant   6 model   7 priority   8 weight
--       9 quota, images   10 keep, ms   11 max attempts   12 max stalls   13 metadata   14 spec
--       15 steps of all images   16 mean cost, pixel-steps   17 traceparent, or ''
--       18... "WIDTH HEIGHT STEPS\n" + JSON
-- Returns {'created' | 'found', id}, {'mismatch', id} or {'quota', unfinished images}.

local CHUNK = 1000 -- values that one call may unpack
local once = key('once', ARGV[1])
local known = redis.call('HMGET', once, 'job', 'body')
if known[1] and redis.call('EXISTS', key('job', known[1])) == 1 then
  return {known[2] == ARGV[2] and 'found' or 'mismatch', known[1]}
end

local total = #ARGV - 17
local unfinished = tonumber(redis.call('HGET', key('quota'), ARGV[5]) or 0)
if unfinished + total > tonumber(ARGV[9]) then return {'quota', unfinished} end

local id = string.format('%013x%s', MICROSECONDS, ARGV[4])
for first = 18, #ARGV, CHUNK do
  local last = math.min(first + CHUNK - 1, #ARGV)
  redis.call('RPUSH', key('requests', id), unpack(ARGV, first, last))
end
redis.call('HSET', key('job', id),
  'tenant', ARGV[5], 'model', ARGV[6], 'priority', ARGV[7], 'weight', ARGV[8], 'state', '',
  'keep', ARGV[10], 'max_attempts', ARGV[11], 'max_stalls', ARGV[12],
  'metadata', ARGV[13], 'spec', ARGV[14], 'steps_total', ARGV[15], 'steps_done', 0,
  'cost', ARGV[16], 'trace', ARGV[17], 'created', NOW, 'version', 0, 'total', total, 'next', 0, 'waiting', 0,
  'queued', total, 'running', 0, 'succeeded', 0, 'failed', 0, 'cancelled', 0)
redis.call('HSET', once, 'job', id, 'body', ARGV[2])
redis.call('PEXPIRE', once, ARGV[3])
redis.call('ZADD', key('jobs', ARGV[5]), MICROSECONDS, id)
change_quota(ARGV[5], total)

local job = job_of(id)
job.changed = true
offer(job, total)
save_jobs()
return {'created', id}

-- Queue a job's failed and cancelled images again, as if they had never been tried.
--
-- ARGV: 1 job   2 tenant, or '' for any   3 nonce: repeating a call with it returns 'ok'
-- Returns 'ok', 'missing', or 'none' if there is nothing to retry, or if an evicting server has
-- dropped the job's requests.
--
-- Writes                what                                          expires
--   job:<id>            hash: the nonce, as `retried`; new counts; no longer expires
--   job:<id>:images     hash: a fresh record for each such image      with the job
--   job:<id>:again      zset: + each such image                       empty when all are claimed
--   quota               hash: + the images of the tenant              never
--   gc                  zset: - the job                               -
--   events              stream: the job's new state                   trimmed to 100,000
-- and what `offer` in order.lua writes.

local job = job_owned_by(ARGV[2], ARGV[1])
if not job then return 'missing' end
if redis.call('HGET', key('job', job.id), 'retried') == ARGV[3] then return 'ok' end
local failed, cancelled = job.failed, job.cancelled
if failed + cancelled == 0 or redis.call('EXISTS', key('requests', job.id)) == 0 then
  return 'none'
end

local records = redis.call('HGETALL', key('images', job.id))
for i = 1, #records, 2 do
  local index, record = records[i], cjson.decode(records[i + 1])
  if record.state == 'failed' or record.state == 'cancelled' then
    local counted = record.state == 'failed' and request_of(job, index).steps
      or steps_made(job, index, record)
    job.steps_done = job.steps_done - counted
    put_record(job, index, {state = 'queued', token = '', attempt = 0, stalls = 0})
    redis.call('ZADD', key('again', job.id), index, index)
  end
end
-- Images that a cancel cut off have no record; they become untouched again.
if job.cut then job.next, job.cut = job.cut, nil end
redis.call('HSET', key('job', job.id), 'retried', ARGV[3])
move(job, 'failed', 'queued', failed)
move(job, 'cancelled', 'queued', cancelled)
offer(job, failed + cancelled)
save_jobs()
return 'ok'

-- Queue the failed and the cancelled images of a job again, as if never tried.
--
-- ARGV: 1 job   2 tenant, or '' for any   3 nonce; the same again answers 'ok'
-- Returns 'ok', 'missing', or 'none' if there is nothing to retry or a server that evicts has dropped
-- the job's requests.

local CHUNK = 1000
local job = job_owned_by(ARGV[2], ARGV[1])
if not job then return 'missing' end
if redis.call('HGET', key('job', job.id), 'retried') == ARGV[3] then return 'ok' end
local failed, cancelled = job.failed, job.cancelled
if failed + cancelled == 0 or redis.call('EXISTS', key('requests', job.id)) == 0 then
  return 'none'
end

local records = redis.call('HGETALL', key('images', job.id))
for place = 1, #records, 2 do
  local index, record = records[place], cjson.decode(records[place + 1])
  if record.state == 'failed' or record.state == 'cancelled' then
    put_record(job, index, {state = 'queued', token = '', attempt = 0, stalls = 0})
    redis.call('ZADD', key('again', job.id), index, index)
    job.steps_done = job.steps_done - request_of(job, index).steps
  end
end
if job.cut then
  for first = job.cut, job.total - 1, CHUNK do
    local last = math.min(first + CHUNK, job.total) - 1
    for _, text in ipairs(redis.call('LRANGE', key('requests', job.id), first, last)) do
      job.steps_done = job.steps_done - string.match(text, '^%d+ %d+ (%d+)\n')
    end
  end
  job.next, job.cut = job.cut, nil
end
redis.call('HSET', key('job', job.id), 'retried', ARGV[3])
move(job, 'failed', 'queued', failed)
move(job, 'cancelled', 'queued', cancelled)
offer(job, failed + cancelled)
save_jobs()
return 'ok'

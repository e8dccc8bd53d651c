-- Record that a webhook message of a job hasn't been delivered, or that it has been after all.
--
-- ARGV: 1 job   2 message   3 JSON about the last attempt, or '' if the message was delivered
-- Returns 'ok', or 'missing' for a job that is gone.
--
-- Writes                what                                          expires
--   job:<id>            hash: `undelivered`, a JSON object of message -> 3    with the job
--   job:<id>, events    its new version (save_job in prelude.lua)
-- Only the newest messages are kept, so that an unreachable receiver of thousands of messages
-- doesn't make the job large.

local MOST = 20
local job = job_of(ARGV[1])
if not job then return 'missing' end
local text = redis.call('HGET', key('job', job.id), 'undelivered')
local messages = text and cjson.decode(text) or {}
if ARGV[3] == '' and not messages[ARGV[2]] then return 'ok' end
messages[ARGV[2]] = ARGV[3] ~= '' and ARGV[3] or nil
local ids = {}
for id in pairs(messages) do ids[#ids + 1] = id end
table.sort(ids)
for i = 1, #ids - MOST do messages[ids[i]] = nil end
if #ids == 0 then
  redis.call('HDEL', key('job', job.id), 'undelivered')
else
  redis.call('HSET', key('job', job.id), 'undelivered', cjson.encode(messages))
end
job.changed = true
save_jobs()
return 'ok'

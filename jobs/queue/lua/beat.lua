-- Extend a worker's leases and record how far each image is. The answers also tell the worker
-- which images were cancelled, which it has lost, and which someone wants to preview.
--
-- ARGV: 1 lease in ms   2... job, index, token and last step of each image
-- Returns 'ok', 'wished', 'lost' or 'cancelled' for each.
--
-- Writes                what                                          expires
--   leases              zset: the new deadline of each image          removed when the lease ends
--   job:<id>:steps      hash: the last step of each image             removed when the lease ends
--   job:<id>, events    its new version, if a step changed (save_job in prelude.lua)

local function is_wished(image)
  return tonumber(redis.call('ZSCORE', key('wishes'), image) or 0) > NOW
end

local answers = {}
for i = 2, #ARGV, 4 do
  local index, step = tonumber(ARGV[i + 1]), tonumber(ARGV[i + 3])
  local job, _, state = held_image(ARGV[i], index, ARGV[i + 2])
  if job then
    redis.call('ZADD', key('leases'), NOW + ARGV[1], image_key(job, index))
    local steps = key('steps', job.id)
    -- Without a new step the version must not rise, because clients poll with it as an ETag.
    if tonumber(redis.call('HGET', steps, index) or -1) ~= step then
      redis.call('HSET', steps, index, step)
      job.changed = true
    end
  end
  if job then
    answers[#answers + 1] = is_wished(image_key(job, index)) and 'wished' or 'ok'
  else
    answers[#answers + 1] = state == 'cancelled' and 'cancelled' or 'lost'
  end
end
save_jobs()
return answers

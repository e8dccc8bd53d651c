-- Extend a worker's leases and record how far each image is. Also the channel by which a worker
-- learns that an image was cancelled, that it is another's now, or that somebody wants to see it.
--
-- ARGV: 1 lease, ms   2... job, index, token, step of each image
-- Returns 'ok', 'wished', 'lost' or 'cancelled' for each.

local function is_wished(image)
  return tonumber(redis.call('ZSCORE', key('wishes'), image) or 0) > NOW
end

local answers = {}
for place = 2, #ARGV, 4 do
  local index, step = tonumber(ARGV[place + 1]), tonumber(ARGV[place + 3])
  local job, _, state = held_image(ARGV[place], index, ARGV[place + 2])
  if job then
    redis.call('ZADD', key('leases'), NOW + ARGV[1], image_key(job, index))
    local steps = key('steps', job.id)
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

-- Extend a worker's leases and record how far each image is. Also the channel by which a worker
-- learns that an image was cancelled, or that it is another's now.
--
-- ARGV: 1 lease, ms   2... job, index, token, step of each image
-- Returns 'ok', 'lost' or 'cancelled' for each.

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
  local others = state == 'cancelled' and 'cancelled' or 'lost'
  answers[#answers + 1] = job and 'ok' or others
end
save_jobs()
return answers

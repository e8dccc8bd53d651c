-- Find jobs whose files can be removed: deleted ones, and expired ones. Expired jobs become
-- unreadable in this same step, so that no job is ever readable without its files.
--
-- ARGV: 1 largest number of jobs to return
-- Returns their ids. Until forget.lua is called for a job, it's returned again, but only after a
-- minute, so that a job whose files can't be removed doesn't block the others.
--
-- Writes                what                                          expires
--   gc                  zset: the jobs returned, due again in a minute   removed by forget.lua
--   job:<id>, :requests, :images   deleted                            -
--   jobs:<tenant>       zset: - the job                               90 days after the last job

local ids = redis.call('ZRANGEBYSCORE', key('gc'), '-inf', NOW, 'LIMIT', 0, ARGV[1])
for _, id in ipairs(ids) do
  redis.call('ZADD', key('gc'), NOW + LIFETIME.collecting, id)
  local tenant = redis.call('HGET', key('job', id), 'tenant')
  if tenant then
    redis.call('UNLINK', key('job', id), key('requests', id), key('images', id))
    redis.call('ZREM', key('jobs', tenant), id)
  end
end
return ids

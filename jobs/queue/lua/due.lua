-- Find jobs whose files can go: deleted ones, and those past their time. The latter become
-- unreadable here and now, so that no job is ever readable without its files.
--
-- ARGV: 1 most jobs to return
-- Returns their ids. Until forget.lua each comes again, but not for a minute: one whose files
-- cannot be removed must not hold up the others.

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

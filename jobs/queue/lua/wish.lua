-- Somebody wants to see how far an image is: its worker learns so at its next beat.
--
-- ARGV: 1 job   2 index
-- Returns 'ok'. The wish ends by itself; who still wants to see wishes again.

local wishes = key('wishes')
redis.call('ZREMRANGEBYSCORE', wishes, '-inf', NOW)
redis.call('ZADD', wishes, NOW + LIFETIME.wish, image_key({id = ARGV[1]}, tonumber(ARGV[2])))
redis.call('PEXPIRE', wishes, LIFETIME.wish)
return 'ok'

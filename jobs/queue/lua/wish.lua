-- Record that someone wants a preview of an image. Its worker learns of it at its next beat.
--
-- ARGV: 1 job   2 index
-- Returns 'ok'. A wish expires; repeat the call to keep getting previews.
--
-- Writes                what                                          expires
--   wishes              zset: the image, by the wish's end            15 s after the last wish

local wishes = key('wishes')
redis.call('ZREMRANGEBYSCORE', wishes, '-inf', NOW)
redis.call('ZADD', wishes, NOW + LIFETIME.wish, image_key({id = ARGV[1]}, tonumber(ARGV[2])))
redis.call('PEXPIRE', wishes, LIFETIME.wish)
return 'ok'

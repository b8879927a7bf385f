-- KEYS: the key. ARGV: token, the new expire time as msgpack, PX or PXAT and its argument, 1 when it may be shortened.
-- Answers the value as it is now, or nil when the token does not hold the transaction in progress.
local value, fields, begins = held(KEYS[1], ARGV[1])
if not value or fields[6] ~= IN_PROGRESS then
  return false
end
if ARGV[5] ~= '1' then
  local ends_at = tonumber(ARGV[4])
  if ARGV[3] == 'PX' then
    local now = redis.call('TIME')
    ends_at = ends_at + now[1] * 1000 + math.floor(now[2] / 1000)
  end
  if ends_at <= redis.call('PEXPIRETIME', KEYS[1]) then
    touch(KEYS[1])
    return value
  end
end
local extended = string.sub(value, 1, begins[5]) .. ARGV[2] .. string.sub(value, begins[6] + 1)
redis.call('SET', KEYS[1], extended, ARGV[3], ARGV[4])
return extended

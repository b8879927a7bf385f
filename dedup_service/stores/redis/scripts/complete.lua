-- KEYS: the key. ARGV: token, result, then the new expire time, state, completion time and result as msgpack, then PX or
-- PXAT and its argument. Answers the value as it is now, or nil when the token does not hold the transaction.
local value, fields, begins = held(KEYS[1], ARGV[1])
if not value then
  return false
end
if fields[6] == COMPLETED then
  -- A repeated completion, of which the first answer was lost.
  if fields[9] ~= ARGV[2] then
    return false
  end
  touch(KEYS[1])
  return value
end
local completed = string.sub(value, 1, begins[5]) .. ARGV[3] .. ARGV[4]
  .. string.sub(value, begins[7] + 1, begins[8]) .. ARGV[5] .. ARGV[6] .. string.sub(value, begins[10] + 1)
redis.call('SET', KEYS[1], completed, ARGV[7], ARGV[8])
return completed

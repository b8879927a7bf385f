-- Replies with the value now stored, or nil if the token does not hold the transaction. The packed arguments are msgpack;
-- expiry_option is PX or PXAT.
local token, result = ARGV[1], ARGV[2]
local packed_expire_time, packed_state, packed_completion_time, packed_result = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local expiry_option, expiry, max_ttl = ARGV[7], ARGV[8], ARGV[9]
local fault = fault_of(expiry_option, expiry, max_ttl)
if fault then
  return fault
end
local value, fields, begins = held(KEYS[1], token)
if not value then
  return false
end
if fields[6] == COMPLETED then
  -- A repeated completion, after the reply to the first one was lost.
  if fields[9] ~= result then
    return false
  end
  touch(KEYS[1])
  return value
end
local completed = string.sub(value, 1, begins[5]) .. packed_expire_time .. packed_state
  .. string.sub(value, begins[7] + 1, begins[8]) .. packed_completion_time .. packed_result
  .. string.sub(value, begins[10] + 1)
redis.call('SET', KEYS[1], completed, expiry_option, expiry)
return completed

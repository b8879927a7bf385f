-- Replies with the value now stored, or nil if the token does not hold the transaction in progress. expiry_option is PX or
-- PXAT; allow_shortening is 1 or 0.
local token, packed_expire_time = ARGV[1], ARGV[2]
local expiry_option, expiry, max_ttl, allow_shortening = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local fault = fault_of(expiry_option, expiry, max_ttl)
if fault then
  return fault
end
local value, fields, begins = held(KEYS[1], token)
if not value or fields[6] ~= IN_PROGRESS then
  return false
end
if allow_shortening ~= '1' then
  local ends_at = tonumber(expiry)
  if expiry_option == 'PX' then
    local now = redis.call('TIME')
    ends_at = ends_at + now[1] * 1000 + math.floor(now[2] / 1000)
  end
  if ends_at <= redis.call('PEXPIRETIME', KEYS[1]) then
    touch(KEYS[1])
    return value
  end
end
local extended = string.sub(value, 1, begins[5]) .. packed_expire_time .. string.sub(value, begins[6] + 1)
redis.call('SET', KEYS[1], extended, expiry_option, expiry)
return extended

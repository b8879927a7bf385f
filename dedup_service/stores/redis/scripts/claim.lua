-- Replies nil if it stored the value, or the holder's value; expiry_option is PX or PXAT.
local value, expiry_option, expiry, max_ttl = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local fault = fault_of(expiry_option, expiry, max_ttl)
if fault then
  return fault
end
if redis.call('SET', KEYS[1], value, 'NX', expiry_option, expiry) then
  return false
end
return bounded(KEYS[1])

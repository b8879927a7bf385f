-- Prepended to every script, after the definition of LONGEST.

-- Returns the value of a key, '' for one that is longer than any this service writes, or false without one.
local function bounded(key)
  if redis.call('STRLEN', key) > LONGEST then
    return ''
  end
  return redis.call('GET', key)
end

-- Returns an error for an expire time (PXAT) that is past or too far away by the clock of Redis, or nil.
local function fault_of(expiry_option, expiry, max_ttl)
  if expiry_option ~= 'PXAT' then
    return nil
  end
  local now = redis.call('TIME')
  local left = expiry - now[1] * 1000 - math.floor(now[2] / 1000)
  if left <= 0 then
    return redis.error_reply('EXPIRE_TIME_PAST by the clock of Redis')
  end
  if max_ttl ~= '' and left > tonumber(max_ttl) then
    return redis.error_reply('EXPIRE_TIME_TOO_FAR ' .. max_ttl)
  end
end

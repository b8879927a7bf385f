-- Prepended to the scripts that compare a token. Field numbers are those of the stored value, counted from 1:
-- version, token, claimant, claim time, expire time, state, fingerprint, completion time, result.

local IN_PROGRESS, COMPLETED = 1, 2

-- The number of length bytes after the first byte of a msgpack bin 8, bin 16 and bin 32.
local BIN_LENGTH = {[0xc4] = 1, [0xc5] = 2, [0xc6] = 4}

-- Returns the end of the object at `offset`, and the object. The cmsgpack of Redis does not read bin, the type of
-- fingerprint and result.
local function unpack_at(value, offset)
  assert(offset < #value)
  local length = BIN_LENGTH[string.byte(value, offset + 1)]
  if not length then
    local ends, object = cmsgpack.unpack_one(value, offset)
    -- At the end of its input unpack_one returns -1.
    return ends < 0 and #value or ends, object
  end
  local size = 0
  for position = offset + 2, offset + 1 + length do
    size = size * 256 + string.byte(value, position)
  end
  local begins = offset + 1 + length
  assert(begins + size <= #value)
  return begins + size, string.sub(value, begins + 1, begins + size)
end

-- Returns the stored value, its first nine fields, and the offset at which each begins (the tenth offset is the end of
-- the ninth field) if `token` holds the key, or else nil. Raises for a value this version cannot read. Scripts build a
-- new value from slices of the old one, so that fields a newer version added at the end are kept.
local function held(key, token)
  local value = bounded(key)
  local first = value and string.byte(value, 1)
  -- This service writes only arrays that begin with a number.
  if not first or first < 0x91 or (first > 0x9f and first ~= 0xdc) then
    return nil
  end
  local understood, offset, version = pcall(unpack_at, value, 1)
  if first == 0xdc or (understood and type(version) == 'number' and version ~= 1) then
    error({err = 'VALUE_VERSION_UNKNOWN'})
  end
  if not understood or type(version) ~= 'number' then
    return nil
  end
  local fields, begins = {version}, {1, offset}
  for number = 2, 9 do
    understood, begins[number + 1], fields[number] = pcall(unpack_at, value, begins[number])
    if not understood then
      error({err = 'VALUE_DAMAGED'})
    end
  end
  if fields[2] ~= token then
    return nil
  end
  return value, fields, begins
end

-- Writes the expiry of a held key again: a WAIT on this connection then covers earlier writes, also those of other
-- connections.
local function touch(key)
  local ends_at = redis.call('PEXPIRETIME', key)
  if ends_at > 0 then
    redis.call('PEXPIREAT', key, ends_at)
  end
end

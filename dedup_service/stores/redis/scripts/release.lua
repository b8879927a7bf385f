-- KEYS: the key. ARGV: token. Answers 1 when the claim was given back, 0 when the token does not hold it in progress.
local value, fields = held(KEYS[1], ARGV[1])
if not value or fields[6] ~= IN_PROGRESS then
  return 0
end
return redis.call('DEL', KEYS[1])

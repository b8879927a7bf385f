-- Replies 1 if it deleted the claim, or 0 if the token does not hold the transaction in progress.
local token = ARGV[1]
local value, fields = held(KEYS[1], token)
if not value or fields[6] ~= IN_PROGRESS then
  return 0
end
return redis.call('DEL', KEYS[1])

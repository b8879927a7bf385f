-- Replies 1 after a write that changes nothing if the token holds the transaction, or 0.
local token = ARGV[1]
if not held(KEYS[1], token) then
  return 0
end
touch(KEYS[1])
return 1

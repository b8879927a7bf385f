-- KEYS: the key. ARGV: token. Answers 1 after a write that changes nothing when the token holds the transaction, or 0.
if not held(KEYS[1], ARGV[1]) then
  return 0
end
touch(KEYS[1])
return 1

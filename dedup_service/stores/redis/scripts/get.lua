-- Replies the value, '' for one that is longer than any this service writes, or nil without one.
return bounded(KEYS[1])

"""Claims in Redis or Valkey: one server, Sentinel or Cluster. Only this folder imports redis-py and hiredis."""

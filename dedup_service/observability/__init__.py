"""What operators see of the service: logs, and the ids that tie them to their callers. It knows no other room."""

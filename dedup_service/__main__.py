"""`python -m dedup_service` is the command `dedup-service`."""

from dedup_service.cli import main

main()

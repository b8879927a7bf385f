"""The server: listeners, health, drain. It puts the rooms together and is the only one that knows them all."""

from dedup_service.server.app import serve
from dedup_service.server.listeners import StartRefused

__all__ = ["StartRefused", "serve"]

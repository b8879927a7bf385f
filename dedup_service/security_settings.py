"""The settings of who may call, over what, and how much one peer may take: a part of `Settings`, which has them all."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from dedup_service.addresses import beyond_this_host


class SecuritySettings(BaseModel):
    """How the server knows its callers, and what it shows to those that it does not know."""

    tls_cert: Path | None = Field(
        None,
        description="A PEM file with the certificate of the server and its chain: TLS on every address of --listen. "
        "Read anew when it changes.  [default: none, plaintext]",
    )
    tls_key: Path | None = Field(
        None, description="A PEM file with the key of that certificate, read anew with it.  [default: none]"
    )
    tls_client_ca: Path | None = Field(
        None,
        description="A PEM file of authorities: callers must show a certificate of one of them (mTLS). Read anew when "
        "it changes.  [default: none]",
    )
    auth_tokens: Path | None = Field(
        None,
        description="A TOML file of callers and their bearer tokens, one of which each call must then carry, unless a "
        "client certificate says who calls; SIGHUP rereads it.  [default: none]",
    )
    allow_unauthenticated: bool = Field(
        False, description="Serve addresses beyond this host although nobody there is asked who they are."
    )
    reflection: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether tools such as grpcurl are told which services there are; auto: only where every address "
        "of --listen is of this host.",
    )
    max_connections: int | None = Field(
        None,
        gt=0,
        description="How many connections each TCP address or socket takes at a time; more are closed at once.  "
        "[default: 1000 with grpcio; the engine native has no limit, and refuses one]",
    )

    @property
    def authenticates(self) -> bool:
        """Whether callers are asked who they are."""
        return self.tls_client_ca is not None or self.auth_tokens is not None

    def check_security(self, listen: Iterable[str]) -> None:
        """Raise ValueError with one sentence for settings of TLS that are half, and for an open door to the network."""
        if (self.tls_cert is None) != (self.tls_key is None):
            missing, other = ("TLS_KEY", "TLS_CERT") if self.tls_key is None else ("TLS_CERT", "TLS_KEY")
            raise ValueError(f"DEDUP_{other} is set and DEDUP_{missing} is not: a server certificate needs both")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(
                "DEDUP_TLS_CLIENT_CA is set and DEDUP_TLS_CERT is not: client certificates come with TLS alone, "
                "so set DEDUP_TLS_CERT and DEDUP_TLS_KEY"
            )
        if not self.authenticates and not self.allow_unauthenticated and (wide := beyond_this_host(listen)):
            raise ValueError(
                f"DEDUP_LISTEN ({wide[0]}) can be reached from other hosts, and nobody is asked who they are: listen "
                "on 127.0.0.1 or a Unix socket, set DEDUP_TLS_CLIENT_CA (mTLS) or DEDUP_AUTH_TOKENS, or set "
                "DEDUP_ALLOW_UNAUTHENTICATED=true where the network lets only the right callers through"
            )

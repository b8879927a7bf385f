"""Certificates for the connection to Redis can be renewed while the service runs."""

from collections.abc import Callable
from pathlib import Path

import redis
import trustme

from tests.support.polling import wait_until
from tests.support.processes import RedisProcess, ServiceProcess, run_command


def write_certificates(folder: Path) -> None:
    """Write a new authority and its server and client certificates, replacing existing files."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name in ("server", "client"):
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_and_cert_chain_pem.write_to_path(folder / f"{name}.pem")


def test_certificate_files_are_read_for_every_connection(
    start_redis: Callable[..., RedisProcess], start_service: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    """An open connection stays in use, and the next one uses the current authority and client certificate."""
    write_certificates(tmp_path)
    files = {
        "tls-cert-file": str(tmp_path / "server.pem"),
        "tls-key-file": str(tmp_path / "server.pem"),
        "tls-ca-cert-file": str(tmp_path / "ca.pem"),
    }
    options = [word for name, path in files.items() for word in (f"--{name}", path)]
    server = start_redis(*options, "--tls-auth-clients", "yes", tls=True)
    client = tmp_path / "client.pem"
    own = f"ssl_ca_certs={tmp_path / 'ca.pem'}&ssl_certfile={client}&ssl_keyfile={client}"
    service = start_service("--store-url", f"rediss://127.0.0.1:{server.tls_port}/0?{own}")

    def claimed(transaction_id: str) -> bool:
        return run_command("claim", transaction_id, "--target", service.target).returncode == 0

    wait_until(lambda: claimed("before"), what="a claim over TLS")
    write_certificates(tmp_path)
    with redis.Redis(port=server.port, protocol=2) as admin:
        admin.execute_command("CONFIG", "SET", *(word for pair in files.items() for word in pair))
        assert claimed("over the old connection")
        (tls_client,) = (one["id"] for one in admin.client_list() if one["laddr"].endswith(f":{server.tls_port}"))
        admin.client_kill_filter(_id=tls_client)
    wait_until(lambda: claimed("over a new connection"), what="a claim with the new certificates")

# The Python version of the test suite. Both stages need the same one, since the environment is copied whole.
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
# The locked packages come first: this layer is slow and seldom changes.
COPY requirements/run.txt requirements/
RUN python -m venv --without-pip /opt/dedup \
    && pip --python /opt/dedup install --no-cache-dir --require-hashes -r requirements/run.txt
COPY pyproject.toml README.md LICENSE ./
COPY dedup_service dedup_service
COPY clients/python clients/python
# The build backend is removed, so that it needs no security updates; `pip check` proves that nothing else needs it.
RUN pip --python /opt/dedup install --no-cache-dir --no-build-isolation --no-deps ./clients/python . \
    && pip --python /opt/dedup uninstall --yes hatchling packaging pathspec pluggy tomlkit trove-classifiers \
    && pip --python /opt/dedup check

FROM python:3.11-slim-bookworm
ARG VERSION=unknown
LABEL org.opencontainers.image.title="dedup-service" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.description="A gRPC sidecar that admits each transaction at most once" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/dedup-service/dedup-service"
# A running container needs no installer; an intruder would use one.
RUN python -m pip uninstall --yes pip setuptools wheel && rm -r /usr/local/lib/python3.11/ensurepip
COPY --from=build /opt/dedup /opt/dedup
# A store URL is required: a pod without one would deduplicate only against itself.
# The listener binds all interfaces, since a container's loopback port cannot be published. The operator must choose who
# may call there: DEDUP_TLS_CLIENT_CA, DEDUP_AUTH_TOKENS or DEDUP_ALLOW_UNAUTHENTICATED. The health listener is separate,
# so that the check below works with each of them.
# No bytecode is written, since the file system may be read-only; pip wrote it at build time.
ENV PATH="/opt/dedup/bin:$PATH" \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DEDUP_REQUIRE_STORE_URL=true \
    DEDUP_LISTEN=0.0.0.0:50051 \
    DEDUP_HEALTH_LISTEN=127.0.0.1:50052
# Numeric, so that Kubernetes' runAsNonRoot can check it without reading /etc/passwd.
USER 65532:65532
EXPOSE 50051
# Starts the drain.
STOPSIGNAL SIGTERM
# Checks liveness, not readiness: some engines replace unhealthy containers, and a new one would not reach Redis either.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["dedup-service", "healthcheck", "--service", "liveness"]
# The exec form makes the service process 1, which receives the stop signal.
ENTRYPOINT ["dedup-service"]
CMD ["serve"]

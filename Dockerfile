# The Python that the test suite runs on; both stages need the same one, since the environment is copied whole.
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
# The locked packages come first: they change seldom, and this layer is the slow one.
COPY requirements/run.txt requirements/
RUN python -m venv --without-pip /opt/dedup \
    && pip --python /opt/dedup install --no-cache-dir --require-hashes -r requirements/run.txt
COPY pyproject.toml README.md ./
COPY dedup_service dedup_service
COPY clients/python clients/python
# The build backend has served its purpose here; what is not in the image needs no security update. `pip check` proves
# that nothing else needed it.
RUN pip --python /opt/dedup install --no-cache-dir --no-build-isolation --no-deps . \
    && pip --python /opt/dedup uninstall --yes hatchling packaging pathspec pluggy tomlkit trove-classifiers \
    && pip --python /opt/dedup check

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="dedup-service" \
      org.opencontainers.image.description="A gRPC sidecar that admits each transaction at most once"
# Nothing is ever installed into a running container, except by an intruder.
RUN python -m pip uninstall --yes pip setuptools wheel && rm -r /usr/local/lib/python3.11/ensurepip
COPY --from=build /opt/dedup /opt/dedup
# The store must be named: a pod that forgot its Redis URL would otherwise deduplicate against itself alone.
# All interfaces, since a port of a container's loopback cannot be published; who may call there is for whoever runs it to
# say, by DEDUP_TLS_CLIENT_CA, DEDUP_AUTH_TOKENS or DEDUP_ALLOW_UNAUTHENTICATED. Health has a listener of its own, which
# the check below finds whatever they say.
# The file system may be read-only, so no bytecode is written; pip wrote it at build time.
ENV PATH="/opt/dedup/bin:$PATH" \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DEDUP_REQUIRE_STORE_URL=true \
    DEDUP_LISTEN=0.0.0.0:50051 \
    DEDUP_HEALTH_LISTEN=127.0.0.1:50052
# Numeric, so that Kubernetes' runAsNonRoot can check it without reading /etc/passwd.
USER 65532:65532
EXPOSE 50051
# The signal that starts the drain.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["dedup-service", "healthcheck"]
# The exec form makes the service process 1, which alone hears that signal.
ENTRYPOINT ["dedup-service"]
CMD ["serve"]

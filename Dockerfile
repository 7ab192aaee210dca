# syntax=docker/dockerfile:1
# The server alone: no embedded engines, no compiler, no pip, no root.

FROM python:3.13-slim AS build
WORKDIR /src
RUN python -m venv --without-pip /opt/bridge
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY realtime_bridge ./realtime_bridge
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/bridge/bin/python install --disable-pip-version-check --constraint constraints.txt .

FROM python:3.13-slim
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin bridge
COPY --from=build /opt/bridge /opt/bridge
ENV PATH=/opt/bridge/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001
EXPOSE 8000
# Alive, not ready: a Swarm restarts what is unhealthy, and a bridge whose Postgres is away must keep its sockets.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=3)"]
# Exec form: the bridge is process 1 and hears SIGTERM itself. It drains, within BRIDGE_DRAIN_SECONDS.
STOPSIGNAL SIGTERM
ENTRYPOINT ["realtime-bridge"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]

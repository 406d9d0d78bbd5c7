# The server of onevoice: CPU build of PyTorch, weights inside, no network needed at run time.
#   docker build -t onevoice .
#   docker run -p 127.0.0.1:8000:8000 -e ONEVOICE_TOKEN=… onevoice

FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN python -m venv /opt/onevoice \
    && /opt/onevoice/bin/pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c constraints.txt ".[serve,formats,voices]"

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --create-home onevoice \
    && install -d -o onevoice -g onevoice -m 700 /data
COPY --from=build /opt/onevoice /opt/onevoice
ENV PATH=/opt/onevoice/bin:$PATH XDG_DATA_HOME=/data PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
USER 10001
VOLUME ["/data", "/tmp"]
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["onevoice", "serve", "--host", "0.0.0.0"]

"""A server under load: many clients extract at once; is it still quick to answer, bounded in memory, and complete?

    python benchmarks/serve_load.py --clients 100 --seconds 300

Each client uploads the sample recordings, follows the events, downloads the voice, and deletes the job, over and over.
Meanwhile `/healthz` is asked five times per second, and the memory of the server is read from `/metrics`. Exit status 1
if a job was lost, if the 95th percentile of `/healthz` is 50 ms or more, or if memory grows by more than a tenth from
the second to the last quarter of the time.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import httpx
import numpy as np

from onevoice.evaluation.demo import SAMPLES

MAX_HEALTH_SECONDS = 0.05
MAX_GROWTH = 1.1


@dataclass
class Record:
    """What the clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    job_seconds: list[float] = field(default_factory=list)


async def use(client: httpx.AsyncClient, record: Record, until: float) -> None:
    """Extract until the time is up; a job that was accepted must end with a voice."""
    files = {name: (SAMPLES / f"{name}.flac").read_bytes() for name in ("mixture", "enrollment")}
    while time.monotonic() < until:
        begin = time.monotonic()
        answer = await client.post("/v1/extractions?wait=0", files=files)
        if answer.status_code == 503:
            record.outcomes["refused, queue full"] += 1
            await asyncio.sleep(float(answer.headers["retry-after"]) / 10)
            continue
        place = answer.raise_for_status().headers["location"]
        try:
            await asyncio.wait_for(client.get(f"{place}/events"), max(1.0, until - time.monotonic()))
        except TimeoutError:
            record.outcomes["still waiting at the end"] += 1
            (await client.delete(place)).raise_for_status()
            return
        job = (await client.get(place)).json()
        voice = await client.get(f"{place}/files/voice.flac")
        is_whole = job["status"] == "done" and voice.status_code == 200 and voice.content[:4] == b"fLaC"
        record.outcomes["done" if is_whole else "lost"] += 1
        record.job_seconds.append(time.monotonic() - begin)
        (await client.delete(place)).raise_for_status()


async def load(address: str, clients: int, seconds: float) -> Record:
    """Put the load on a server."""
    record, until = Record(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
        await asyncio.gather(*(use(client, record, until) for _ in range(clients)))
    return record


def watch(address: str, seconds: float) -> tuple[list[float], list[float]]:
    """Ask for health and memory, in a process of its own; return seconds and bytes."""
    health, memory, until = [], [], time.monotonic() + seconds
    with httpx.Client(base_url=address, timeout=None) as client:
        while time.monotonic() < until:
            begin = time.monotonic()
            client.get("/healthz").raise_for_status()
            health.append(time.monotonic() - begin)
            if len(health) % 5 == 0:
                found = re.search(r"^process_resident_memory_bytes (\S+)$", client.get("/metrics").text, re.MULTILINE)
                assert found
                memory.append(float(found[1]))
            time.sleep(0.2)
    return health, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "onevoice", "serve", "--port", "0", "--voices", folder]
        command += ["--workers", str(options.workers), "--max-queued", str(max(1, options.clients - 10))]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": folder})
        assert server.stdout is not None
        address = server.stdout.readline().split()[2]
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                watching = pool.submit(watch, address, options.seconds)
                record = asyncio.run(load(address, options.clients, options.seconds))
                health_seconds, memory_bytes = watching.result()
        finally:
            server.terminate()
            status = server.wait()
    p50, p95, p99 = np.percentile(health_seconds, [50, 95, 99])
    quarter = max(1, len(memory_bytes) // 4)
    early, late = max(memory_bytes[quarter : 2 * quarter + 1]), max(memory_bytes[-quarter:])
    result = {
        "clients": options.clients, "seconds": options.seconds, "outcomes": dict(record.outcomes),
        "job_seconds_p50": round(float(np.median(record.job_seconds)), 2),
        "healthz_ms": [round(1000 * float(value), 1) for value in (p50, p95, p99)],
        "memory_mb": [round(value / 1e6) for value in (memory_bytes[0], early, late)],
        "server_status": status,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    is_good = p95 < MAX_HEALTH_SECONDS and not record.outcomes["lost"] and late < MAX_GROWTH * early and status == 0
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()

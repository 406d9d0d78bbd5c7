"""Mix on a Ray cluster of two hosts, and lose one of them: python benchmarks/two_hosts.py [--count 400]

The hosts are network namespaces of this machine, joined by a cable (`ip netns`, so this needs root on Linux). They
share its disk, as the hosts of a cluster share a file system. Nobody else reaches them, so the cluster asks for no
token (RAY_AUTH_MODE). The second one is cut off after the first 50 trials. The
folder must have the same bytes as one of this machine alone.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from voices import make_corpus

HEAD, SECOND = "10.99.0.1", "10.99.0.2"
CORES = 2
"""Of each host."""


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


@contextlib.contextmanager
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with an address each; yield their names."""
    names = (f"onevoice-a-{os.getpid()}", f"onevoice-b-{os.getpid()}")
    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, (HEAD, SECOND), strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                run("ip", "-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


@contextlib.contextmanager
def node(host: str, address: str, log: Path, *options: str) -> Iterator[None]:
    """Run a node of the cluster in a host."""
    words = ["ray", "start", "--block", "--node-ip-address", address, "--num-cpus", str(CORES), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["ip", "netns", "exec", host, *words], stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def wait_for(folder: Path, pattern: str, count: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and len(list(folder.glob(pattern))) < count:
        time.sleep(0.05)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    options = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    with tempfile.TemporaryDirectory() as place, hosts() as (first, second), contextlib.ExitStack() as stack:
        folder = Path(place)
        make_corpus(folder / "corpus")
        mix = [sys.executable, "-m", "onevoice", "mix", f"{folder}/corpus"]
        asked = ["--count", str(options.count), "--segment-seconds", "0.5", "--sample-rate", "8000"]
        subprocess.run([*mix, f"{folder}/local", *asked, "--workers", "1"], check=True)
        stack.enter_context(
            node(first, HEAD, folder / "a.log", "--head", "--port", "6379", "--include-dashboard=false")
        )
        lost = contextlib.ExitStack()
        stack.push(lost)
        status = ["ip", "netns", "exec", first, "ray", "status", "--address", f"{HEAD}:6379"]
        await_nodes(status, 1)
        lost.enter_context(node(second, SECOND, folder / "b.log", "--address", f"{HEAD}:6379"))
        await_nodes(status, 2)
        command = ["ip", "netns", "exec", first, *mix, f"{folder}/cluster", *asked]
        process = subprocess.Popen([*command, "--engine", "ray", "--address", f"{HEAD}:6379"])
        wait_for(folder / "cluster", "*-mixed.wav", 50, process)
        made = len(list((folder / "cluster").glob("*-mixed.wav")))
        run("ip", "-n", second, "link", "set", "cable", "down")
        print(f"the second host is cut off after {made} mixtures", flush=True)
        print(f"exit status {process.wait(timeout=600)}")
        lost.close()
        same = contents(folder / "cluster") == contents(folder / "local")
        print("the same bytes as on one machine" if same else "OTHER BYTES than on one machine", flush=True)
        sys.exit(0 if same else 1)


def await_nodes(status: list[str], count: int) -> None:
    """Wait until the cluster has so many nodes."""
    for _ in range(120):
        done = subprocess.run(status, capture_output=True, text=True, check=False)
        if done.stdout.count("node_") >= count:
            return
        time.sleep(1)
    raise SystemExit(f"the cluster does not get {count} nodes:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()

"""What runs on the device: opens an artifact, times it, and prints one line of JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time

from edgeship.core.model import Signature
from edgeship.core.records import from_plain
from edgeship.core.registry import artifacts, runtimes
from edgeship.data.batches import generate_batches

LEAST_RUNS, MOST_RUNS = 5, 100


def main() -> None:
    """Read an order from standard input, and answer it."""
    order = json.loads(sys.stdin.read())
    artifact = from_plain(artifacts()[order["artifact"]["kind"]], order["artifact"])
    (batch,) = generate_batches(Signature(artifact.signature.inputs, ()), 1)
    times: list[float] = []
    with runtimes()[artifact.runtime].open_fast(artifact) as session:
        session.run(batch)
        end = time.perf_counter() + order["seconds"]
        while len(times) < LEAST_RUNS or (time.perf_counter() < end and len(times) < MOST_RUNS):
            start = time.perf_counter()
            session.run(batch)
            times.append(1000 * (time.perf_counter() - start))
    print(json.dumps({"median_ms": statistics.median(times), "runs": len(times)}))


if __name__ == "__main__":
    main()

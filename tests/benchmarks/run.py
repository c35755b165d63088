"""Performance as ratios, each measured in one run against a named reference: ``make bench``, or one by NAME=swap.

| name | what | where |
| --- | --- | --- |
| download | our guarded download against plain img2dataset, from nginx on loopback | download.py |
| embed | images/s from tars to rows against the bare model, and against clip-retrieval | embed.py |
| index | what ``auto`` takes, at 100k, 1M and 10M rows, beside FAISS Flat, autofaiss and hnswlib | indexes.py |
| shards | latency of 16 index shards over one of the same rows | retrieval.py |
| delta | adding 10k rows to 100k and to 1M | delta.py |
| swap | seconds until a running pipeline draws from another database, and requests lost | retrieval.py |
| neighbours | all rows' neighbours against FAISS's own search of the same index | retrieval.py |
| generator | the embedded generator with neighbours and without (SAMPLES=2000) | generator.py |
| discrete | the discrete generator that ships, likewise, and its edits (SAMPLES=2000) | generator.py |
| ablations | the same without neighbours, with each kind of query, 1 to 20 neighbours (SAMPLES=1000) | generator.py |
| edit | ten edits by the embedded generator | edit.py |
| speed | training and drawing, against plain code around the same networks | speed.py |

Writes one JSON for each benchmark below ``build/bench`` and prints what it holds. What is committed under ``results``
was copied from there by hand. A GPU is used, where there is one, by what trains or draws: generator, discrete,
ablations, edit, speed.
"""

import argparse
import importlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import torch

OUT = Path("build/bench")
SAMPLES = {"generator": 2000, "discrete": 2000, "ablations": 1000}
"""What the figures are stated for."""
LEAST_SAMPLES = 4
FEW_SAMPLES = 64
"""Of a benchmark that was not named."""
MODULES = {
    "download": "download",
    "embed": "embed",
    "index": "indexes",
    "shards": "retrieval",
    "delta": "delta",
    "swap": "retrieval",
    "neighbours": "retrieval",
    "generator": "generator",
    "discrete": "generator",
    "ablations": "generator",
    "edit": "edit",
    "speed": "speed",
}


def main() -> int:
    """Run what is named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODULES)}; all unless told")
    parser.add_argument(
        "--samples", type=_enough, help=f"of generator, discrete and ablations; {FEW_SAMPLES} without NAME"
    )
    options = parser.parse_args()
    unknown = set(options.names) - set(MODULES)
    if unknown:
        print(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}", file=sys.stderr)
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "faiss": faiss.__version__}
    for name in options.names or MODULES:
        torch.set_num_threads(_cores())
        result = benchmark(name, options.samples, named=bool(options.names))()
        machine = _machine(result.get("device", "cpu"))
        (OUT / f"{name}.json").write_text(json.dumps({**result, "machine": machine, "versions": versions}, indent=1))
        print(name)
        show(result)
    return 0


def benchmark(name: str, samples: int | None, *, named: bool) -> Callable[[], dict[str, Any]]:
    """What measures ``name``; what draws many pictures in full only when it was asked for."""
    function: Callable[..., dict[str, Any]] = getattr(importlib.import_module(MODULES[name]), f"bench_{name}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "edit":
        return lambda: function(device)
    if name not in SAMPLES:
        return function
    count = (SAMPLES[name] if named else FEW_SAMPLES) if samples is None else samples
    print(
        f"{name}: {count} samples; SAMPLES=… for another number. Its figures are stated for {SAMPLES[name]}, "
        "long on a CPU; a killed run goes on where it was"
    )
    return lambda: function(count, device)


def show(values: dict[str, Any], indent: str = "  ") -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{key:26} {value:.3f}" if isinstance(value, float) else f"{indent}{key:26} {value}")


def _enough(told: str) -> int:
    """A number of samples that every figure can be computed from."""
    if not told.isdecimal() or int(told) < LEAST_SAMPLES:
        raise argparse.ArgumentTypeError(
            f"{told!r} is no number of samples; give at least {LEAST_SAMPLES}: "
            "precision and recall look at the third neighbour of each"
        )
    return int(told)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _processor() -> str:
    """The model's name where the system tells it, else the architecture."""
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", told, re.MULTILINE)
    return named.group(1).strip() if named else platform.processor() or platform.machine()


def _machine(device: str) -> dict[str, Any]:
    """What was measured on; the GPU where one was used."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine: dict[str, Any] = {"processor": _processor(), "cores": _cores(), "memory_gib": round(memory / 2**30)}
    return machine | ({"gpu": torch.cuda.get_device_name()} if device.startswith("cuda") else {})


if __name__ == "__main__":
    sys.exit(main())

"""Performance relative to named references, measured in the same run: ``make bench``, or e.g. ``make bench NAME=swap``.

| name | what | where |
| --- | --- | --- |
| download | our guarded download against plain img2dataset, from nginx on loopback | download.py |
| lists | rows/s and peak memory of URL lists against pyarrow's own readers (ROWS=10000000) | lists.py |
| embed | images/s from tars to rows against the bare model, and against clip-retrieval | embed.py |
| index | the choice of ``auto`` at 100k, 1M and 10M rows, against FAISS Flat, autofaiss and hnswlib | indexes.py |
| shards | latency of 16 index shards against one of the same rows | retrieval.py |
| delta | adding 10k rows to 100k and to 1M | delta.py |
| swap | seconds until a running pipeline uses another database, and failed requests | retrieval.py |
| neighbours | all rows' neighbours against FAISS's own search of the same index | retrieval.py |
| generator | the bundled generator with prompts that people write (SAMPLES=160, PROMPTS=all) | generator.py |
| names | the bundled generator with the names of emoji, with neighbours and without (SAMPLES=2000) | names.py |
| discrete | the same for the bundled discrete generator, and its edits (SAMPLES=2000) | names.py |
| ablations | without neighbours, with each kind of query, with 1 to 20 neighbours (SAMPLES=1000) | names.py |
| edit | ten edits by the bundled generator | edit.py |
| speed | training and generation, against plain code with the same networks | speed.py |
| serve | REST overhead, searches/s against clip-retrieval's back, images/s, swaps and memory | serve.py |

Writes one JSON per benchmark to ``build/bench``, and prints it. The files in ``results`` were copied from there by
hand. generator, names, discrete, ablations, edit and speed use a GPU if there is one.
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
SAMPLES = {"generator": 160, "names": 2000, "discrete": 2000, "ablations": 1000}
"""Number of samples of the published figures."""
LEAST_SAMPLES = 4
FEW_SAMPLES = {"generator": 4, "names": 64, "discrete": 64, "ablations": 64}
"""Number of samples if no benchmark is named."""
MODULES = {
    "download": "download",
    "lists": "lists",
    "embed": "embed",
    "index": "indexes",
    "shards": "retrieval",
    "delta": "delta",
    "swap": "retrieval",
    "neighbours": "retrieval",
    "generator": "generator",
    "names": "names",
    "discrete": "names",
    "ablations": "names",
    "edit": "edit",
    "speed": "speed",
    "serve": "serve",
}


def main() -> int:
    """Run the named benchmarks, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(MODULES)}; default: all")
    parser.add_argument(
        "--samples",
        type=_sample_count,
        help=f"samples of {', '.join(SAMPLES)}; fewer by default without NAME",
    )
    options = parser.parse_args()
    unknown = set(options.names) - set(MODULES)
    if unknown:
        print(f"unknown benchmark: {', '.join(sorted(unknown))}; use {', '.join(MODULES)}", file=sys.stderr)
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
    """Return the function of a benchmark; a benchmark that was not ``named`` generates fewer images."""
    function: Callable[..., dict[str, Any]] = getattr(importlib.import_module(MODULES[name]), f"bench_{name}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "edit":
        return lambda: function(device)
    if name not in SAMPLES:
        return function
    count = (SAMPLES if named else FEW_SAMPLES)[name] if samples is None else samples
    print(
        f"{name}: {count} samples; set SAMPLES=… for another number. The published figures have {SAMPLES[name]}, "
        "which takes long on a CPU; a killed run resumes"
    )
    return lambda: function(count, device)


def show(values: dict[str, Any], indent: str = "  ") -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{key:26} {value:.3f}" if isinstance(value, float) else f"{indent}{key:26} {value}")


def _sample_count(text: str) -> int:
    """Parse a number of samples that is large enough for every metric."""
    if not text.isdecimal() or int(text) < LEAST_SAMPLES:
        raise argparse.ArgumentTypeError(
            f"number of samples is too small or not a number: {text!r}; give at least {LEAST_SAMPLES}, "
            "because precision and recall use the third neighbour"
        )
    return int(text)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _processor() -> str:
    """Return the model name of the processor if known, else the architecture."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named.group(1).strip() if named else platform.processor() or platform.machine()


def _machine(device: str) -> dict[str, Any]:
    """Describe the machine, with the GPU if it was used."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine: dict[str, Any] = {"processor": _processor(), "cores": _cores(), "memory_gib": round(memory / 2**30)}
    return machine | ({"gpu": torch.cuda.get_device_name()} if device.startswith("cuda") else {})


if __name__ == "__main__":
    sys.exit(main())

"""Reading URL lists: rows per second and peak memory, against pyarrow's own readers of the same files.

``ours`` is ``read_list``, which validates the list and memory-maps it. ``pyarrow`` reads the file into memory.
Each read runs in its own process, and the readers alternate. Imports are not timed. The peak counts anonymous memory,
which excludes the pages of mapped files. ``csv.gz, quoted`` has captions with quotes and commas, so ours reads the file
twice. ``ROWS=1000000`` sets the number of rows.
"""

import csv
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

ROWS, ROUNDS, CHUNK = 10_000_000, 3, 100_000
FILES = {
    "parquet": "list.parquet",
    "csv.gz": "list.csv.gz",
    "csv.gz, quoted": "quoted.csv.gz",
    "jsonl": "list.jsonl",
}


def bench_lists() -> dict[str, Any]:
    rows = int(os.environ.get("ROWS") or ROWS)
    results: dict[str, Any] = {"rows": rows, "rounds": ROUNDS}
    with tempfile.TemporaryDirectory() as folder:
        for name, file in FILES.items():
            path = Path(folder, file)
            write(path, rows)
            measured: dict[str, list[dict[str, float]]] = {"ours": [], "pyarrow": []}
            for _ in range(ROUNDS):
                for reader, found in measured.items():
                    found.append(measure_in_process(reader, path, rows))
            path.unlink()
            medians = {
                reader: {key: statistics.median(one[key] for one in found) for key in found[0]}
                for reader, found in measured.items()
            }
            ratio = medians["ours"]["rows_per_s"] / medians["pyarrow"]["rows_per_s"]
            results[name] = {**medians, "rows_per_s_ratio": ratio}
    return results


def chunks(rows: int) -> Iterator[pa.Table]:
    """Yield the list in parts: URLs of 60 characters, a caption, a number and a licence."""
    for start in range(0, rows, CHUNK):
        ids = range(start, min(start + CHUNK, rows))
        yield pa.table(
            {
                "url": [f"https://images{n % 97}.example.com/photos/{n:012d}/large.jpg?w=1024" for n in ids],
                "caption": [f"a photo of number {n} on a table near the window" for n in ids],
                "likes": pa.array([n % 1009 for n in ids], pa.int64()),
                "licence": ["CC-BY-4.0" if n % 3 else "CC0" for n in ids],
            }
        )


def write(path: Path, rows: int) -> None:
    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, next(chunks(1)).schema) as writer:
            for table in chunks(rows):
                writer.write_table(table)
    elif path.suffix == ".jsonl":
        with path.open("w") as stream:
            for table in chunks(rows):
                stream.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
    else:
        more = ', "framed"' if path.name.startswith("quoted") else ""
        with gzip.open(path, "wt", compresslevel=1, newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")  # quotes only what needs quotes, like pandas
            writer.writerow(next(chunks(1)).column_names)
            for table in chunks(rows):
                captions = [caption + more for caption in table["caption"].to_pylist()]
                table = table.set_column(1, "caption", pa.array(captions))
                writer.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))


def measure_in_process(reader: str, path: Path, rows: int) -> dict[str, float]:
    """Measure one read of the file in a separate process."""
    command = [sys.executable, __file__, reader, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    assert found.pop("rows") == rows
    return {"rows_per_s": rows / found["seconds"], "peak_mib": found["peak_mib"]}


def read_with_pyarrow(path: str) -> pa.Table:
    if path.endswith(".parquet"):
        return pq.read_table(path)
    if path.endswith(".jsonl"):
        return pajson.read_json(path)
    return pacsv.read_csv(path)  # decompresses by the suffix


def anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def measure(read: Callable[[str], pa.Table], path: str) -> dict[str, float]:
    peak, ended = anonymous_mib(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.01):
            peak = max(peak, anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    table = read(path)
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    return {"rows": table.num_rows, "seconds": seconds, "peak_mib": peak}


if __name__ == "__main__":
    from infra.formats.lists import read_list

    readers: dict[str, Callable[[str], pa.Table]] = {
        "ours": lambda path: read_list(path, "URL"),
        "pyarrow": read_with_pyarrow,
    }
    print(json.dumps(measure(readers[sys.argv[1]], sys.argv[2])))

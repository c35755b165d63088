"""The guarded download against plain img2dataset: same list, nginx on loopback, processes, threads and settings.

Both store webdataset shards of PNG images at zlib level 6, at most 512 px, with the sha256 of the original bytes. Ours
is the stage, with the guard, the checks of every image, the order of keys and the commit of each shard; theirs is
``download()``. The time of a shard is from its start to its commit, or to its statistics, which img2dataset writes
last. The rate is that of one process times their number, so it excludes the start of Ray and of their pool; seconds
including the start are reported too. nginx must be on the PATH (``apt-get install nginx-light``).
"""

import contextlib
import json
import os
import pwd
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flows.demo.images import twemoji_folder
from infra import compute
from infra.download.downloader import DownloadPolicy
from tasks.download.config import DownloadConfig
from tasks.download.task import download
from tasks.references.domain_folder import DomainFolder

COPIES, SHARD_ROWS, PROCESSES, THREADS, ROUNDS = 4, 2000, 2, 32, 3

CONFIGURATION = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; {user}
events {{ worker_connections 1024; }}
http {{
  types {{ image/png png; }}
  access_log off; sendfile on; keepalive_timeout 65;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


def bench_download() -> dict[str, Any]:
    """Return images/s of the download stage relative to img2dataset's ``download``."""
    if missing := without_nginx("download"):
        return missing
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        host = stack.enter_context(nginx(folder / "nginx", twemoji_folder()))
        # Several URLs for one image: a run of a few seconds would be too noisy.
        names = sorted(path.name for path in twemoji_folder().glob("*.png"))[:4000]
        files = [f"{name}?{copy}" for copy in range(COPIES) for name in names]
        urls = folder / "urls.parquet"
        pq.write_table(pa.table({"url": [f"http://{host}/{file}" for file in files]}), urls)
        # By default Ray runs its workers at a lower priority than nginx and the pool of img2dataset.
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
        stack.enter_context(compute.cluster(cores=PROCESSES))
        runs: dict[str, list[tuple[float, float]]] = {"ours": [], "img2dataset": []}
        load = os.getloadavg()[0]
        for number in range(ROUNDS):
            runs["ours"].append(of_ours(urls, folder / f"ours-{number}", host, len(files)))
            runs["img2dataset"].append(of_theirs(urls, folder / f"theirs-{number}", len(files)))
            for who, times in runs.items():
                print(f"  {who:26} {times[-1][0]:7.1f} s, load {os.getloadavg()[0]:.1f}", flush=True)
    rates = {who: len(files) / statistics.median(inner for inner, _ in times) for who, times in runs.items()}
    return {
        "images": len(files),
        "processes": PROCESSES,
        "threads": THREADS,
        "shard_rows": SHARD_ROWS,
        "rounds": ROUNDS,
        "ratio_img2dataset": rates["ours"] / rates["img2dataset"],
        **{f"images_s_{who}": rate for who, rate in rates.items()},
        "seconds": {who: [inner for inner, _ in times] for who, times in runs.items()},
        "seconds_with_start": {who: [whole for _, whole in times] for who, times in runs.items()},
        "load_before": load,
    }


def without_nginx(name: str) -> dict[str, str]:
    """Return the result of a benchmark without nginx, or an empty dict if nginx is installed."""
    if shutil.which("nginx"):
        return {}
    missing = "nginx is not on the PATH; install it (apt-get install nginx-light)"
    print(f"{name}: {missing}")
    return {"skipped": missing}


@contextmanager
def nginx(folder: Path, root: Path) -> Iterator[str]:
    """Serve the files of ``root`` with nginx on a free loopback port, and yield host:port."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user = f"user {pwd.getpwuid(0).pw_name};" if os.getuid() == 0 else ""  # the default user is nobody
    (folder / "nginx.conf").write_text(CONFIGURATION.format(folder=folder, port=port, root=root, user=user))
    process = subprocess.Popen(["nginx", "-c", folder / "nginx.conf", "-p", folder], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        else:
            raise SystemExit(f"download: nginx does not answer on port {port}; see {folder / 'error.log'}")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def of_ours(urls: Path, folder: Path, host: str, images: int) -> tuple[float, float]:
    """Return seconds of the shards, and of the whole stage."""
    policy = DownloadPolicy(allow_hosts=(host,), threads=THREADS, retries=0)
    config = DownloadConfig(shard_rows=SHARD_ROWS, policy=policy, workers=PROCESSES)
    started = time.perf_counter()
    reference = download(str(urls), DomainFolder(uri=str(folder)), config).reference
    whole = time.perf_counter() - started
    assert reference.rows == images, f"{reference.rows} of {images}"
    return shard_seconds(Path(reference.uri), "shards/{}.json") / PROCESSES, whole


def of_theirs(urls: Path, folder: Path, images: int) -> tuple[float, float]:
    """Return seconds of the shards, and of the whole run."""
    started = time.perf_counter()
    command = [sys.executable, __file__, str(urls), str(folder)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"})
    whole = time.perf_counter() - started
    assert sum(json.loads(path.read_text())["successes"] for path in folder.glob("*_stats.json")) == images
    return shard_seconds(folder, "{}_stats.json") / PROCESSES, whole


def shard_seconds(folder: Path, last: str) -> float:
    """Sum the seconds of all shards, from the start in img2dataset's statistics to the file written ``last``."""
    total = 0.0
    for path in folder.glob("*_stats.json"):
        end = (folder / last.format(path.name.removesuffix("_stats.json"))).stat().st_mtime
        total += end - float(json.loads(path.read_text())["start_time"])
    return total


def plain(urls: str, folder: str) -> None:
    """Run plain img2dataset; called in its own process."""
    from img2dataset import download

    download(
        urls,
        input_format="parquet",
        output_folder=folder,
        output_format="webdataset",
        processes_count=PROCESSES,
        thread_count=THREADS,
        number_sample_per_shard=SHARD_ROWS,
        image_size=512,
        resize_mode="keep_ratio_largest",
        resize_only_if_bigger=True,
        encode_format="png",
        encode_quality=6,
        min_image_size=8,
        extract_exif=False,
        compute_hash="sha256",
        timeout=10,
        retries=0,
        user_agent_token="img2dataset",  # noqa: S106
    )


if __name__ == "__main__":
    plain(*sys.argv[1:])

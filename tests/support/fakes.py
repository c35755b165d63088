"""Fakes of external systems. Servers listen on loopback."""

import contextlib
import shutil
import socketserver
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Self

PACKAGE = Path(__file__).parents[2] / "model"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Reply to a path. A callable body is sent in pieces, without Content-Length."""

    body: bytes | Callable[[], Iterator[bytes]] = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bool = False  # body is the whole response, with status line and headers
    hangs_up: bool = False  # close the connection afterwards, without a header

    @classmethod
    def redirect(cls, target: str, status: int = 302) -> "Reply":
        return cls(status=status, headers={"Location": target})


class LoopbackServer:
    """A threaded HTTP server with scripted replies: one per path, or a sequence whose last reply repeats.

    ``requests`` lists the requested paths, ``headers`` their headers, and ``hosts`` their Host headers.
    ``keeps_alive`` allows several requests per connection.
    """

    def __init__(
        self,
        replies: Mapping[str, Reply | Sequence[Reply]],
        tls: ssl.SSLContext | None = None,
        *,
        keeps_alive: bool = False,
    ) -> None:
        self.keeps_alive = keeps_alive
        self.reset(replies)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def reset(self, replies: Mapping[str, Reply | Sequence[Reply]]) -> None:
        """Forget all requests, and reply with ``replies`` from now on."""
        self.replies = dict(replies)
        self.requests: list[str] = []
        self.headers: list[Mapping[str, str]] = []
        self.hosts: list[str | None] = []
        self._request_counts: Counter[str] = Counter()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def host(self) -> str:
        """Return ``127.0.0.1:port``, the form of ``allow_hosts``."""
        return f"127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def answer(self, path: str, headers: Mapping[str, str]) -> Reply:
        self.requests.append(path)
        self.headers.append(headers)
        self.hosts.append(headers.get("Host"))
        replies = self.replies.get(path, Reply(status=404))
        if isinstance(replies, Reply):
            return replies
        turn = min(self._request_counts[path], len(replies) - 1)
        self._request_counts[path] += 1
        return replies[turn]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    owner: LoopbackServer

    def handle_error(self, *_: Any) -> None:
        """Ignore clients that close their connection."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.protocol_version = "HTTP/1.1" if self.server.owner.keeps_alive else "HTTP/1.0"

    def do_GET(self) -> None:
        reply = self.server.owner.answer(self.path, self.headers)
        pieces = [reply.body] if isinstance(reply.body, bytes) else reply.body()
        if not reply.raw:
            headers = dict(reply.headers)
            if isinstance(reply.body, bytes):
                headers.setdefault("Content-Length", str(len(reply.body)))
            self.send_response_only(reply.status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)
        self.close_connection = self.close_connection or reply.hangs_up

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


class FakeClock:
    """A clock in seconds that only :meth:`sleep` advances; ``pauses`` lists its arguments."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class Killed(BaseException):
    """Simulated death of a process; not an ``Exception``, so that code under test does not catch it."""


class NormaliserHere:
    """Fake of ``NormaliserProcess`` that decodes in this process: one process for each shard takes long to start."""

    def __init__(self, bounds: Any, limits: Any = None) -> None:
        from infra.download.images import ImageNormaliser

        self._normalise = ImageNormaliser(**asdict(bounds))

    def __call__(self, *arguments: Any) -> Any:
        return self._normalise(*arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing runs."""


class WithoutRay:
    """Fake of ``infra.compute`` that runs workers in this process, without the seconds that Ray takes to start.

    Workers share one copy of the bundled encoder, and decode downloads themselves. Functions and shards of the names in
    ``on_ray`` still run on Ray; then downloads are decoded in processes as well.
    """

    def __init__(self, on_ray: Collection[str] = ()) -> None:
        self.items: list[tuple[str, Any]] = []
        self._on_ray = on_ray

    def install(self, patch: Any) -> None:
        """Replace the functions that stages call; ``patch`` is pytest's monkeypatch."""
        from infra import compute

        self._patch, self._map_shards_on_ray, self._run_on_ray = patch, compute.map_shards, compute.run
        for name in ("map_shards", "run", "actor_group", *(() if self._on_ray else ("cpus", "cluster"))):
            patch.setattr(compute, name, getattr(self, name))
        if not self._on_ray:
            for module in ("downloader", "file_shard"):
                patch.setattr(f"infra.download.{module}.NormaliserProcess", NormaliserHere)

    def map_shards(self, factory: Any, settings: Any, items: Any, *, description: str, **options: Any) -> Iterator[Any]:
        from infra.compute.actor_pool import FailedShard

        if description in self._on_ray:
            yield from self._map_shards_on_ray(factory, settings, items, description=description, **options)
            return
        share_encoder(self._patch)
        queue = list(items)
        worker = factory(*settings) if queue else None
        for item in queue:
            self.items.append((description, item))
            try:
                yield worker(item)
            except Exception as error:
                yield FailedShard(item, error)

    def run(self, function: Any, *arguments: Any, **options: Any) -> Any:
        if function.__name__ in self._on_ray:
            return self._run_on_ray(function, *arguments, **options)
        share_encoder(self._patch)
        return function(*arguments)

    @contextlib.contextmanager
    def actor_group(self, factory: Any, settings: Sequence[Any], **_: Any) -> Iterator["WorkerGroup"]:
        yield WorkerGroup([factory(*one) for one in settings])

    def cpus(self) -> int:
        return 1

    @contextlib.contextmanager
    def cluster(self, *_: Any) -> Iterator[None]:
        yield


def share_encoder(patch: Any) -> None:
    """Load the bundled encoder once per process, until ``patch`` is undone; nothing may change its weights."""
    open_clip = sys.modules.get("open_clip")
    if open_clip is None or isinstance(open_clip.get_tokenizer, partial):  # nothing loads an encoder, or done before
        return
    for name in ("create_model_and_transforms", "get_tokenizer"):
        patch.setattr(open_clip, name, partial(_loaded_once, getattr(open_clip, name)))


class WorkerGroup:
    """Fake of :class:`infra.compute.ActorGroup` with workers in this process."""

    def __init__(self, workers: Sequence[Callable[[Any], Any]]) -> None:
        self._workers = workers

    def call(self, item: Any, of: int | None = None) -> list[Any]:
        return [worker(item) for worker in (self._workers if of is None else [self._workers[of]])]


_LOADED: dict[str, Any] = {}


def _loaded_once(load: Callable[..., Any], name: str, **options: Any) -> Any:
    """Return ``load(name, **options)``, from the memory of this process for a folder of this package."""
    if str(PACKAGE) not in name:
        return load(name, **options)
    key = f"{load.__name__} {name} {options}"
    if key not in _LOADED:
        _LOADED[key] = load(name, **options)
    return _LOADED[key]


class FolderCheckpoints:
    """Training checkpoints in a folder. Saving step ``killed_at`` kills the run, before or after the step is stored."""

    def __init__(self, folder: Path, *, killed_at: int | None = None, before: bool = False) -> None:
        self._folder, self._killed_at, self._before = folder, killed_at, before

    @property
    def steps(self) -> list[int]:
        return sorted(int(path.stem) for path in self._folder.glob("*.pt"))

    def latest(self) -> Path | None:
        return self._folder / f"{self.steps[-1]}.pt" if self.steps else None

    def scratch(self) -> Path:
        return self._folder / "state.partial"

    def save(self, step: int, state: Path) -> None:
        if step == self._killed_at and self._before:
            raise Killed
        shutil.move(state, self._folder / f"{step}.pt")
        if step == self._killed_at:
            raise Killed


class MetricsLog:
    """Metrics in a list of (images seen, values); for sample grids, the images seen."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, dict[str, float]]] = []
        self.grids: list[int] = []

    def log(self, *, images: int, values: dict[str, float]) -> None:
        self.entries.append((images, values))

    def grid(self, *, images: int, average: Any) -> None:
        self.grids.append(images)

    def __getitem__(self, name: str) -> list[float]:
        """Return all values of one metric, in order."""
        return [values[name] for _, values in self.entries]


def workers_of(driver: int) -> list[int]:
    """Return the pids of Ray actors below a process."""
    parents, found = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if (path / "cmdline").read_text().startswith("ray::_Actor"):
                found.append(int(path.name))

    def is_below(pid: int) -> bool:
        return pid == driver or (pid in parents and is_below(parents[pid]))

    return [pid for pid in found if is_below(pid)]

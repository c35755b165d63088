"""Decoding of untrusted images in a process of its own, with limits on time and memory.

A small file can hold hours of work: many scans over the same pixels, or a canvas far larger than its data. No check of
a header finds all such files. So the process that decodes an image is killed when it exceeds a limit, and replaced. It
keeps no state between images and gets no credentials from the environment. Its answers are parsed as untrusted data.

Every format goes this way: the pipe costs a few percent of the decoding and encoding itself.
"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from multiprocessing.connection import Connection, Pipe
from typing import BinaryIO, Self

from infra.download.images import ImageNormaliser, Normalised
from infra.errors import StageError

_START_S = 60.0  # Python, NumPy and Pillow on a busy machine
_BOOT = "import sys; sys.path[:] = sys.argv[3:]; from infra.download.decoder import serve; serve(*sys.argv[1:3])"
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "PATH")
_MAX_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBounds:
    """Sizes of the images that are taken, and the longer side that is stored at most."""

    max_pixels: int
    min_side_px: int
    max_side_px: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """Limits on the decoding of one image."""

    seconds: float  # wall clock
    memory_bytes: int  # data of the whole process

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds is {self.seconds}; give a number above 0")
        if self.memory_bytes < 1:
            raise ValueError(f"memory_bytes is {self.memory_bytes}; give at least 1")

    @classmethod
    def for_pixels(cls, max_pixels: int) -> "DecodeLimits":
        """Return limits that an honest image of ``max_pixels`` keeps in every format: 12 s and 1.2 GiB at 50 million.

        The slowest format measured took 5.8 s for 49 million pixels on a busy core, the largest 936 MiB.
        """
        return cls(seconds=2 + max_pixels / 5e6, memory_bytes=(128 << 20) + 24 * max_pixels)


class NormaliserProcess:
    """A process that normalises images as ``ImageNormaliser`` does, and can be called in its place.

    One image at a time: img2dataset normalises in a single thread. Use it as a context manager.
    """

    def __init__(self, bounds: ImageBounds, limits: DecodeLimits | None = None) -> None:
        """``limits`` are by default those for the largest image within ``bounds``."""
        self._bounds = bounds
        self._limits = limits or DecodeLimits.for_pixels(bounds.max_pixels)
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None

    def __enter__(self) -> Self:
        self._running = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, img_stream: BinaryIO, blurring_bbox_list: object = None) -> Normalised:
        """Normalise one encoded image; refuse one that exceeds a limit with ``decode_timeout`` or ``decode_memory``.

        A codec may report a failed allocation as damaged data, which is then a ``decode_error``.
        """
        if self._running is None:  # the last image exceeded a limit
            self._running = self._start()
        process, pipe = self._running
        with _killed_after(self._limits.seconds, process) as late:
            try:
                pipe.send_bytes(img_stream.read())
                normalised = self._answer(pipe)
            except (OSError, EOFError, ValueError, TypeError) as error:
                self._stop()
                normalised = (None, None, None, None, None, self._cause(process, late.is_set(), error))
        if late.is_set():  # perhaps between the answer and the end of the timer
            self._stop()
        return normalised

    def _answer(self, pipe: Connection) -> Normalised:
        """Receive one answer, whose size is bounded. Raises ``ValueError`` for one of another form."""
        width, height, original_width, original_height, message = json.loads(pipe.recv_bytes(_MAX_HEADER_BYTES))
        if message is not None:
            return None, None, None, None, None, str(message)
        png = pipe.recv_bytes(4 * self._bounds.max_side_px**2 + _MAX_HEADER_BYTES)
        return png, int(width), int(height), int(original_width), int(original_height), None

    def _cause(self, process: subprocess.Popen[bytes], late: bool, error: Exception) -> str:
        if late:
            return f"decode_timeout: not decoded after {self._limits.seconds:g} s"
        if process.returncode == -signal.SIGABRT:  # C++ codecs abort where they get no memory
            return "decode_memory: the decoder aborted"
        if isinstance(error, OSError | EOFError) and process.returncode < 0:  # it closed the pipe, and not by an answer
            return f"decoder_died: the decoder was ended by signal {-process.returncode}"
        return f"decode_error: the decoder ended with {process.returncode} ({type(error).__name__})"

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        settings = json.dumps({"bounds": asdict(self._bounds), "limits": asdict(self._limits)})
        command = [sys.executable, "-I", "-c", _BOOT, str(theirs.fileno()), settings, *map(os.path.abspath, sys.path)]
        variables = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        with theirs:
            process = subprocess.Popen(  # noqa: S603  # our own interpreter and our own code
                command, env={**variables, "OPENBLAS_NUM_THREADS": "1"}, pass_fds=[theirs.fileno()]
            )
        try:
            if not ours.poll(_START_S) or ours.recv_bytes(_MAX_HEADER_BYTES) != b"ready":
                raise EOFError
        except (OSError, EOFError) as error:
            _end(process, ours)
            raise StageError("the image decoder did not start; the log of this process says why") from error
        return process, ours

    def _stop(self) -> None:
        if self._running is not None:
            _end(*self._running)
            self._running = None


@contextmanager
def _killed_after(seconds: float, process: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """Kill ``process`` if the block takes longer than ``seconds``; the event says so afterwards."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        timer.join()


def _end(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    pipe.close()
    process.kill()
    process.wait()


def serve(descriptor: str, settings: str) -> None:
    """Run the process's side: answer one image after another, until the other side of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, but the parent decides
    given = json.loads(settings)
    limits = DecodeLimits(**given["limits"])
    normalise = ImageNormaliser(**given["bounds"])
    _limit_codecs()
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = Connection(int(descriptor))
    pipe.send_bytes(b"ready")
    while True:
        try:
            data = pipe.recv_bytes()
            signal.alarm(math.ceil(limits.seconds) + 1)  # in case the parent, which keeps the time, is dead
            png, *sizes, message = normalise(BytesIO(data))
            signal.alarm(0)
            pipe.send_bytes(json.dumps([*sizes, message]).encode())
            if png is not None:
                pipe.send_bytes(png)
        except (EOFError, BrokenPipeError):
            return


def _limit_codecs() -> None:
    """Let AVIF decode in one thread: each thread takes memory, and the download has threads of its own."""
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1

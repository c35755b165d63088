"""Decoding of untrusted images in a separate process, with limits on time and memory.

A small file can take hours to decode: it may have many scans over the same pixels, or a canvas far larger than its
data. No check of the header detects all such files. The decoding process is therefore killed and replaced when it
exceeds a limit. It keeps no state between images and gets no credentials from the environment. Its replies are parsed
as untrusted data.

All formats are decoded this way: the pipe adds a few percent to the time of decoding and encoding.
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
from infra.errors import ConfigError, StageError

_START_S = 60.0  # Python, NumPy and Pillow on a busy machine
_BOOT = "import sys; sys.path[:] = sys.argv[3:]; from infra.download.decoder import serve; serve(*sys.argv[1:3])"
_PASSED_VARIABLES = ("LD_LIBRARY_PATH", "PATH")
_MAX_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBounds:
    """Size limits: pixels and shorter side of accepted images, and the maximum longer side of stored images."""

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
            raise ConfigError(f"seconds is not positive and finite: {self.seconds}; give a number above 0")
        if self.memory_bytes < 1:
            raise ConfigError(f"memory_bytes is not positive: {self.memory_bytes}; give at least 1")

    @classmethod
    def for_pixels(cls, max_pixels: int) -> "DecodeLimits":
        """Return limits that are sufficient for a regular image of ``max_pixels`` pixels in every format.

        For 50 million pixels they are 12 s and 1.2 GiB. Measured for 49 million pixels on a busy core: the slowest
        format took 5.8 s, and the largest memory use was 936 MiB.
        """
        return cls(seconds=2 + max_pixels / 5e6, memory_bytes=(128 << 20) + 24 * max_pixels)


class NormaliserProcess:
    """A drop-in replacement for ``ImageNormaliser`` that runs it in a separate process.

    It handles one image at a time, because img2dataset normalises in a single thread. Use it as a context manager.
    """

    def __init__(self, bounds: ImageBounds, limits: DecodeLimits | None = None) -> None:
        """Set the size bounds; ``limits`` default to those for the largest image within ``bounds``."""
        self._bounds = bounds
        self._limits = limits or DecodeLimits.for_pixels(bounds.max_pixels)
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None

    def __enter__(self) -> Self:
        self._running = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, img_stream: BinaryIO, blurring_bbox_list: object = None) -> Normalised:
        """Normalise one encoded image; reject it with ``decode_timeout`` or ``decode_memory`` if it exceeds a limit.

        A codec may report a failed allocation as corrupt data; the error is then ``decode_error``.
        """
        if self._running is None:  # the last image exceeded a limit
            self._running = self._start()
        process, pipe = self._running
        with _killed_after(self._limits.seconds, process) as timed_out:
            try:
                pipe.send_bytes(img_stream.read())
                normalised = self._receive(pipe)
            except (OSError, EOFError, ValueError, TypeError) as error:
                self._stop()
                normalised = (None, None, None, None, None, self._cause(process, timed_out.is_set(), error))
        if timed_out.is_set():  # the timer may fire after the reply was received
            self._stop()
        return normalised

    def _receive(self, pipe: Connection) -> Normalised:
        """Receive one reply of bounded size. Raises ``ConfigError`` if it is malformed."""
        width, height, original_width, original_height, message = json.loads(pipe.recv_bytes(_MAX_HEADER_BYTES))
        if message is not None:
            return None, None, None, None, None, str(message)
        png = pipe.recv_bytes(4 * self._bounds.max_side_px**2 + _MAX_HEADER_BYTES)
        return png, int(width), int(height), int(original_width), int(original_height), None

    def _cause(self, process: subprocess.Popen[bytes], timed_out: bool, error: Exception) -> str:
        if timed_out:
            return f"decode_timeout: decoding took longer than {self._limits.seconds:g} s"
        if process.returncode == -signal.SIGABRT:  # C++ codecs abort when an allocation fails
            return "decode_memory: the decoder aborted"
        if isinstance(error, OSError | EOFError) and process.returncode < 0:  # the pipe was closed without a reply
            return f"decoder_died: the decoder was killed by signal {-process.returncode}"
        return f"decode_error: the decoder exited with status {process.returncode} ({type(error).__name__})"

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        settings = json.dumps({"bounds": asdict(self._bounds), "limits": asdict(self._limits)})
        command = [sys.executable, "-I", "-c", _BOOT, str(theirs.fileno()), settings, *map(os.path.abspath, sys.path)]
        variables = {name: os.environ[name] for name in _PASSED_VARIABLES if name in os.environ}
        with theirs:
            process = subprocess.Popen(  # noqa: S603  # this interpreter and this package
                command, env={**variables, "OPENBLAS_NUM_THREADS": "1"}, pass_fds=[theirs.fileno()]
            )
        try:
            if not ours.poll(_START_S) or ours.recv_bytes(_MAX_HEADER_BYTES) != b"ready":
                raise EOFError
        except (OSError, EOFError) as error:
            _end(process, ours)
            raise StageError("the image decoder did not start; see the log of this process") from error
        return process, ours

    def _stop(self) -> None:
        if self._running is not None:
            _end(*self._running)
            self._running = None


@contextmanager
def _killed_after(seconds: float, process: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """Kill ``process`` if the block takes longer than ``seconds``; the yielded event is then set."""
    timed_out = threading.Event()

    def kill() -> None:
        timed_out.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield timed_out
    finally:
        timer.cancel()
        timer.join()


def _end(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    pipe.close()
    process.kill()
    process.wait()


def serve(descriptor: str, settings: str) -> None:
    """Run the decoding process: normalise images from the pipe until its other end is closed.

    Args:
        descriptor: File descriptor of the pipe.
        settings: JSON object with ``bounds`` (:class:`ImageBounds`) and ``limits`` (:class:`DecodeLimits`).
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole process group; the parent decides when to stop
    parsed = json.loads(settings)
    limits = DecodeLimits(**parsed["limits"])
    normalise = ImageNormaliser(**parsed["bounds"])
    _limit_codecs()
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = Connection(int(descriptor))
    pipe.send_bytes(b"ready")
    while True:
        try:
            data = pipe.recv_bytes()
            signal.alarm(math.ceil(limits.seconds) + 1)  # in case the parent, which enforces the limit, is dead
            png, *sizes, message = normalise(BytesIO(data))
            signal.alarm(0)
            pipe.send_bytes(json.dumps([*sizes, message]).encode())
            if png is not None:
                pipe.send_bytes(png)
        except (EOFError, BrokenPipeError):
            return


def _limit_codecs() -> None:
    """Decode AVIF in one thread: each thread needs memory, and the download already uses many threads."""
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1

"""Images that kill the process that decodes them: their bytes contain a mark."""

import io
import os
import signal
from typing import Any, BinaryIO

from infra.download.decoder import NormaliserProcess
from infra.download.images import Normalised
from tasks.embed import worker

MARK = b"kills its decoder"  # after the end of a PNG, where decoders do not read


def fit(preprocessing: Any, encoded: bytes) -> Any:
    """Decode for embedding; kill this process for a marked image."""
    if MARK in encoded:
        os.kill(os.getpid(), signal.SIGKILL)
    return worker.fitted(preprocessing, encoded)


class Normaliser(NormaliserProcess):
    """Decode at download; kill the decoder process for a marked image."""

    def __call__(self, img_stream: BinaryIO, blurring_bbox_list: object = None) -> Normalised:
        data = img_stream.read()
        if MARK in data and self._running is not None:
            os.kill(self._running[0].pid, signal.SIGSEGV)
        return super().__call__(io.BytesIO(data), blurring_bbox_list)

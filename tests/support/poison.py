"""Images that kill the process that decodes them: any whose bytes hold the mark."""

import io
import os
import signal
from typing import Any, BinaryIO

from infra.download.images import Normalised, PictureNormaliser
from tasks.embed import worker

MARK = b"kills its decoder"  # behind the end of a PNG, where decoders do not look


def fit(preprocessing: Any, encoded: bytes) -> Any:
    """Decode for embedding."""
    if MARK in encoded:
        os.kill(os.getpid(), signal.SIGKILL)
    return worker.fitted(preprocessing, encoded)


class Normaliser(PictureNormaliser):
    """Decode at download."""

    def __call__(self, img_stream: BinaryIO, blurring_bbox_list: object = None) -> Normalised:
        data = img_stream.read()
        if MARK in data:
            os.abort()
        return super().__call__(io.BytesIO(data))

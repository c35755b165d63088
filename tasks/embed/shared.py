"""Settings and names that the embedding stage shares with its workers. Importing them needs no torch."""

import dataclasses

SECONDS = ("read_s", "decode_s", "compute_s", "write_s", "turn_s")
"""Times in a shard's info, in seconds. ``decode_s`` is summed over the decoders. ``turn_s`` is the time since the end
of the previous shard's turn on the device, including waiting."""

DECODER_DIED = "decoder_died"
"""Outcome of an image whose decoding kills the process."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """Encoder, batch size, device and number of decoders of a worker."""

    encoder: str
    batch_size: int
    cuda: bool
    decoders: int

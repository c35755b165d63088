"""Image tokens of retrieved neighbours, for a network that takes their images.

Legend: ``P`` prompts, ``I`` images of a prompt, ``N`` image tokens, ``D`` embedding width, ``S`` side.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.generation.batching import run_batched
from model.generation.start import as_start
from model.networks.image_tokens import NeighbourImageTransformer
from model.retrieval.searchable import Searchable


@torch.no_grad()
def encode_neighbours(network: NeighbourImageTransformer, ids: NDArray[np.int64], database: Searchable) -> Tensor:
    """Encode the stored images of the nearest neighbours, once for all sampling steps: (P, N, D) on the CPU.

    Args:
        network: The network that will see them.
        ids: (P, K) row ids, nearest first; negative ones are hidden.
        database: Where the images are stored.

    Raises:
        ModelError: The database has no images.
    """
    ids = ids[:, : network.config.neighbour_images]
    side, shown = network.config.sample_size, torch.from_numpy(ids >= 0)
    unique, inverse = np.unique(ids[ids >= 0], return_inverse=True)
    images = torch.zeros(*ids.shape, 3, side, side)
    if len(unique):
        images[shown] = as_start(database.images(unique.tolist()), side)[torch.from_numpy(inverse)]

    def encode(rows: slice, _: object) -> Tensor:
        return network.encode_images(images[rows].to(network.device), shown[rows].to(network.device)).float()

    return run_batched(encode, len(ids), 1, network.device, None)

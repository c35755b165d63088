"""Image tokens of retrieved neighbours, for a network that takes their images.

Legend: ``P`` prompts, ``I`` images of a prompt, ``N`` image tokens, ``D`` embedding width, ``S`` side.
"""

import numpy as np
import torch
from torch import Tensor

from model.generation.batching import run_batched
from model.generation.start import as_start
from model.networks.image_tokens import NeighbourImageTransformer, choose_distinct
from model.retrieval.searchable import Hits, Searchable


@torch.no_grad()
def encode_neighbours(network: NeighbourImageTransformer, hits: Hits, database: Searchable) -> Tensor:
    """Encode the stored images of the nearest neighbours, once for all sampling steps: (P, N, D) on the CPU.

    Near-duplicates of the query are left out, as in training. For a stored image they include the image itself.

    Args:
        network: The network that will see them.
        hits: Neighbours of the prompts, nearest first; negative ids are missing ones.
        database: Where the images are stored.

    Raises:
        ModelError: The database has no images.
    """
    all_ids = torch.from_numpy(hits.ids)
    first, shown = choose_distinct(torch.from_numpy(hits.scores), all_ids >= 0, network.config.neighbour_images)
    ids, side = all_ids.gather(1, first), network.config.sample_size
    unique, inverse = np.unique(ids[shown].numpy(), return_inverse=True)
    images = torch.zeros(*ids.shape, 3, side, side)
    if len(unique):
        images[shown] = as_start(database.images(unique.tolist()), side)[torch.from_numpy(inverse)]

    def encode(rows: slice, _: object) -> Tensor:
        return network.encode_images(images[rows].to(network.device), shown[rows].to(network.device)).float()

    return run_batched(encode, len(ids), 1, network.device, None)

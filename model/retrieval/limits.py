"""Limits on what FAISS allocates and loops over while it reads an index file.

A file's digest is checked before the file is read. These limits bound the harm of a file whose digest is right all the
same: one that somebody registered on purpose. They are global to the process and must be set before the first read,
so importing anything of :mod:`model.retrieval` sets them. FAISS before 1.15 lacks some of them.
"""

import faiss

MOST_CELLS = 1 << 20
"""Cells of an index. ``auto`` takes 2¹⁷ for the 10⁹ rows that a database can hold; FAISS advises 2²⁰ at most."""
MOST_VECTOR_BYTES = 1 << 37
"""One array of a file: 2²⁴ rows, the default of ``shard_rows``, of 2048 float32 values, uncompressed."""
MOST_LATTICE_R2 = 1 << 10
"""Squared radius of a lattice quantizer. ``auto`` takes none; FAISS's own examples stay below 100."""


def apply_limits() -> None:
    """Set the limits that the installed FAISS has."""
    limits = {
        "set_deserialization_loop_limit": MOST_CELLS,
        "set_deserialization_vector_byte_limit": MOST_VECTOR_BYTES,
        "set_deserialization_lattice_r2_limit": MOST_LATTICE_R2,
    }
    for name, value in limits.items():
        if hasattr(faiss, name):
            getattr(faiss, name)(value)


apply_limits()

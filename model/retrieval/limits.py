"""Limits on FAISS's allocations and loops while it reads an index file.

A file's digest is checked before the file is read. These limits protect against a malicious file that has the expected
digest because its author registered it. They are global to the process and must be set before the first read, so
importing any module of :mod:`model.retrieval` sets them. FAISS before 1.15 lacks some of them.
"""

import faiss

MAX_CELLS = 1 << 20
"""Maximum cells of an index. ``auto`` uses 2¹⁷ for a database of 10⁹ rows; FAISS recommends at most 2²⁰."""
MAX_VECTOR_BYTES = 1 << 37
"""Maximum bytes of an array: 2²⁴ uncompressed rows (the default of ``shard_rows``) of 2048 float32 values."""
MAX_LATTICE_R2 = 1 << 10
"""Maximum squared radius of a lattice quantizer. ``auto`` never uses one; FAISS's own examples stay below 100."""


def apply_limits() -> None:
    """Set the limits that the installed FAISS version supports."""
    limits = {
        "set_deserialization_loop_limit": MAX_CELLS,
        "set_deserialization_vector_byte_limit": MAX_VECTOR_BYTES,
        "set_deserialization_lattice_r2_limit": MAX_LATTICE_R2,
    }
    for name, value in limits.items():
        if hasattr(faiss, name):
            getattr(faiss, name)(value)


apply_limits()

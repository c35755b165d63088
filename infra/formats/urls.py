"""Normal forms of whole columns of URLs."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.uris import normal_url

_PLAIN = r"https?://[a-z0-9][a-z0-9.\-]*/(?:[A-Za-z0-9_~!$&'()*+,;=:@\-]+[A-Za-z0-9._~!$&'()*+,;=:@\-]*/?)*"
_NORMAL = rf"^{_PLAIN}(?:\?[A-Za-z0-9._~!$&'()*+,;=:@/?\-]+)?$"
"""URLs that are in normal form already. Others may be as well, but need a closer look."""


def normal_urls(urls: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return the normal form of each URL of a string column; null stays null."""
    column = urls.combine_chunks() if isinstance(urls, pa.ChunkedArray) else urls
    column = column.cast(pa.string())
    odd = pc.invert(pc.match_substring_regex(column, _NORMAL)).fill_null(False)
    places = np.flatnonzero(odd.to_numpy(zero_copy_only=False))
    if not len(places):
        return column
    changed = [normal_url(url) for url in column.take(pa.array(places)).to_pylist()]
    return pc.replace_with_mask(column, odd, pa.array(changed, pa.string()))

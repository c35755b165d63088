"""A server that behaves as real servers do, in ways that a strict client fails on: one path for each."""

import gzip
import zlib
from collections.abc import Mapping, Sequence

import brotli
from support.fakes import LoopbackServer, Reply

IMAGE = b"image" * 100
ENCODED = {
    "gzip": gzip.compress(IMAGE),
    "x-gzip": gzip.compress(IMAGE[:100]) + gzip.compress(IMAGE[100:]),
    "gzip, identity": gzip.compress(IMAGE) + b"padding",
    "deflate": zlib.compress(IMAGE),
    "deflate,": zlib.compress(IMAGE)[2:-4],  # without its header and checksum
    "br": brotli.compress(IMAGE),
    "BR": brotli.compress(IMAGE),
    "": IMAGE,
    "identity": IMAGE,
    "utf-8": IMAGE,
}
"""Bodies by the value of their ``Content-Encoding``; all decode to ``IMAGE``."""

DAMAGED = {
    "gzip": IMAGE,
    "deflate": zlib.compress(IMAGE)[:-5],
    "br": brotli.compress(IMAGE)[:-3],
    "x-gzip": gzip.compress(IMAGE)[:-1],
    "gzip, gzip": gzip.compress(gzip.compress(IMAGE)),
    "zstd": b"\x28\xb5\x2f\xfd",
}
"""Bodies by ``Content-Encoding`` that cannot be decoded."""

BOMB_BYTES = 50_000_000
BOMBS = {
    "gzip": gzip.compress(bytes(BOMB_BYTES)),
    "deflate": zlib.compress(bytes(BOMB_BYTES)),
    "br": brotli.compress(bytes(BOMB_BYTES), quality=1),
}
"""Small bodies by ``Content-Encoding`` that decode to ``BOMB_BYTES``."""

INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"


class OddServer(LoopbackServer):
    """A loopback server with the paths of this module, in addition to the given ones.

    /encoded/N, /damaged/N, /bomb/N    entry N of the tables above
    /interim                           two interim responses before the image
    /cookie                            redirects, with cookies, to /cookie/2 and then to /image
    /pause/STATUS                      that status with Retry-After: 2, then the image
    """

    def __init__(self, replies: Mapping[str, Reply | Sequence[Reply]] | None = None) -> None:
        image = Reply(body=IMAGE)
        tables = {"encoded": ENCODED, "damaged": DAMAGED, "bomb": BOMBS}
        length = f"HTTP/1.1 200 OK\r\nContent-Length: {len(IMAGE)}\r\n\r\n".encode()
        cookies = b"Set-Cookie: b=2; Path=/\r\nSet-Cookie: c=caf\xe9; Path=/\r\n"
        second = b"HTTP/1.1 302 Found\r\nLocation: /image\r\n" + cookies + b"\r\n"
        pauses = {status: Reply(status=status, headers={"Retry-After": "2"}) for status in (429, 503)}
        paths: dict[str, Reply | Sequence[Reply]] = {
            "/image": image,
            "/interim": Reply(body=INTERIM + length + IMAGE, raw=True),
            "/cookie": Reply(status=302, headers={"Location": "/cookie/2", "Set-Cookie": "a=1; Path=/"}),
            "/cookie/2": Reply(body=second, raw=True),
            **{f"/pause/{status}": (pause, image) for status, pause in pauses.items()},
        }
        for name, bodies in tables.items():
            for number, (encoding, body) in enumerate(bodies.items()):
                paths[f"/{name}/{number}"] = Reply(body=body, headers={"Content-Encoding": encoding})
        super().__init__({**paths, **(replies or {})})

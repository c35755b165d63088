"""Decoding of bodies that arrive in pieces."""

import gzip

import pytest

from infra.download.content_encoding import decoder_of

FIRST, SECOND = gzip.compress(b"first "), gzip.compress(b"second")


def decoded(*pieces: bytes) -> bytes:
    decode = decoder_of("gzip")
    return b"".join(block for piece in (*pieces, b"") for block in decode(piece))


@pytest.mark.parametrize("cut", range(len(FIRST + SECOND) + 1))
def test_gzip_members_are_decoded_wherever_a_read_ends(cut: int) -> None:
    body = FIRST + SECOND
    assert decoded(body[:cut], body[cut:]) == b"first second"


@pytest.mark.parametrize("pieces", [(FIRST + b"\x1f",), (FIRST + b"\x1f", b"a"), (FIRST + b"a", SECOND)])
def test_gzip_ignores_other_bytes_after_a_member(pieces: tuple[bytes, ...]) -> None:
    assert decoded(*pieces) == b"first "

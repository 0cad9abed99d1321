"""`service.codec.bitstream`: the container reads back what it wrote and refuses everything else by name."""

import struct
from dataclasses import replace

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codec.bitstream import (
    Bitstream,
    BitstreamError,
    CorruptBitstream,
    Degradation,
    DegradationKind,
    NotABitstream,
    UnsupportedVersion,
)

EXAMPLE = Bitstream(
    bytes(range(8)), 4, 768, 512, (Degradation(DegradationKind.HAZE, 0.2), Degradation(DegradationKind.NOISE, 1.0)),
    b"\x01\x02\x03", b"payload",
)  # fmt: skip


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", google_crc32c.value(body))


def test_layout_is_the_documented_one() -> None:
    data = EXAMPLE.to_bytes()
    assert data[:6] == b"\x89LMP\x01\x04"
    assert data[6:14] == bytes(range(8))
    assert struct.unpack_from("<II", data, 14) == (768, 512)
    assert data[22] == 2
    assert data[23:27] == bytes([4, 51, 1, 255])
    assert struct.unpack_from("<II", data, 27) == (3, 7)
    assert data[35:45] == b"\x01\x02\x03payload"
    assert data[45:] == struct.pack("<I", google_crc32c.value(data[:45]))


@given(
    rate=st.integers(1, 8), width=st.integers(1, 2**32 - 1), height=st.integers(1, 2**32 - 1),
    outliers=st.binary(max_size=30), payload=st.binary(max_size=300), model=st.binary(min_size=8, max_size=8),
)  # fmt: skip
def test_round_trip(rate: int, width: int, height: int, outliers: bytes, payload: bytes, model: bytes) -> None:
    stream = Bitstream(model, rate, width, height, (), outliers, payload)
    assert Bitstream.from_bytes(stream.to_bytes()) == stream


@pytest.mark.parametrize("length", range(len(EXAMPLE.to_bytes())))
def test_every_cut_is_found(length: int) -> None:
    with pytest.raises(CorruptBitstream if length >= 4 else NotABitstream):
        Bitstream.from_bytes(EXAMPLE.to_bytes()[:length])


@pytest.mark.parametrize("bit", range(8 * len(EXAMPLE.to_bytes())))
def test_every_flipped_bit_is_found(bit: int) -> None:
    data = bytearray(EXAMPLE.to_bytes())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BitstreamError):
        Bitstream.from_bytes(bytes(data))


@pytest.mark.parametrize(
    ("offset", "value", "error"),
    [
        (4, 2, UnsupportedVersion),
        (5, 0, CorruptBitstream),
        (5, 9, CorruptBitstream),
        (22, 17, CorruptBitstream),
        (22, 255, CorruptBitstream),
        (27, 4, CorruptBitstream),
        (34, 127, CorruptBitstream),
    ],
)
def test_a_forged_field_under_a_right_checksum_is_refused(offset: int, value: int, error: type[BitstreamError]) -> None:
    body = bytearray(EXAMPLE.to_bytes()[:-4])
    body[offset] = value
    with pytest.raises(error):
        Bitstream.from_bytes(sealed(bytes(body)))


def test_what_a_later_report_may_tell_is_passed_over() -> None:
    body = bytearray(EXAMPLE.to_bytes()[:-4])
    body[23] = 99
    stream = Bitstream.from_bytes(sealed(bytes(body)))
    assert stream == replace(EXAMPLE, degradations=EXAMPLE.degradations[1:])


def test_a_size_of_zero_is_refused_both_ways() -> None:
    body = EXAMPLE.to_bytes()[:-4]
    with pytest.raises(CorruptBitstream, match="at least 1x1"):
        Bitstream.from_bytes(sealed(body[:14] + bytes(4) + body[18:]))
    with pytest.raises(ValueError, match="at least 1x1"):
        Bitstream(bytes(8), 1, 0, 5, (), b"", b"").to_bytes()


@given(st.binary(max_size=100))
def test_any_bytes_are_a_stream_or_a_bitstream_error(data: bytes) -> None:
    for candidate in (data, b"\x89LMP\x01" + data, sealed(b"\x89LMP\x01" + data)):
        try:
            Bitstream.from_bytes(candidate)
        except BitstreamError:
            continue


def test_a_report_that_runs_past_the_end_is_refused() -> None:
    """As long as a stream may be at least, under a right checksum."""
    body = EXAMPLE.to_bytes()[:22] + b"\x10" + bytes(8)
    with pytest.raises(CorruptBitstream, match="runs past the end"):
        Bitstream.from_bytes(sealed(body))

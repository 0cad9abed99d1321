"""`service.codec.rans`: what goes in comes out, and no bytes can break the decoder."""

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.codec import rans
from service.codec.rans import SYMBOL_LIMIT, CorruptPayload, Decoder, Encoder, GuardedTables, Outliers, leb128
from service.codec.tables import SCALE_LEVELS, CdfTables, gaussian_tables, logistic_tables

TABLES = GuardedTables(gaussian_tables())


def sample(count: int, seed: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    levels = rng.integers(1, SCALE_LEVELS, count).astype(np.int32)
    scale = 0.11 * np.exp(0.123 * levels)
    return TABLES.clip(np.rint(rng.normal(0, scale)).astype(np.int32), levels), levels


@given(seed=st.integers(0, 10**6), first=st.integers(4, 300), second=st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_groups_come_back_in_order(seed: int, first: int, second: int) -> None:
    groups = [sample(first, seed), sample(second, seed + 1)]
    encoder = Encoder()
    for symbols, levels in groups:
        encoder.add(symbols, levels, TABLES)
    decoder = Decoder(encoder.finish(), first + second)
    for symbols, levels in groups:
        assert np.array_equal(decoder.take(levels, TABLES), symbols)


@given(payload=st.binary(max_size=200), seed=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_any_bytes_decode_to_symbols_inside_their_tables(payload: bytes, seed: int) -> None:
    _, levels = sample(500, seed)
    symbols = Decoder(payload, 500).take(levels, TABLES)
    assert np.array_equal(TABLES.clip(symbols, levels), symbols)


@pytest.mark.parametrize("length", [0, 1, 7, 60])
def test_the_decoder_never_reads_past_what_it_was_given(length: int) -> None:
    """Beyond the stream stand zeros, as many as it could ever read, not what lies in memory there."""
    _, levels = sample(500, length)
    payload = np.random.default_rng(length).bytes(length)
    padded = payload.ljust(4 * 504, b"\0")
    assert np.array_equal(Decoder(payload, 500).take(levels, TABLES), Decoder(padded, 500).take(levels, TABLES))


def test_every_table_ends_with_the_sentinel_that_keeps_the_escape_out_of_reach() -> None:
    for row, size in zip(TABLES.rows, TABLES.sizes):
        assert row[-2:] == [1 << 16, 1 << 16]
        assert len(row) == size


def test_what_is_coded_in_several_calls_is_the_same_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    symbols, levels = sample(1000, 5)

    def coded() -> bytes:
        encoder = Encoder()
        encoder.add(symbols, levels, TABLES)
        return encoder.finish()

    whole = coded()
    monkeypatch.setattr(rans, "_AT_ONCE", 300)
    assert coded() == whole
    assert np.array_equal(Decoder(whole, 1000).take(levels, TABLES), symbols)


def test_rate_is_within_half_a_percent_of_the_entropy() -> None:
    symbols, levels = sample(50_000, 3)
    encoder = Encoder()
    encoder.add(symbols, levels, TABLES)
    tables = TABLES.tables
    at = symbols - tables.offset[levels]
    frequency = tables.cdf[levels, at + 1] - tables.cdf[levels, at]
    ideal = float(-np.log2(frequency / 65536).sum())
    assert 8 * len(encoder.finish()) < 1.005 * ideal + 64


def test_the_guard_refuses_what_the_coder_would_crash_on() -> None:
    with pytest.raises(ValueError, match="at least 4 symbols"):
        Encoder().add(np.zeros(1, np.int32), np.ones(1, np.int32), TABLES)
    with pytest.raises(ValueError, match="inside its table"):
        Encoder().add(np.full(8, 9000, np.int32), np.ones(8, np.int32), TABLES)
    with pytest.raises(ValueError, match="no more symbols"):
        Decoder(b"", 3).take(np.ones(4, np.int32), TABLES)


@given(
    values=st.dictionaries(st.integers(0, 10**6), st.integers(-SYMBOL_LIMIT, SYMBOL_LIMIT).filter(bool), max_size=40),
)
def test_outliers_round_trip(values: dict[int, int]) -> None:
    positions = sorted(values)
    outliers = Outliers(np.array(positions, np.int32), np.array([values[p] for p in positions], np.int32))
    back = Outliers.from_bytes(outliers.to_bytes(), 10**6 + 1)
    assert back.position.tolist() == positions
    assert back.excess.tolist() == outliers.excess.tolist()


@given(data=st.binary(max_size=60))
def test_any_outlier_bytes_are_a_list_or_an_error(data: bytes) -> None:
    try:
        outliers = Outliers.from_bytes(data, 100)
    except CorruptPayload:
        return
    assert (np.diff(outliers.position) > 0).all()
    assert (np.abs(outliers.excess) <= 2 * SYMBOL_LIMIT).all()


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((1, 1, 2**31), "one too large"),
        ((2, 1, 2), "does not end where it should"),
        ((1, 1, 2, 1, 2), "does not end where it should"),
        ((1, 0, 2), "out of range"),
        ((1, 1, 0), "out of range"),
        ((1, 1, 4 * SYMBOL_LIMIT + 1), "out of range"),
        ((1, 101, 2), "beyond the 100 latents"),
    ],
)
def test_a_list_of_outliers_that_cannot_be_is_refused(numbers: tuple[int, ...], said: str) -> None:
    assert Outliers.from_bytes(leb128([1, 100, 4 * SYMBOL_LIMIT]), 100).excess.tolist() == [2 * SYMBOL_LIMIT]
    with pytest.raises(CorruptPayload, match=said):
        Outliers.from_bytes(leb128(numbers), 100)


def test_an_outlier_beyond_the_largest_symbol_is_refused() -> None:
    outliers = Outliers(np.array([1], np.int32), np.array([5], np.int32))
    assert outliers.apply(np.array([0, SYMBOL_LIMIT - 5], np.int32)).tolist() == [0, SYMBOL_LIMIT]
    with pytest.raises(CorruptPayload, match="a symbol beyond"):
        outliers.apply(np.array([0, SYMBOL_LIMIT - 4], np.int32))


def test_more_bytes_than_a_photo_can_need_are_refused_unread() -> None:
    with pytest.raises(CorruptPayload, match="more than 65 numbers"):
        Outliers.from_bytes(b"\1" * 10**6, 32)
    with pytest.raises(CorruptPayload, match="for 32 symbols"):
        Decoder(bytes(10**6), 32)


def test_a_long_list_of_outliers_costs_memory_by_its_length() -> None:
    random = np.random.default_rng(3)
    steps, excess = random.integers(1, 300, 10**6), random.integers(1, SYMBOL_LIMIT, 10**6)
    outliers = Outliers(np.cumsum(steps).astype(np.int32) - 1, excess.astype(np.int32))
    data = outliers.to_bytes()
    tracemalloc.start()
    back = Outliers.from_bytes(data, int(steps.sum()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(back.position, outliers.position)
    assert np.array_equal(back.excess, outliers.excess)
    assert peak < 12 * len(data)
    with pytest.raises(CorruptPayload, match="beyond"):
        Outliers.from_bytes(data, int(steps.sum()) - 1)


def test_clipped_symbols_are_restored_across_groups() -> None:
    symbols = [np.array([0, 500, 0, -900], np.int32), np.array([77, 0], np.int32)]
    clipped = [np.clip(group, -10, 10) for group in symbols]
    listed = Outliers.between(np.concatenate(symbols), np.concatenate(clipped))
    listed = Outliers.from_bytes(listed.to_bytes(), 6)
    assert listed.within(0, 4).apply(clipped[0]).tolist() == symbols[0].tolist()
    assert listed.within(4, 2).apply(clipped[1]).tolist() == symbols[1].tolist()


def test_a_decoder_that_is_written_from_the_page_reads_the_payload() -> None:
    """docs/bitstream.md, "The payload"."""
    tables = GuardedTables(logistic_tables(np.array([0.0, 8.0, -3.5]), np.array([0.05, 1.0, 5.0])))
    rows = np.arange(3000, dtype=np.int32) % 3
    symbols = tables.clip(np.random.default_rng(1).integers(-40, 40, 3000).astype(np.int32), rows)
    encoder = Encoder()
    encoder.add(symbols, rows, tables)
    words = iter(np.frombuffer(encoder.finish(), "<u4").tolist())
    x, found = next(words) + (next(words) << 32), []
    for row in rows:
        cdf, v = tables.rows[row], x & 0xFFFF
        k = max(index for index in range(tables.sizes[row]) if cdf[index] <= v)
        found.append(tables.offsets[row] + k)
        x = (cdf[k + 1] - cdf[k]) * (x >> 16) + v - cdf[k]
        if x < 2**31:
            x = x << 32 | next(words, 0)
    assert found == symbols.tolist()


def test_tables_sum_to_one_and_leave_no_symbol_without_mass() -> None:
    for tables in (gaussian_tables(), logistic_tables(np.array([0.0, 80.0, -3.5]), np.array([0.05, 1.0, 50.0]))):
        for row, size in zip(tables.cdf, tables.size):
            assert row[0] == 0
            assert row[size - 1] == 65536
            assert (np.diff(row[:size]) >= 1).all()


def test_the_coder_comes_without_the_package_around_it() -> None:
    script = """
import sys
from service.codec.rans import Encoder
Encoder()
assert "compressai.ans" in sys.modules
assert not {"compressai", "torchvision"} & set(sys.modules), "start-up pays for what it does not use"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("cdf", lambda cdf: cdf * 0),
        ("cdf", lambda cdf: cdf + 1),
        ("cdf", lambda cdf: np.where(np.arange(cdf.shape[1]) == 2, cdf[:, 1:2], cdf)),
        ("cdf", lambda cdf: np.minimum(cdf, 60000)),
        ("cdf", lambda cdf: np.where(cdf == 65536, 65535, cdf)),  # rises, and ends short of the sentinel
        ("cdf", lambda cdf: np.where(cdf == 65536, 65537, cdf)),
        ("cdf", lambda cdf: cdf.astype(np.int64)),
        ("size", lambda size: size + 10**4),
        ("size", lambda size: size * 0 + 1),
        ("cdf", lambda cdf: np.where(np.arange(cdf.shape[1]) == 1, np.int32(-(2**31)), cdf)),
        ("size", lambda size: size[:-1]),
        ("offset", lambda offset: offset[:-1]),
    ],
)
def test_tables_that_would_end_the_coder_are_refused(part: str, change: Callable[[Any], Any]) -> None:
    good = vars(gaussian_tables())
    assert CdfTables(**good).within(2**15)
    assert not CdfTables(**{**good, "offset": np.full_like(good["offset"], 2**31 - 1)}).within(2**15)
    with pytest.raises(ValueError, match="expected"):
        CdfTables(**{**good, part: change(good[part])})


def test_a_table_of_one_symbol_is_refused() -> None:
    """It would have to be certain, for which the coder has no number."""
    one = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="3 to 2 entries"):
        CdfTables(np.array([[0, 2**16]], np.int32), one + 2, one)

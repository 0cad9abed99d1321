"""`service.codec.shipped`: the exact path over batches, threads and rate points, and streams of yesterday."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from service.codec import shipped
from service.codec.bitstream import Bitstream, CorruptBitstream, Degradation, DegradationKind
from service.codec.config import RATE_POINTS
from service.codec.known_answer import known_answer
from service.codec.rans import SYMBOL_LIMIT, CorruptPayload, Outliers
from service.codec.shipped import Coded, Effort, LatentSymbols, ShippedCodec, Watch, latent_size
from service.engine import Engine, Photo
from tests.conftest import DATA, noisy

GOLDEN = DATA / "golden"


def batch_of(photos: list[Photo]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(photo.copy()).permute(2, 0, 1).float() / 255 for photo in photos])


def encode(codec: ShippedCodec, x: torch.Tensor, rate: torch.Tensor) -> list[LatentSymbols]:
    y, z_hat, _ = codec.analyse(x, rate)
    return codec.symbols_of(y, z_hat, rate)


def same(a: LatentSymbols, b: LatentSymbols) -> bool:
    return np.array_equal(a.z, b.z) and all(
        np.array_equal(x, y) for one, two in zip(a.passes, b.passes) for x, y in zip(one, two)
    )


def test_latents_survive_every_mix_of_batch_and_threads(codec: ShippedCodec, parrots: Photo) -> None:
    """One photo at every rate point, encoded alone or as one of eight, with one or two threads: decoded in every other
    way, the latents are the same."""
    crowd = [noisy(np.roll(parrots, 17 * k, 1), 10 * k, k)[:128, :160] for k in range(RATE_POINTS)]
    rates, (h, w) = torch.arange(RATE_POINTS), latent_size(128, 160)
    before = torch.get_num_threads()
    try:
        written: dict[int, list[LatentSymbols]] = {point: [] for point in range(RATE_POINTS)}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            together = encode(codec, batch_of(crowd), rates)
            for point, photo in enumerate(crowd):
                written[point] += [encode(codec, batch_of([photo]), rates[point : point + 1])[0], together[point]]
        for way in range(4):  # alone or together, with one thread or two
            coded = [codec.write(written[point][way]) for point in range(RATE_POINTS)]
            decoded: list[list[torch.Tensor]] = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                decoded.append(list(codec.read(coded, rates, h, w)))
                decoded.append([codec.read([one], rates[k : k + 1], h, w)[0] for k, one in enumerate(coded)])
            for point in range(RATE_POINTS):
                assert all(torch.equal(each[point], decoded[0][point]) for each in decoded)
                # What was decoded is what the encoder meant: quantising it again gives the encoder's own symbols.
                latents, alone = written[point][way], rates[point : point + 1]
                z_hat = torch.from_numpy(latents.z).float().reshape(1, codec.config.hyper, -(-h // 4), -(-w // 4))
                assert same(codec.rounded(decoded[0][point][None], z_hat, alone)[0][0], latents)
    finally:
        torch.set_num_threads(before)


def copied(codec: ShippedCodec, x: torch.Tensor, rate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y_hat of a batch, and the photos that come back, in whole levels."""
    y_hat = codec.read([codec.write(one) for one in encode(codec, x, rate)], rate, *latent_size(*x.shape[2:]))
    return y_hat, (codec.synthesise(y_hat, rate) * 255).round() / 255


def generations(codec: ShippedCodec, x: torch.Tensor, count: int) -> list[float]:
    """PSNR, dB, of each copy of copies of x at rate point 6."""
    rate, copy, out = torch.tensor([5]), x, []
    for _ in range(count):
        _, copy = copied(codec, copy, rate)
        out.append(-10 * float((copy - x).square().mean().log10()))
    return out


def test_copies_of_copies_do_not_fade(codec: ShippedCodec, bikes: Photo, monkeypatch: pytest.MonkeyPatch) -> None:
    x = batch_of([bikes[:160, :192]])
    held = generations(codec, x, 6)
    monkeypatch.setattr(shipped, "COPY", 0.0)
    let_go = generations(codec, x, 6)
    assert held[0] == let_go[0]
    assert held[0] - held[-1] < 0.6 * (let_go[0] - let_go[-1])


def test_copies_in_a_batch_get_their_latents_back_and_others_stay(
    codec: ShippedCodec, parrots: Photo, bikes: Photo
) -> None:
    rate = torch.tensor([3, 6])
    first = batch_of([bikes[:160, :192], parrots[:160, 64:256]])
    was, copies = copied(codec, first, rate)
    batch = torch.cat([copies[:1], batch_of([noisy(parrots[:160, :192])]), copies[1:], first[:1]])
    rates = torch.tensor([3, 5, 6, 3])
    y, z_hat, _ = codec.analyse(batch, rates)
    plain, rounding = codec.rounded(y, z_hat, rates)
    assert [changed < shipped.COPY for changed in rounding] == [True, False, True, False]
    taken = codec.symbols_of(y, z_hat, rates)
    assert [same(a, b) for a, b in zip(plain, taken)] == [False, True, False, True]
    for index, then in ((0, was[0]), (2, was[1])):
        missed = [
            float((codec.read([codec.write(one[index])], rates[index : index + 1], 10, 12)[0] - then).square().mean())
            for one in (plain, taken)
        ]
        assert missed[1] < 0.8 * missed[0]


def test_a_copy_too_large_to_be_asked_is_refined_like_any_photo(
    codec: ShippedCodec, bikes: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = torch.tensor([5])
    _, copy = copied(codec, batch_of([bikes[:160, :192]]), rate)
    y, z_hat, _ = codec.analyse(copy, rate)
    effort = Effort(1, copy, [(Degradation(DegradationKind.CLEAN, 1.0),)])
    plain = codec.rounded(y, z_hat, rate)[0][0]
    recognised = codec.symbols_of(y, z_hat, rate, effort)[0]
    assert same(recognised, codec.symbols_of(y, z_hat, rate)[0])
    assert not same(recognised, plain)
    monkeypatch.setattr(shipped, "COPY_PIXELS", 1)
    assert same(codec.symbols_of(y, z_hat, rate)[0], plain)
    assert not same(codec.symbols_of(y, z_hat, rate, effort)[0], plain)


def test_the_steps_that_copies_take_besides_are_those_that_are_told(codec: ShippedCodec, bikes: Photo) -> None:
    class Count(Watch):
        told = made = 0

        def step(self) -> None:
            self.made += 1

        def more(self, steps: int) -> None:
            self.told += steps

    rate = torch.tensor([5, 5])
    _, copies = copied(codec, batch_of([bikes[:160, :192]] * 2), rate)
    count = Count()
    with codec.watched_by(count):
        encode(codec, copies, rate)
    assert count.told == 2 * codec.steps
    assert count.made == codec.steps + count.told


def test_a_latent_beyond_the_largest_symbol_is_clipped(codec: ShippedCodec, parrots: Photo) -> None:
    rate = torch.tensor([7])
    y, z_hat, _ = codec.analyse(batch_of([parrots[:64, :64]]), rate)
    y = y.clone()
    y[0, 0, 1, 1] = 5e5
    latents = codec.symbols_of(y, z_hat, rate)[0]
    assert max(int(np.abs(symbols).max()) for symbols, _ in latents.passes) == SYMBOL_LIMIT
    back = codec.read([codec.write(latents)], rate, 4, 4)
    assert float(back[0, 0, 1, 1]) > SYMBOL_LIMIT / 2


def test_an_outlier_behind_the_coded_latents_is_refused(codec: ShippedCodec, parrots: Photo) -> None:
    rate = torch.tensor([0])
    coded = codec.write(encode(codec, batch_of([parrots[:64, :64]]), rate)[0])
    last = codec.config.latents * 16 - 1  # at this rate point most latents are not coded
    forged = Coded(coded.payload, Outliers(np.array([last]), np.array([3])).to_bytes())
    with pytest.raises(CorruptPayload, match=f"position {last} of"):
        codec.read([forged], rate, 4, 4)


@pytest.mark.parametrize("rate_point", [0, 3, 7])
def test_flat_and_periodic_pictures_are_no_copies(codec: ShippedCodec, rate_point: int) -> None:
    """Their latents repeat, so that rounding may change all of them little; the step would do harm."""
    rate = torch.tensor([rate_point])
    checks = np.kron(np.indices((40, 40)).sum(0) % 2, np.ones((8, 8)))[:, :, None] * np.full(3, 255)
    flat = [np.full((320, 320, 3), 128), np.full((320, 320, 3), (200, 30, 40)), checks]
    for picture in flat:
        y, z_hat, _ = codec.analyse(batch_of([picture.astype(np.uint8)]), rate)
        assert same(codec.symbols_of(y, z_hat, rate)[0], codec.rounded(y, z_hat, rate)[0][0])


def test_too_few_latents_tell_nothing(codec: ShippedCodec, parrots: Photo) -> None:
    y, z_hat, _ = codec.analyse(batch_of([parrots[:32, :32]]), torch.tensor([5]))
    assert np.isnan(codec.rounded(y, z_hat, torch.tensor([5]))[1])


def test_known_answer_is_the_stored_one_with_any_thread_count(engine: Engine, threads: int) -> None:
    for model in engine.models.values():
        assert known_answer(model.codec) == model.entry.known_answer


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.lmp")), ids=lambda path: path.stem)
def test_golden_bitstreams_decode_to_the_same_latents_forever(engine: Engine, path) -> None:  # type: ignore[no-untyped-def]
    stream = Bitstream.from_bytes(path.read_bytes())
    codec = engine.model_of(stream).codec
    h, w = latent_size(stream.height, stream.width)
    y_hat = codec.read([Coded(stream.payload, stream.outliers)], torch.tensor([stream.rate - 1]), h, w)
    sixteenths = (y_hat * 16).to(torch.int32).numpy().astype("<i4").tobytes()
    expected = json.loads((GOLDEN / "digests.json").read_text())[path.name]
    assert hashlib.sha256(sixteenths).hexdigest() == expected


def test_there_are_golden_bitstreams_of_every_model(engine: Engine) -> None:
    held = {Bitstream.from_bytes(path.read_bytes()).model_id for path in GOLDEN.glob("*.lmp")}
    assert {model.entry.model_id for model in engine.models.values()} <= held


def forged(engine: Engine, rng: np.random.Generator, outliers: bytes) -> tuple[Bitstream, tuple[int, int, int]]:
    """A stream of random payload whose checksum is right, and the shape of its photo."""
    payload = rng.integers(0, 256, int(rng.integers(0, 3000)), np.uint8).tobytes()
    width, height = (int(side) for side in rng.integers(20, 200, 2))
    rate = int(rng.integers(1, 9))
    stream = Bitstream(engine.default.entry.model_id, rate, width, height, (), outliers, payload)
    return Bitstream.from_bytes(stream.to_bytes()), (height, width, 3)


@pytest.mark.parametrize("seed", range(8))
def test_a_forged_payload_decodes_to_some_picture(engine: Engine, seed: int) -> None:
    rng = np.random.default_rng(seed)
    listed = Outliers(np.array([0, 7, 50]), np.array([-3, 900, 1])).to_bytes()
    stream, shape = forged(engine, rng, listed if seed % 2 else b"")
    (photo,) = engine.decode([stream])
    assert photo.shape == shape


@pytest.mark.parametrize("seed", range(4))
def test_forged_outliers_are_a_clear_error(engine: Engine, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stream, _ = forged(engine, rng, rng.integers(0, 256, 40, np.uint8).tobytes())
    with pytest.raises(CorruptBitstream, match="outliers"):
        engine.decode([stream])

"""What becomes of a run: a model in a store, with counted frequencies and a report, a mean, a recoded model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from model_store.degradations import Kind
from model_store.index import read_index, write_index
from model_store.training.average import average
from model_store.training.export import export
from model_store.training.frequencies import with_counted_tables
from model_store.training.recode import recode
from model_store.training.report import Lesson, encoder_of, learn, targets, train_report
from model_store.training.weights import read_weights
from service.codec.bitstream import DegradationKind
from service.codec.config import CONFIGS, CodecConfig
from service.codec.model import TrainableCodec, ship
from service.codec.report import KINDS, ReportHead
from service.codec.shipped import ShippedCodec
from service.engine import EncodeJob, Engine, Photo
from service.store import ModelStore
from tests.codec.test_model import FOUR_PASSES, TINY
from tests.model_store.conftest import run

CPU = torch.device("cpu")


@pytest.mark.parametrize("config", [TINY, FOUR_PASSES], ids=["two", "four"])
def test_an_exported_run_is_a_model_that_the_service_loads(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bikes: Photo, config: CodecConfig
) -> None:
    checkpoint = run(photos, tmp_path / "run", 4, monkeypatch, config=config)
    monkeypatch.setitem(CONFIGS, "tiny", config)
    store = tmp_path / "new" / "store"
    export(checkpoint, "tiny-1", store)
    with pytest.raises(ValueError, match="other weights than those of tiny-1"):
        export(checkpoint, "tiny-twin", store)
    export(checkpoint, "tiny-trial", store, make_default=False, photos=photos, batches=1)
    engine = Engine(ModelStore(store), "cpu")
    assert engine.default.entry.name == "tiny-1"
    (back,) = engine.decode(engine.encode([EncodeJob(bikes, 4)]))
    assert back.shape == bikes.shape
    with pytest.raises(ValueError, match="of no model or file"):
        export(checkpoint, "tiny-1", store)
    with pytest.raises(ValueError, match="lower-case"):  # the service would refuse the whole store
        export(checkpoint, "tiny_2", store)
    index = read_index(store)
    index["models"][0]["file"] = "tiny-2.safetensors"
    write_index(store, index)
    with pytest.raises(ValueError, match="of no model or file"):
        export(checkpoint, "tiny-2", store)


def test_counted_frequencies_save_bytes_and_decode(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bikes: Photo
) -> None:
    checkpoint = run(photos, tmp_path / "run", 4, monkeypatch)
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    model = TrainableCodec(TINY)
    model.load_state_dict(read_weights(checkpoint))
    tensors, description = ship(model)
    gaussian = ShippedCodec.from_tensors(tensors, description, CPU)
    counted = ShippedCodec.from_tensors(
        with_counted_tables(tensors, description, photos, batches=20, crop=64), description, CPU
    )
    tables = counted.y_tables.tables
    assert np.array_equal(tables.size, gaussian.y_tables.tables.size)
    assert all((np.diff(row[:size]) > 0).all() for row, size in zip(tables.cdf, tables.size))
    logistic, of_z = (np.stack([one.tables.cdf for one in codec.z_tables]) for codec in (gaussian, counted))
    assert of_z.shape == logistic.shape
    assert (of_z != logistic).any(2).all()  # at every rate point, for every channel
    x = torch.from_numpy(bikes[:128, :128].copy()).permute(2, 0, 1)[None].float() / 255
    rate = torch.tensor([6])
    (latents,) = counted.symbols_of(*counted.analyse(x, rate)[:2], rate)
    written = counted.write(latents)
    assert len(written.payload) < len(gaussian.write(latents).payload)
    ((again,), _) = counted.rounded(
        counted.read([written], rate, 8, 8), torch.from_numpy(latents.z)[None].view(1, -1, 2, 2).float(), rate
    )
    assert all(np.array_equal(a, b) for one, two in zip(latents.passes, again.passes) for a, b in zip(one, two))


def test_a_report_trained_beside_a_checkpoint_ships_with_it(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bikes: Photo
) -> None:
    checkpoint = run(photos, tmp_path / "run", 2, monkeypatch)
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    train_report(checkpoint, photos, minutes=0.02, batch=2, crop=64)
    store = tmp_path / "store"
    store.mkdir()
    state = torch.load(checkpoint, weights_only=True)
    name = next(name for name in state["ema"] if name.startswith("g_a."))
    other = tmp_path / "run" / "other.pt"
    torch.save({**state, "ema": {**state["ema"], name: state["ema"][name] + 1}}, other)
    with pytest.raises(ValueError, match="head of this encoder"):
        export(other, "tiny-0", store)
    record = cast(dict[str, object], export(checkpoint, "tiny-1", store)["training"])
    assert (record["report_minutes"], record["report_seed"], record["report_lr"]) == ("0.02", "7", "0.003")
    assert int(str(record["report_steps"])) >= 1
    (stream,) = Engine(ModelStore(store), "cpu").encode([EncodeJob(bikes, 4)])
    assert stream.degradations
    assert all(0 <= found.strength <= 1 for found in stream.degradations)


def test_a_head_knows_its_encoder_however_that_lies_in_memory() -> None:
    weight = torch.randn(8, 4, 3, 3)
    apart = weight.to(memory_format=torch.channels_last)
    assert encoder_of({"g_a.stem.weight": apart}) == encoder_of({"g_a.stem.weight": weight})


def test_a_head_learns_from_what_was_seen_once() -> None:
    torch.manual_seed(1)
    head, kind = ReportHead(TINY), KINDS.index(DegradationKind.HAZE)
    present = torch.zeros(8, len(KINDS))
    present[::2, kind] = 1
    dim = TINY.stages[TINY.watched].dim
    features = [(torch.randn(8, dim, 6, 6) + 2 * present[:, kind, None, None, None]).half() for _ in range(2)]
    lesson = Lesson(features, present, 0.7 * present, torch.ones_like(present))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    losses = [learn(head, optimizer, lesson) for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]
    odds, strength = head([head.summary(level, x) for level, x in enumerate(features)])
    assert ((odds > 0) == (present > 0)).all()
    assert strength[::2, kind].mean().item() == pytest.approx(0.7, abs=0.1)


def test_a_report_is_asked_for_what_is_plain_to_see() -> None:
    present, strength, counts = targets([{Kind.NOISE: 1e-2, Kind.JPEG: 1e-4}, {Kind.SENSOR_NOISE: 1e-3}, {}])
    noise, jpeg = KINDS.index(DegradationKind.NOISE), KINDS.index(DegradationKind.JPEG)
    assert present[:, noise].tolist() == [1, 1, 0]
    assert strength[0, noise] == pytest.approx(20 / 30)
    assert counts[0, jpeg] == 0  # at 40 dB either answer is right
    assert counts[2].all()


def test_a_run_of_two_passes_still_exports(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = run(photos, tmp_path / "run", 2, monkeypatch)
    monkeypatch.setitem(CONFIGS, "tiny", FOUR_PASSES)
    (tmp_path / "store").mkdir()
    export(checkpoint, "tiny-1", tmp_path / "store")
    assert Engine(ModelStore(tmp_path / "store"), "cpu").default.codec.config.passes == 2


def test_an_average_is_exported_like_a_run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (run(photos, tmp_path / name, steps, monkeypatch) for name, steps in (("one", 2), ("other", 4)))
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    with pytest.raises(ValueError, match="sum to 1"):
        average(other, [(0.5, one), (0.6, other)], tmp_path / "mean/checkpoint.pt")
    mean = average(other, [(0.25, one), (0.75, other)], tmp_path / "mean/checkpoint.pt")
    for name, value in read_weights(mean).items():
        if value.is_floating_point():
            wanted = 0.25 * read_weights(one)[name] + 0.75 * read_weights(other)[name]
            assert torch.allclose(value, wanted, atol=1e-6), name
    (tmp_path / "store").mkdir()
    entry = export(mean, "tiny-1", tmp_path / "store")
    assert "0.25 one/checkpoint.pt" in str(entry["training"])


def test_a_recoded_model_gives_the_same_pictures_from_fewer_bytes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bikes: Photo
) -> None:
    checkpoint = run(photos, tmp_path / "run", 4, monkeypatch)
    monkeypatch.setitem(CONFIGS, "tiny", replace(TINY, skipped=3))
    store = tmp_path / "store"
    store.mkdir()
    export(checkpoint, "tiny-1", store)
    for path in photos.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((256, 256)).save(path)
    recode(store, "tiny-1", "tiny-2", photos, batches=4)
    with pytest.raises(ValueError, match="of no model or file"):
        recode(store, "tiny-1", "tiny-2", photos, batches=4)
    engine = Engine(ModelStore(store), "cpu")
    assert engine.default.entry.name == "tiny-2"
    assert engine.default.entry.training["weights_of"] == "tiny-1"
    before, after = engine.encode([EncodeJob(bikes, 6, "tiny-1"), EncodeJob(bikes, 6, "tiny-2")])
    assert len(after.payload) < len(before.payload)
    old, new = engine.decode([before, after])
    assert float(np.abs(old.astype(int) - new).mean()) < 1

"""`service.store`: digests and the known-answer test stand between a file and the device."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from model_store.index import read_model
from service.codec import rans
from service.codec.known_answer import coder_answer, known_answer
from service.files import write_whole
from service.settings import DEFAULT_STORE
from service.store import ModelStore, StoreError
from tests.conftest import copied_store, other_store

CPU = torch.device("cpu")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A store of its own with the default model of the shipped one."""
    copied_store(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    path = folder / "store.json"
    content = json.loads(path.read_text())
    content["models"][0].update(changes)
    path.write_text(json.dumps(content))


def test_a_copied_store_loads(copy: Path) -> None:
    store = ModelStore(copy)
    codec = store.load(store.index.models[0], CPU)
    assert known_answer(codec) == store.index.models[0].known_answer


def test_the_shipped_store_has_measured_every_rate_point() -> None:
    for entry in ModelStore(DEFAULT_STORE).index.models:
        assert {m.rate for m in entry.measured} == set(range(1, entry.rate_points + 1)), entry.name


def test_an_altered_file_is_refused(copy: Path) -> None:
    path = next(copy.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    store = ModelStore(copy)
    with pytest.raises(StoreError, match="expected SHA-256"):
        store.load(store.index.models[0], CPU)


def test_a_device_that_computes_otherwise_is_refused(copy: Path) -> None:
    edit(copy, known_answer="0" * 64)
    store = ModelStore(copy)
    with pytest.raises(StoreError, match="would not decode elsewhere"):
        store.load(store.index.models[0], CPU)


def test_an_entropy_coder_that_writes_other_bytes_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rans.Encoder, "finish", lambda self: self._encoder.flush()[::-1])
    monkeypatch.setattr("service.store.coder_answer", coder_answer.__wrapped__)  # what it kept was right
    store = ModelStore(copy)
    with pytest.raises(StoreError, match="other bytes than it should"):
        store.load(store.index.models[0], CPU)


def test_a_missing_file_is_named(copy: Path) -> None:
    next(copy.glob("*.safetensors")).unlink()
    store = ModelStore(copy)
    with pytest.raises(StoreError, match="No such file"):
        store.load(store.index.models[0], CPU)


@pytest.mark.parametrize("file", ["../../etc/passwd.safetensors", "/tmp/x.safetensors", "weights.pkl"])
def test_a_file_name_cannot_leave_the_store(copy: Path, file: str) -> None:
    edit(copy, file=file)
    with pytest.raises(StoreError, match="file"):
        ModelStore(copy)


def test_no_store_and_a_wrong_default_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="expected a model store"):
        ModelStore(tmp_path / "nowhere")
    content = json.loads((copy / "store.json").read_text())
    content["default"] = "other"
    (copy / "store.json").write_text(json.dumps(content))
    with pytest.raises(StoreError, match="'other'"):
        ModelStore(copy)


def test_models_that_share_an_id_or_a_file_are_refused(copy: Path) -> None:
    content = json.loads((copy / "store.json").read_text())
    first = content["models"][0]
    for twin in (
        {**first, "name": "twin"},
        {**first, "name": "twin", "sha256": "0" * 64},
        {**first, "file": "b.safetensors"},
    ):
        (copy / "store.json").write_text(json.dumps({**content, "models": [*content["models"], twin]}))
        with pytest.raises(StoreError, match="share"):
            ModelStore(copy)


def test_a_name_is_of_one_model(copy: Path) -> None:
    content = json.loads((copy / "store.json").read_text())
    twin = {**content["models"][0], "sha256": "0" * 64, "file": "b.safetensors"}
    (copy / "store.json").write_text(json.dumps({**content, "models": [*content["models"], twin]}))
    with pytest.raises(StoreError, match="share a name"):
        ModelStore(copy)


def test_models_added_at_the_same_time_are_all_there(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [other_store(tmp_path / name, name, by) for name, by in (("edge-next", 1.001), ("edge-third", 1.002))]

    def slow(path: Path, data: bytes) -> None:
        time.sleep(0.2)
        write_whole(path, data)

    monkeypatch.setattr("service.store.write_whole", slow)
    before = len(ModelStore(copy).index.models)

    def add(other: ModelStore) -> str | None:
        try:
            ModelStore(copy).add(other, other.index.default)
        except StoreError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(add, [*others, others[0]]))
    assert [one and "already" in one for one in sorted(said, key=str)] in ([None, None, True], [True, None, None])
    assert len(ModelStore(copy).index.models) == before + 2


@pytest.mark.parametrize("link", [True, False])
def test_a_file_of_no_model_is_not_written_over(copy: Path, tmp_path: Path, link: bool) -> None:
    """It may be that of another store, behind a link."""
    other = other_store(tmp_path / "other", "edge-next")
    elsewhere, path = tmp_path / "elsewhere", copy / "edge-next.safetensors"
    elsewhere.write_bytes(b"of others")
    path.symlink_to(elsewhere) if link else path.write_bytes(b"of others")
    with pytest.raises(StoreError, match="holds something else"):
        ModelStore(copy).add(other, "edge-next")
    assert elsewhere.read_bytes() == path.read_bytes() == b"of others"
    path.unlink()
    path.write_bytes((other.folder / "edge-next.safetensors").read_bytes())  # of a call that was ended
    ModelStore(copy).add(other, "edge-next")


def test_a_store_begins_where_an_earlier_call_was_ended(tmp_path: Path) -> None:
    source, folder = other_store(tmp_path / "other", "edge-next"), tmp_path / "new"
    folder.mkdir()
    (folder / ".0123.new").write_bytes(b"half")
    (folder / "edge-next.safetensors").write_bytes((source.folder / "edge-next.safetensors").read_bytes())
    assert ModelStore.begin(folder, source, "edge-next").index.default == "edge-next"


def spoiled(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> ModelStore:
    """The store with another tensor of that name, under a right digest."""
    model = read_model(folder)
    model.tensors[name] = change(model.tensors[name])
    data = save(model.tensors, {"limpid": model.description})
    (folder / model.entry["file"]).write_bytes(data)
    edit(folder, sha256=hashlib.sha256(data).hexdigest())
    return ModelStore(folder)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("g_s.head.conv.weight", lambda x: x * float("nan"), "finite"),
        ("deviation", lambda x: x[:-1].clone(), "deviation for each"),
        ("deviation", lambda x: -x, "deviation for each"),
        ("prior.first_hidden.weight", lambda x: x[:, :-1].clone(), "do not fit"),
        ("prior.enter.bias", lambda x: x[:7].clone(), "do not fit"),
        ("prior.up1.weight", lambda x: x.float() + 0.3, "up1: expected integers"),
    ],
)
def test_tensors_that_do_not_fit_are_told(
    copy: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    store = spoiled(copy, name, change)
    with pytest.raises(StoreError, match=said):
        store.load(store.index.models[0], CPU)


def test_a_model_is_added_and_made_the_default(copy: Path, tmp_path: Path) -> None:
    other = other_store(tmp_path / "other", "edge-next")
    store, late = ModelStore(copy), ModelStore(copy)
    old = store.index.default
    store.add(other, "edge-next")
    assert ModelStore(copy).index.default == old
    late.add(other_store(tmp_path / "third", "edge-third", 1.002), "edge-third")
    assert [entry.name for entry in ModelStore(copy).index.models] == [old, "edge-next", "edge-third"]
    store.set_default("edge-next")
    again = ModelStore(copy)
    assert again.index.default == "edge-next"
    assert [entry.name for entry in again.index.models] == [old, "edge-next", "edge-third"]
    again.load(again.entry("edge-next"), CPU)
    with pytest.raises(StoreError, match="already"):
        again.add(other, "edge-next")
    with pytest.raises(StoreError, match="got 'none'"):
        again.set_default("none")


def test_a_store_begins_with_one_model_in_an_empty_folder(copy: Path, tmp_path: Path) -> None:
    source = other_store(tmp_path / "other", "edge-next")
    begun = ModelStore.begin(tmp_path / "a" / "new", source, "edge-next")
    assert begun.index.default == "edge-next"
    begun.load(begun.entry("edge-next"), CPU)
    with pytest.raises(StoreError, match="expected a model store, or nothing"):
        ModelStore.begin(copy, source, "edge-next")
    with pytest.raises(StoreError, match="got 'none'"):
        ModelStore.begin(tmp_path / "none", source, "none")
    path = source.folder / "edge-next.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="expected SHA-256"):
        ModelStore.begin(tmp_path / "none", source, "edge-next")
    assert not (tmp_path / "none").exists()


def test_a_damaged_model_is_not_added(copy: Path, tmp_path: Path) -> None:
    other = other_store(tmp_path / "other", "edge-next")
    path = other.folder / "edge-next.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = (copy / "store.json").read_bytes()
    with pytest.raises(StoreError, match="expected SHA-256"):
        ModelStore(copy).add(other, "edge-next")
    assert (copy / "store.json").read_bytes() == before
    assert not list(copy.glob("*edge-next*"))


def test_a_model_never_takes_the_file_of_another(copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other_store(other, "edge-next")
    index = json.loads((other / "store.json").read_text())
    (entry,) = [entry for entry in index["models"] if entry["name"] == "edge-next"]
    taken = ModelStore(copy).index.models[0].file
    (other / taken).write_bytes((other / entry["file"]).read_bytes())
    entry["file"] = taken
    index["models"], index["default"] = [entry], "edge-next"
    (other / "store.json").write_text(json.dumps(index))
    before = (copy / taken).read_bytes()
    with pytest.raises(StoreError, match="the file name of edge-next"):
        ModelStore(copy).add(ModelStore(other), "edge-next")
    assert (copy / taken).read_bytes() == before

"""The HTTP surface: the calls, their headers, and a clear problem for everything that can be wrong with a request."""

from __future__ import annotations

import gc
import io
import re
import struct
import tempfile
from dataclasses import replace

import google_crc32c
import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageCms
from starlette.testclient import TestClient

from model_store.images import psnr
from service.app import create_app
from service.codec.bitstream import MEDIA_TYPE, Bitstream
from service.codec.transforms import rate_lambda
from service.engine import Photo
from service.imaging import read_photo
from service.routes.accept import choose_format
from service.settings import Settings
from tests.conftest import image_bytes, noisy
from tests.test_imaging import bomb


@pytest.fixture(scope="module")
def stream(client: TestClient, bikes: Photo) -> bytes:
    return client.post("/compress", content=image_bytes(noisy(bikes)), params={"rate": 3}).content


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", google_crc32c.value(body))


def problem(response, status: int, slug: str) -> str:  # type: ignore[no-untyped-def]
    """Check a problem's form and return its detail."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["type"] == f"urn:limpid:problem:{slug}"
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["title"]
    return str(body["detail"])


def test_a_noisy_photo_comes_back_clean(client: TestClient, parrots: Photo) -> None:
    degraded = noisy(parrots)
    sent = client.post("/compress", files={"file": ("a.png", image_bytes(degraded), "image/png")}, params={"rate": 4})
    assert sent.status_code == 200
    assert sent.headers["content-type"] == MEDIA_TYPE
    assert sent.headers["limpid-rate"] == "4"
    assert float(sent.headers["limpid-bpp"]) == pytest.approx(8 * len(sent.content) / parrots[..., 0].size, abs=1e-3)
    assert sent.headers["limpid-model"]
    assert sent.headers["limpid-degradation"]
    assert {"image_decode", "queue", "transform", "entropy"} <= timings(sent.headers["server-timing"]).keys()
    back = client.post("/decompress", content=sent.content)
    assert back.status_code == 200
    assert back.headers["content-type"] == "image/png"
    assert {"queue", "transform", "entropy", "image_encode"} <= timings(back.headers["server-timing"]).keys()
    photo = read_photo(back.content, 10**6)
    assert photo.shape == parrots.shape
    assert psnr(photo, parrots) > psnr(degraded, parrots) + 3


def timings(header: str) -> dict[str, float]:
    parts = (part.strip().split(";dur=") for part in header.split(","))
    return {name: float(value) for name, value in parts}


def test_raw_and_multipart_bodies_give_the_same_stream(client: TestClient, bikes: Photo) -> None:
    data = image_bytes(bikes)
    raw = client.post("/compress", content=data, headers={"Content-Type": "image/png"})
    untyped = client.post("/compress", content=data, headers={"Content-Type": "application/x-www-form-urlencoded"})
    form = client.post("/compress", files={"file": data})
    assert raw.content == untyped.content == form.content
    assert raw.headers["limpid-rate"] == "4"
    assert client.post("/decompress", files={"file": raw.content}).status_code == 200


def test_a_budget_is_used_and_never_exceeded(client: TestClient, bikes: Photo) -> None:
    data = image_bytes(bikes)
    sizes = {rate: len(client.post("/compress", content=data, params={"rate": rate}).content) for rate in range(1, 9)}
    for rate in (1, 4, 8):
        answer = client.post("/compress", content=data, params={"max_bytes": sizes[rate]})
        assert answer.headers["limpid-rate"] == str(rate)
        assert len(answer.content) <= sizes[rate]
    bpp = 8 * (sizes[5] + 3) / bikes[..., 0].size
    assert client.post("/compress", content=data, params={"target_bpp": bpp}).headers["limpid-rate"] == "5"
    detail = problem(client.post("/compress", content=data, params={"max_bytes": 50}), 422, "unmeetable-budget")
    assert f"at least {sizes[1]} bytes" in detail


def test_effort_takes_time_for_better_bits(client: TestClient, parrots: Photo) -> None:
    data = image_bytes(parrots)
    plain, none, refined = (
        client.post(f"/compress?rate=5{more}", content=data) for more in ("", "&effort=0", "&effort=3")
    )
    assert plain.content == none.content != refined.content
    weight = float(rate_lambda(torch.tensor(4)))

    def cost(bitstream: bytes) -> float:
        """Lambda D + R: it may be fewer bits, a better picture, or both."""
        restored = read_photo(client.post("/decompress", content=bitstream).content, 10**6)
        return weight * 10 ** (-psnr(restored, parrots) / 10) + 8 * len(bitstream) / parrots[..., 0].size

    assert cost(refined.content) < 0.98 * cost(plain.content)
    budget = max(len(plain.content), len(refined.content)) + 20
    answer = client.post("/compress", content=data, params={"max_bytes": budget, "effort": 1})
    assert int(answer.headers["limpid-rate"]) >= 5
    assert len(answer.content) <= budget


@pytest.mark.parametrize("media_type", ["image/png", "image/avif"])
def test_accept_chooses_the_format(client: TestClient, stream: bytes, media_type: str) -> None:
    answer = client.post("/decompress", content=stream, headers={"Accept": media_type})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type
    assert read_photo(answer.content, 10**6).shape == (160, 192, 3)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", "image/png"),
        ("", "image/png"),
        ("image/*", "image/png"),
        ("image/jpeg", "image/jpeg"),
        ("image/webp", "image/webp"),
        ("text/html, image/avif;q=0.9, */*;q=0.1", "image/avif"),
        ("image/webp;q=0.4, image/jpeg;q=0.5", "image/jpeg"),
        ("image/png;q=0, */*", "image/jpeg"),
    ],
)
def test_accept_is_weighed(accept: str, expected: str) -> None:
    assert choose_format(accept).media_type == expected


def test_accept_may_come_in_several_lines(client: TestClient, stream: bytes) -> None:
    lines = [("Accept", "text/html"), ("Accept", "image/jpeg")]
    answer = client.send(client.build_request("POST", "/decompress", headers=lines, content=stream))
    assert answer.headers["content-type"] == "image/jpeg"


def test_answers_are_not_for_caches_but_files_are(client: TestClient) -> None:
    for path in ("/readyz", "/variants", "/metrics"):
        assert client.get(path).headers["cache-control"] == "no-store"
    page = client.get("/")
    assert page.headers["cache-control"] == "no-cache"
    assert client.get("/", headers={"If-None-Match": page.headers["etag"]}).status_code == 304
    assert client.post("/").headers["allow"] == "GET, HEAD"


def test_accept_and_quality_that_cannot_be_met(client: TestClient, stream: bytes) -> None:
    problem(client.post("/decompress", content=stream, headers={"Accept": "text/html"}), 406, "not-acceptable")
    problem(client.post("/decompress", content=stream, headers={"Accept": "image/png;q=x"}), 400, "malformed-request")
    problem(client.post("/decompress?quality=50", content=stream), 400, "malformed-request")
    small, large = (
        client.post(
            "/decompress", content=stream, headers={"Accept": "image/jpeg"}, params={"quality": quality}
        ).content
        for quality in (20, 95)
    )
    assert len(small) < len(large)


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ("rate=0", "rate"), ("rate=9", "rate"), ("rate=x", "rate"), ("max_bytes=0", "max_bytes"),
        ("target_bpp=-1", "target_bpp"), ("target_bpp=65", "target_bpp"),
        ("target_bpp=nan", "target_bpp"), ("rate=4&max_bytes=9", "at most one"),
        ("effort=-1", "effort"), ("effort=9", "effort"), ("effort=1.5", "effort"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(client: TestClient, bikes: Photo, query: str, part: str) -> None:
    detail = problem(client.post(f"/compress?{query}", content=image_bytes(bikes)), 400, "malformed-request")
    assert part in detail


def test_bad_uploads_get_clear_problems_and_the_next_request_works(client: TestClient, bikes: Photo) -> None:
    good = image_bytes(bikes)
    jpeg = image_bytes(bikes, "JPEG")
    problem(client.post("/compress", content=b""), 400, "empty-body")
    problem(client.post("/compress", files={"file": b""}), 400, "empty-body")
    problem(client.post("/compress", files={"other": good}), 400, "malformed-request")
    problem(client.post("/compress", data={"file": "text"}, files={"x": b"1"}), 400, "malformed-request")
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    problem(client.post("/compress", content=b"--y\r\nnonsense", headers=broken), 400, "malformed-request")
    problem(
        client.post("/compress", content=good, headers={"Content-Type": "multipart/form-data"}),
        400,
        "malformed-request",
    )
    problem(client.post("/compress", content=b"just some text"), 415, "not-an-image")
    problem(client.post("/compress", content=jpeg[: len(jpeg) // 2]), 422, "corrupt-image")
    detail = problem(client.post("/compress", content=bomb(100_000, 100_000)), 422, "too-many-pixels")
    assert "100000x100000" in detail
    problem(client.post("/compress", content=good, params={"model": "nope"}), 422, "unknown-model")
    problem(client.get("/compress"), 405, "method-not-allowed")
    problem(client.get("/nowhere"), 404, "not-found")
    assert client.post("/compress", content=good).status_code == 200


def test_bad_bitstreams_get_clear_problems_and_the_next_request_works(client: TestClient, stream: bytes) -> None:
    body = stream[:-4]
    problem(client.post("/decompress", content=b""), 400, "empty-body")
    problem(client.post("/decompress", content=b"hello there, decode me"), 415, "not-a-bitstream")
    for length in (5, 20, 40, len(stream) // 2, len(stream) - 1):
        problem(client.post("/decompress", content=stream[:length]), 422, "corrupt-bitstream")
    problem(client.post("/decompress", content=stream + b"\0"), 422, "corrupt-bitstream")
    flipped = bytearray(stream)
    flipped[len(stream) // 2] ^= 4
    problem(client.post("/decompress", content=bytes(flipped)), 422, "corrupt-bitstream")
    problem(client.post("/decompress", content=body[:4] + b"\x02" + stream[5:]), 422, "unsupported-version")
    unknown = sealed(body[:6] + b"\xff" * 8 + body[14:])
    assert "ff" * 8 in problem(client.post("/decompress", content=unknown), 422, "unknown-model")
    huge = sealed(body[:14] + struct.pack("<II", 10**5, 10**5) + body[22:])
    problem(client.post("/decompress", content=huge), 422, "too-many-pixels")
    assert client.post("/decompress", content=stream).status_code == 200


def test_forged_streams_under_a_right_checksum_never_give_a_500(client: TestClient, stream: bytes) -> None:
    rng = np.random.default_rng(7)
    parsed = Bitstream.from_bytes(stream)
    answers = set()
    for _ in range(25):
        payload = bytearray(parsed.payload)
        for position in rng.integers(0, len(payload), 5):
            payload[position] = rng.integers(0, 256)
        outliers = rng.integers(0, 256, int(rng.integers(0, 4)), np.uint8).tobytes()
        forged = Bitstream(parsed.model_id, int(rng.integers(1, 9)), 192, 160, (), outliers, bytes(payload))
        answers.add(client.post("/decompress", content=forged.to_bytes()).status_code)
    assert answers <= {200, 422}
    assert 200 in answers


def test_a_body_over_the_limit_is_refused(client: TestClient, settings: Settings) -> None:
    large = bytes(settings.max_body_bytes + 1)
    problem(client.post("/compress", content=large), 413, "body-too-large")
    problem(client.post("/compress", content=iter([large[:1], large[1:]])), 413, "body-too-large")


def test_memory_does_not_grow_under_bad_requests(client: TestClient, stream: bytes, bikes: Photo) -> None:
    bad = [
        ("/compress", bomb(100_000, 100_000)),
        ("/compress", image_bytes(bikes, "JPEG")[:2000]),
        ("/compress", b"x" * 10**6),
        ("/decompress", stream[:-9]),
        ("/decompress", b"y" * 10**6),
        ("/decompress", stream[:40] + bytes(200)),
    ]

    def burst() -> None:
        for path, body in 20 * bad:
            assert 400 <= client.post(path, content=body).status_code < 500

    burst()
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(4):
        burst()
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 30e6


def reported(client: TestClient, kind: str) -> float:
    """How often a kind was found so far."""
    found = re.search(rf'limpid_degradations_total{{kind="{kind}"}} (\S+)', client.get("/metrics").text)
    return float(found[1]) if found else 0


def test_another_model_of_the_store_is_used_when_it_is_named(client: TestClient, bikes: Photo) -> None:
    """`edge-1` tells nothing of what was wrong, and says so."""
    before = reported(client, "unknown")
    sent = client.post("/compress", content=image_bytes(bikes), params={"model": "edge-1"})
    assert (sent.headers["limpid-model"], sent.headers["limpid-degradation"]) == ("edge-1", "unknown")
    assert reported(client, "unknown") == before + 1
    back = client.post("/decompress", content=sent.content)
    assert (back.headers["limpid-model"], back.headers["limpid-degradation"]) == ("edge-1", "unknown")
    assert psnr(read_photo(back.content, 10**6), bikes) > 24


def test_nothing_of_where_and_when_a_photo_was_taken_is_kept(client: TestClient, bikes: Photo) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(bikes)
    exif = image.getexif()
    exif[0x010F] = "A Maker Of Cameras"
    exif.get_ifd(0x8825)[1] = "N"
    photo = image_bytes(image, "JPEG", exif=exif, icc_profile=profile)
    assert b"A Maker Of Cameras" in photo
    sent = client.post("/compress", content=photo)
    assert b"Maker" not in sent.content
    for media_type in ("image/png", "image/jpeg", "image/webp", "image/avif"):
        back = client.post("/decompress", content=sent.content, headers={"Accept": media_type}).content
        with Image.open(io.BytesIO(back)) as restored:
            assert not restored.getexif()
            assert "icc_profile" not in restored.info


def test_request_ids_are_kept_or_made(client: TestClient) -> None:
    assert client.get("/livez", headers={"X-Request-ID": "gate-7.42"}).headers["x-request-id"] == "gate-7.42"
    made = client.get("/livez", headers={"X-Request-ID": "not ok\t!"}).headers["x-request-id"]
    assert len(made) == 32
    assert client.get("/livez").headers["x-request-id"] != made


def test_the_report_names_what_is_wrong_and_is_counted(client: TestClient, parrots: Photo) -> None:
    before = reported(client, "noise")
    sent = client.post("/compress", content=image_bytes(noisy(parrots)))
    assert re.match(r"noise;0\.\d\d", sent.headers["limpid-degradation"])
    assert reported(client, "noise") == before + 1
    back = client.post("/decompress", content=sent.content)
    assert back.headers["limpid-degradation"] == sent.headers["limpid-degradation"]
    dark = np.rint(parrots * 0.25).astype(np.uint8)
    assert client.post("/compress", content=image_bytes(dark)).headers["limpid-degradation"].startswith("low-light;")
    assert client.post("/compress", content=image_bytes(parrots)).headers["limpid-degradation"].startswith("clean;")


def test_variants_say_what_was_measured(client: TestClient) -> None:
    said = client.get("/variants").json()
    assert said["max_effort"] == 8
    (model, *_) = [m for m in said["models"] if m["default"]]
    assert model["resident_bytes"] > 1e6
    assert [variant["rate"] for variant in model["variants"]] == list(range(1, 9))
    for variant in model["variants"]:
        kinds = {(m["photos"], m["degradation"]) for m in variant["measured"]}
        assert ("kodak", "clean") in kinds
        assert all(m["psnr"] > 15 and m["bpp"] > 0 for m in variant["measured"])


def test_health_docs_and_metrics(client: TestClient, bikes: Photo) -> None:
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    documentation = client.get("/docs").text
    files = re.findall(r'(?:src|href)="([^"]+)"', documentation)
    assert len(files) == 3
    assert all(client.head(file).status_code == 200 for file in files)  # none from elsewhere
    head, whole = client.head("/variants"), client.get("/variants")
    assert head.content == b""
    assert head.headers["content-length"] == str(len(whole.content))
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/compress", "/decompress", "/variants", "/livez", "/readyz", "/metrics"} <= paths.keys()

    def series() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = series()
    sent = client.post("/compress", content=image_bytes(bikes), params={"rate": 2})
    small = client.post("/compress", content=image_bytes(bikes[:32, :32]), params={"rate": 3, "effort": 2})
    client.post("/decompress", content=sent.content)
    client.post("/decompress", content=b"nonsense")
    after = series()
    name = sent.headers["limpid-model"]

    def grew(key: str) -> float:
        return after[key] - before.get(key, 0)

    assert grew('limpid_http_requests_total{operation="compress",status="200"}') == 2
    assert [grew(f'limpid_efforts_total{{effort="{effort}"}}') for effort in (0, 1, 2)] == [1, 0, 1]
    assert grew("limpid_device_steps_total") > 3
    assert grew('limpid_http_requests_total{operation="decompress",status="415"}') == 1
    assert grew('limpid_rejected_total{reason="not-a-bitstream"}') == 1
    assert grew(f'limpid_pixels_total{{model="{name}",operation="compress"}}') == bikes[..., 0].size + 32 * 32
    written = len(sent.content) + len(small.content)
    assert grew(f'limpid_bitstream_bytes_total{{model="{name}",operation="compress"}}') == written
    assert grew(f'limpid_bits_per_pixel_count{{model="{name}",rate="2"}}') == 1
    assert grew('limpid_stage_duration_seconds_count{operation="compress",stage="transform"}') == 2
    assert grew('limpid_stage_duration_seconds_count{operation="decompress",stage="image_encode"}') == 1
    assert grew('limpid_http_request_duration_seconds_count{operation="compress"}') == 2
    assert after["limpid_ready"] == 1
    assert client.get("/nowhere-7f3a").status_code == 404
    assert "nowhere-7f3a" not in client.get("/metrics").text  # a client chooses no label
    assert series()['limpid_http_requests_total{operation="other",status="404"}'] >= 1
    assert any(key.startswith("limpid_build_info") for key in after)


def test_ranges_are_for_get_and_of_bytes(client: TestClient) -> None:
    whole = client.get("/")
    assert client.get("/", headers={"Range": "bytes=0-9"}).content == whole.content[:10]
    assert client.get("/", headers={"Range": "lines=0-9"}).content == whole.content
    head = client.head("/", headers={"Range": "bytes=0-9"})
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(whole.content)))


def lying(stream: bytes, width: int, height: int) -> bytes:
    """The stream, saying of itself that it is of another size."""
    known = Bitstream.from_bytes(stream)
    return replace(known, width=width, height=height).to_bytes()


@pytest.mark.parametrize(("width", "height"), [(4_000_000, 1), (1, 4_000_000)])
def test_a_line_is_refused_before_it_is_worked_on_in_blocks(
    client: TestClient, stream: bytes, width: int, height: int
) -> None:
    detail = problem(client.post("/decompress", content=lying(stream, width, height)), 422, "too-many-pixels")
    assert "256000000 in blocks" in detail


def test_a_photo_too_wide_for_a_format_comes_back_in_another_or_is_told(client: TestClient) -> None:
    wide = client.post("/compress", content=image_bytes(np.full((16, 16_400, 3), 90, np.uint8))).content
    answer = client.post("/decompress", content=wide, headers={"Accept": "image/webp, image/*;q=0.5"})
    assert answer.headers["content-type"] == "image/png"
    detail = problem(client.post("/decompress", content=wide, headers={"Accept": "image/webp"}), 406, "not-acceptable")
    assert "16400" in detail
    lossy = {"Accept": "image/webp, image/*;q=0.5"}  # of which PNG is left, which has no quality
    detail = problem(client.post("/decompress?quality=80", content=wide, headers=lossy), 400, "malformed-request")
    assert "image/png" in detail


def test_a_form_of_an_unreadable_charset_is_malformed(client: TestClient) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x; charset=undefined"}
    problem(client.post("/compress", content=form, headers=kind), 400, "malformed-request")


def test_parameters_in_a_form_are_not_overlooked(client: TestClient, bikes: Photo) -> None:
    form = {"files": {"file": ("a.png", image_bytes(bikes))}, "data": {"rate": "1"}}
    detail = problem(client.post("/compress", **form), 400, "malformed-request")  # type: ignore[arg-type]
    assert "['rate']" in detail
    assert "?rate=4" in detail


def test_a_form_needs_no_temporary_file(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    large = image_bytes(np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8))
    assert len(large) > 2**21
    assert client.post("/compress?rate=1", files={"file": ("a.png", large)}).status_code == 200


@pytest.mark.parametrize("path", ["/compress/", "/decompress/", "/variants/"])
def test_a_slash_too_many_is_told_and_not_redirected(client: TestClient, path: str) -> None:
    """A client that follows no redirect would take its empty answer for the file."""
    problem(client.request("GET" if "variants" in path else "POST", path, follow_redirects=False), 404, "not-found")


@pytest.mark.parametrize("query", ["max-bytes=4000", "rates=4", "quality=80", "rate=3&rate=5"])
def test_a_parameter_that_means_nothing_is_not_overlooked(client: TestClient, query: str) -> None:
    detail = problem(client.post(f"/compress?{query}", content=b"x"), 400, "malformed-request")
    assert query.partition("=")[0] in detail


def test_a_budget_needs_the_memory_of_one_photo(parrots: Photo) -> None:
    settings = Settings(max_queue_bytes=parrots.nbytes + 1000)
    with TestClient(create_app(settings, load_first=True)) as client:
        answer = client.post("/compress", content=image_bytes(parrots), params={"max_bytes": 20_000})
        assert answer.status_code == 200, answer.text
        assert {"body", "image_decode", "queue", "transform", "entropy"} == timings(
            answer.headers["server-timing"]
        ).keys()
        text = client.get("/metrics").text
        for stage in ("transform", "entropy"):  # once, though the budget took several encodings
            assert f'limpid_stage_duration_seconds_count{{operation="compress",stage="{stage}"}} 1.0' in text

"""`service.settings`: what cannot work is named at the start."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from service.settings import Settings


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("REQUEST_TIMEOUT_S", "inf", "less than or equal to 86400"),
        ("BODY_TIMEOUT_S", "3000000", "less than or equal to 86400"),
        ("DRAIN_GRACE_S", "nan", "86400"),
        ("API_KEYS", "good,ключ", "visible ASCII"),
        ("API_KEYS", "two words", "visible ASCII"),
        ("CORS_ORIGINS", "https://example.org/", "without a path"),
        ("CORS_ORIGINS", "example.org", "without a path"),
    ],
)
def test_a_value_that_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, part: str) -> None:
    monkeypatch.setenv(f"LIMPID_{name}", value)
    with pytest.raises(ValidationError, match=part):
        Settings()


def test_keys_and_origins_are_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMPID_API_KEYS", "one, two,")
    monkeypatch.setenv("LIMPID_CORS_ORIGINS", "https://example.org,http://localhost:3000, *,null")
    settings = Settings()
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]
    assert settings.cors_origins == ["https://example.org", "http://localhost:3000", "*", "null"]


@pytest.mark.parametrize("origin", ["https://Example.org", "https://example.org:443", "http://example.org:80"])
def test_an_origin_that_no_browser_says_so_is_refused(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    monkeypatch.setenv("LIMPID_CORS_ORIGINS", origin)
    with pytest.raises(ValidationError, match="as browsers say them"):
        Settings()

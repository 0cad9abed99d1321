"""`service.metrics`: what a container may use."""

from __future__ import annotations

from pathlib import Path

from service.metrics import memory_limit


def test_the_memory_limit_is_the_least_of_the_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/system.slice/limpid.service\n")
    (tmp_path / "v2/system.slice/limpid.service").mkdir(parents=True)
    (tmp_path / "v2/system.slice/limpid.service/memory.max").write_text("max\n")
    (tmp_path / "v2/system.slice/memory.max").write_text("3000000\n")
    assert memory_limit(tmp_path / "v2", own) == 3_000_000
    own.write_text("3:cpu:/other\n2:memory,hugetlb:/docker/abc\n")
    (tmp_path / "v1/memory").mkdir(parents=True)
    (tmp_path / "v1/memory/memory.limit_in_bytes").write_text("2000000\n")
    assert memory_limit(tmp_path / "v1", own) == 2_000_000
    assert memory_limit(tmp_path / "v1", tmp_path / "nothing") > 10**8

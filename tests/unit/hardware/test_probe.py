from pathlib import Path

import pytest

from eightgig.errors import HardwareError
from eightgig.hardware import probe as module
from eightgig.hardware.nvml import NvmlReading, read_nvml
from eightgig.hardware.probe import describe_machine, host_memory, pin_limit_bytes, probe
from eightgig.units import GIB, MIB
from tests.unit.hardware.fake_nvml import make_nvml


def test_a_machine_without_a_gpu_is_a_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "read_nvml", lambda: NvmlReading(error="no driver"))
    machine = probe(cache_dir=tmp_path)
    assert machine.device == "cpu"
    assert machine.compute_capability is None
    assert machine.vram_total_bytes == machine.pin_limit_bytes == 0
    assert 0 < machine.host_free_bytes <= machine.host_total_bytes
    assert machine.cpu_threads >= 1
    assert machine.name
    assert machine.disk_free_bytes > 0


def test_a_gpu_that_is_asked_for_and_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_nvml", lambda: NvmlReading(error="no driver"))
    with pytest.raises(HardwareError, match="no GPU can be used") as caught:
        probe("cuda")
    assert caught.value.why == "no driver"
    assert "eightgig doctor" in caught.value.fix


def test_a_gpu_is_described_from_the_driver_and_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(module, "read_nvml", lambda: read_nvml(make_nvml()))
    machine = probe("cuda", tmp_path)
    assert machine.device == "cuda"
    assert machine.has_bf16
    assert machine.vram_total_bytes == 8188 * MIB
    assert machine.vram_free_bytes == 7900 * MIB
    assert machine.display_bytes == 288 * MIB
    assert machine.rates is not None
    assert machine.rates.host_to_device_bytes_per_second == 12.5e9


def test_the_processor_can_be_asked_for_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_nvml", lambda: read_nvml(make_nvml()))
    assert probe("cpu").device == "cpu"


def test_an_unknown_card_has_no_rates(tmp_path: Path) -> None:
    (gpu,) = read_nvml(make_nvml(GetName="NVIDIA Something New")).gpus
    assert describe_machine(gpu, tmp_path).rates is None


def test_an_old_card_has_no_bfloat16(tmp_path: Path) -> None:
    (gpu,) = read_nvml(
        make_nvml(GetName="NVIDIA GeForce RTX 2070", GetCudaComputeCapability=(7, 5))
    ).gpus
    assert not describe_machine(gpu, tmp_path).has_bf16


def test_data_centre_cards_take_a_larger_context() -> None:
    assert module.context_bytes("NVIDIA H100 80GB HBM3") > module.context_bytes("RTX 4060")


def test_a_container_s_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit, used = tmp_path / "max", tmp_path / "current"
    limit.write_text(f"{GIB}\n", encoding="ascii")
    used.write_text(f"{GIB // 4}\n", encoding="ascii")
    monkeypatch.setattr(module, "_CGROUP_LIMITS", ((limit, used),))
    total, free = host_memory()
    assert total == GIB
    assert free <= GIB - GIB // 4


@pytest.mark.parametrize(
    "stat",
    [
        "anon 1\nactive_file 536870912\ninactive_file 268435456\nslab 7\n",
        "inactive_file 5\nactive_file 5\n"
        "total_inactive_file 268435456\ntotal_active_file 536870912\n",
    ],
)
def test_files_that_a_container_has_read_are_free_memory(
    stat: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit, used = tmp_path / "max", tmp_path / "current"
    limit.write_text(f"{GIB}\n", encoding="ascii")
    used.write_text(f"{GIB}\n", encoding="ascii")
    monkeypatch.setattr(module, "_CGROUP_LIMITS", ((limit, used),))
    assert host_memory() == (GIB, 0)
    (tmp_path / "memory.stat").write_text(stat, encoding="ascii")
    assert host_memory() == (GIB, 3 * GIB // 4)


def test_the_disk_of_a_folder_that_may_not_be_seen_is_that_of_what_may(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hidden, exists = tmp_path / "hidden" / "cache", Path.exists

    def refuse(path: Path) -> bool:
        if path.is_relative_to(hidden):
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refuse)
    assert module.disk_free_bytes(hidden / "eightgig") > 0


def test_no_limit_is_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_CGROUP_LIMITS", ())
    expected, _ = host_memory()
    limit = tmp_path / "max"
    limit.write_text("max\n", encoding="ascii")
    monkeypatch.setattr(module, "_CGROUP_LIMITS", ((limit, tmp_path / "missing"),))
    assert host_memory()[0] == expected


@pytest.mark.parametrize(
    ("platform", "is_wsl", "share"), [("linux", False, 0.9), ("win32", False, 0.5)]
)
def test_windows_pins_half(
    platform: str, is_wsl: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.sys, "platform", platform)
    monkeypatch.setattr(module, "is_wsl", lambda: is_wsl)
    assert pin_limit_bytes(10 * GIB) == int(share * 10 * GIB)


def test_wsl_pins_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_wsl", lambda: True)
    assert pin_limit_bytes(64 * GIB) == 512 * MIB


def test_the_disk_of_a_folder_that_is_not_there_yet_is_its_parent_s(tmp_path: Path) -> None:
    inside = tmp_path / "not" / "yet"
    assert module.disk_free_bytes(inside) == pytest.approx(
        module.disk_free_bytes(tmp_path), rel=0.01
    )


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module.default_cache_dir() == tmp_path / "eightgig"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert module.default_cache_dir() == Path.home() / ".cache" / "eightgig"

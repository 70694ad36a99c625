"""`probe` on recorded machines, and on this one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from burnish.machine.probe import Gpu, ThisSystem, probe
from tests.machine.recorded import (
    CAP_QUERY,
    CONTAINER,
    GIB,
    GPU_QUERY,
    H100,
    INSTALLED,
    M1_8,
    M2_PRO_32,
    M4_MAX_128,
    ROSETTA,
    RTX_4090,
    Recorded,
    cpuinfo,
)

HERE = Path(".")


def test_m1_has_a_gpu_that_shares_its_memory_and_no_bfloat16():
    m = probe(HERE, M1_8)
    assert (m.system, m.release, m.chip) == ("Darwin", "14.6.1", "Apple M1")
    assert (m.arch, m.python_arch) == ("arm64", "arm64")
    assert m.gpus == (Gpu("Apple M1", "metal", 8 * GIB, 3 * GIB),)
    assert m.unified and not m.cpu_bfloat16 and not m.gpu_bfloat16
    assert m.swap_bytes is None  # macOS makes its own


def test_m2_has_bfloat16_on_the_cpu_only():
    m = probe(HERE, M2_PRO_32)
    assert m.cpu_bfloat16 and not m.gpu_bfloat16
    assert (m.cores, m.ram_bytes, m.free_ram_bytes) == (12, 32 * GIB, 22 * GIB)


def test_m4_has_bfloat16_on_both():
    m = probe(HERE, M4_MAX_128)
    assert m.cpu_bfloat16 and m.gpu_bfloat16 and m.gpus[0].total_bytes == 128 * GIB


@pytest.mark.parametrize(("chip", "native"), [
    ("Apple M1 Ultra", False), ("Apple M2 Max", False), ("Apple M3", True), ("Apple M10 Pro", True),
    ("Apple A18 Pro", True), ("Apple processor", False), ("VirtualApple @ 2.50GHz", False),
])
def test_bfloat16_by_apple_chip(chip: str, native: bool):
    commands = {**M1_8.commands, "sysctl -n machdep.cpu.brand_string": f"{chip}\n"}
    assert probe(HERE, replace(M1_8, commands=commands)).gpu_bfloat16 is native


def test_rosetta_shows_the_true_arch_and_no_gpu():
    m = probe(HERE, ROSETTA)
    assert (m.arch, m.python_arch, m.gpus) == ("arm64", "x86_64", ())
    assert m.unified


def test_intel_mac_is_x86():
    commands = {**ROSETTA.commands, "sysctl -n sysctl.proc_translated": "0\n"}
    m = probe(HERE, replace(ROSETTA, commands=commands))
    assert (m.arch, m.python_arch, m.unified) == ("x86_64", "x86_64", False)


def test_4090():
    m = probe(HERE, RTX_4090)
    assert m.gpus == (Gpu("NVIDIA GeForce RTX 4090", "cuda", 24564 << 20, 23871 << 20),)
    assert m.gpu_bfloat16 and not m.cpu_bfloat16 and not m.unified
    assert m.chip == "13th Gen Intel(R) Core(TM) i9-13900K"
    assert m.swap_bytes == 8 * GIB
    assert m.versions["torch"] == "2.13.0" and m.versions["mlx"] == ""


def test_h100_in_a_container():
    m = probe(HERE, H100)
    assert len(m.gpus) == 2 and m.gpus[1].free_bytes == 40000 << 20
    assert m.cpu_bfloat16 and m.gpu_bfloat16
    assert m.ram_bytes == 128 * GIB
    assert m.free_ram_bytes == 122 * GIB  # 10 used, of which 4 are cache that can be dropped
    assert m.cores == 16


@pytest.mark.parametrize(("variable", "free_mib"), [
    ("0", [81008]), ("1", [40000]), ("1,0", [40000, 81008]), ("GPU-bb", [40000]), ("", []), ("-1", []),
    ("0,7,1", [81008]), ("GPU-", []), ("none", []),
])
def test_cuda_visible_devices_is_honoured(variable: str, free_mib: list[int]):
    m = probe(HERE, replace(H100, variables={"CUDA_VISIBLE_DEVICES": variable}))
    assert [g.free_bytes >> 20 for g in m.gpus] == free_mib
    assert m.gpu_bfloat16 is bool(free_mib)


def test_one_old_gpu_among_those_used_means_no_bfloat16():
    mixed = replace(H100, commands={**H100.commands, CAP_QUERY: "9.0\n7.5\n"})
    assert not probe(HERE, mixed).gpu_bfloat16
    assert probe(HERE, replace(mixed, variables={"CUDA_VISIBLE_DEVICES": "0"})).gpu_bfloat16


def test_a_driver_that_does_not_know_compute_cap():
    old = replace(RTX_4090, commands={GPU_QUERY: RTX_4090.commands[GPU_QUERY]})
    m = probe(HERE, old)
    assert len(m.gpus) == 1 and not m.gpu_bfloat16


def test_a_gpu_without_memory_of_its_own_has_the_machines():
    spark = Recorded(
        machine="aarch64", ram=(120 * GIB, 100 * GIB, 0),
        commands={GPU_QUERY: "GPU-cc, NVIDIA GB10, [N/A], [N/A]\n", CAP_QUERY: "12.1\n"},
        files={"/proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n",
               "/proc/device-tree/model": "DGX Spark\0"},
    )
    m = probe(HERE, spark)
    assert m.unified and m.gpus == (Gpu("NVIDIA GB10", "cuda", 120 * GIB, 100 * GIB),)
    assert (m.arch, m.chip, m.cpu_bfloat16) == ("arm64", "DGX Spark", True)


def test_container_limits_of_cgroup_v2():
    m = probe(HERE, CONTAINER)
    assert (m.cores, m.ram_bytes, m.free_ram_bytes) == (2, 4 * GIB, 3 * GIB)
    assert m.gpus == () and not m.cpu_bfloat16


def test_the_tightest_group_of_cgroup_v2_counts():
    slice_ = "/sys/fs/cgroup/user.slice"
    m = probe(HERE, Recorded(files={
        "/proc/self/cgroup": "0::/user.slice/app.scope\n",
        f"{slice_}/memory.max": f"{6 * GIB}\n", f"{slice_}/memory.current": f"{2 * GIB}\n",
        f"{slice_}/app.scope/memory.max": "max\n",
    }))
    assert (m.ram_bytes, m.free_ram_bytes) == (6 * GIB, 4 * GIB)


def test_container_limits_of_cgroup_v1():
    base = "/sys/fs/cgroup"
    m = probe(HERE, Recorded(affinity=8, files={
        "/proc/self/cgroup": "9:name=systemd:/\n4:memory:/docker/x\n2:cpuacct:/\n0::/\n",
        f"{base}/memory/memory.limit_in_bytes": "9223372036854771712\n",  # no limit, as v1 writes it
        f"{base}/memory/docker/x/memory.limit_in_bytes": f"{2 * GIB}\n",
        f"{base}/memory/docker/x/memory.usage_in_bytes": f"{1 * GIB}\n",
        f"{base}/memory/docker/x/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
        f"{base}/cpu/cpu.cfs_quota_us": "150000\n", f"{base}/cpu/cpu.cfs_period_us": "100000\n",
    }))
    assert (m.ram_bytes, m.free_ram_bytes, m.cores) == (2 * GIB, int(1.5 * GIB), 2)


def test_free_memory_is_never_more_than_the_system_has():
    m = probe(HERE, replace(CONTAINER, ram=(256 * GIB, 1 * GIB, 0)))
    assert m.free_ram_bytes == 1 * GIB


def test_a_system_that_tells_nothing_is_a_plain_cpu():
    m = probe(HERE, Recorded(versions={}))
    assert (m.chip, m.gpus, m.cpu_bfloat16, m.ram_bytes) == ("x86_64", (), False, 16 * GIB)
    assert set(INSTALLED) <= set(m.versions) and not any(m.versions.values())


def test_windows_names_its_arch_in_our_words():
    m = probe(HERE, Recorded(name="Windows", machine="AMD64", release="11"))
    assert (m.arch, m.python_arch, m.release) == ("x86_64", "x86_64", "11")


def test_sapphire_rapids_flag_on_its_own():
    m = probe(HERE, Recorded(files={"/proc/cpuinfo": cpuinfo("X", "avx512f amx_bf16")}))
    assert m.cpu_bfloat16


def test_this_machine(tmp_path: Path):
    m = probe(tmp_path / "not" / "there" / "yet")
    assert m.cores >= 1 and m.free_disk_bytes > 0
    assert 0 < m.free_ram_bytes <= m.ram_bytes
    assert m.versions["numpy"]


def test_this_system_says_nothing_of_what_is_not_there():
    ask = ThisSystem()
    assert ask.run("burnish-no-such-command") is None
    assert ask.run(sys.executable, "-c", "raise SystemExit(3)") is None
    assert ask.run(sys.executable, "-c", "print('yes')") == "yes\n"
    assert ask.read("/no/such/file") is None
    assert ask.version("burnish-no-such-package") == ""


def test_probing_imports_no_framework():
    code = ("import sys; from pathlib import Path; from burnish.machine.probe import probe; probe(Path('.'));"
            "print([n for n in ('torch', 'mlx', 'transformers', 'numpy') if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

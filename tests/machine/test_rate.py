"""Rates: measured in a real process, kept in a cache that is not trusted, and published ones by GPU name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from burnish.machine import rate as rates
from burnish.machine.chips import CARDS, apple
from burnish.machine.probe import Gpu, Machine, probe
from burnish.machine.rate import cache_folder, measured_rate, published_rate
from tests.machine import recorded

TOLD = '{"flops": 2e11, "bytes_per_s": 3e10}'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This machine as far as rates go, with a cache folder of its own."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return replace(probe(Path("/"), recorded.CONTAINER), versions={"torch": "2.13.0", "mlx": "0.32.4"})


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[], list[list[str]]]]:
    """Another program in the place of Python: it notes its arguments, then does what the test says."""

    def made(script: str) -> Callable[[], list[list[str]]]:
        program, calls = tmp_path / "python", tmp_path / "calls"
        program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{script}\n', encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return lambda: [line.split() for line in calls.read_text().splitlines()] if calls.exists() else []

    return made


def say(text: str) -> str:
    return f"cat <<'END'\n{text}\nEND"


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_real_process_measures_this_machine(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip({"torch": "torch", "mlx": "mlx.core"}[backend])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = probe(tmp_path)
    found = measured_rate(backend, "cpu", "float32", machine, seconds=0.01, limit_s=120)
    assert found is not None and found.measured
    assert found.flops > 1e8 and found.bytes_per_s > 1e7  # any computer's, in the units that are promised
    assert machine.chip in found.source and machine.versions[backend] in found.source


def test_operations_and_bytes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from burnish.backends import rate as child

    monkeypatch.setattr(child, "fastest", lambda run, seconds: (run(), 0.5)[1])
    found = child.measure("torch", "cpu", "float32", 1.0, sizes=(64, 32, 16), copy_bytes=4096)
    assert found == {"flops": 2 * 64 * 32 * 16 / 0.5, "bytes_per_s": 2 * 4096 / 0.5}


def test_the_fastest_run_counts_and_the_first_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.backends import rate as child

    now, lengths = [0.0], iter([0.001, 4.0, 2.0, 3.0])
    monkeypatch.setattr(child.time, "perf_counter", lambda: now[0])

    def run() -> None:
        now[0] += next(lengths)

    assert child.fastest(run, 0.0) == 2.0


def test_the_second_time_is_read(
    here: Machine, child: Callable[[str], Callable[[], list[list[str]]]]
) -> None:
    calls = child(say(f"a framework's greeting\n{TOLD}"))
    first = measured_rate("torch", "cpu", "float32", here)
    assert first is not None and (first.flops, first.bytes_per_s) == (2e11, 3e10)
    assert measured_rate("torch", "cpu", "float32", here) == first
    assert len(calls()) == 1
    assert calls()[0][-5:] == ["burnish.backends.rate", "torch", "cpu", "float32", "1.0"]


@pytest.mark.parametrize(
    "other",
    [
        {"device": "cuda"}, {"dtype": "bfloat16"}, {"backend": "mlx"}, {"chip": "another"}, {"cores": 64},
        {"versions": {"torch": "2.14.0"}}, {"openblas": True}, {"OMP_NUM_THREADS": "7"},
    ],
    ids=str,
)  # fmt: skip
def test_anything_else_is_measured_for_itself(
    other: dict, here: Machine, child: Callable[[str], Callable[[], list[list[str]]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls = child(say(TOLD))
    asked = {"backend": "torch", "device": "cpu", "dtype": "float32"}
    measured_rate(*asked.values(), machine=here)
    for name in ("chip", "cores", "versions", "openblas"):
        here = replace(here, **{name: other[name]}) if name in other else here
    if "OMP_NUM_THREADS" in other:
        monkeypatch.setenv("OMP_NUM_THREADS", other["OMP_NUM_THREADS"])
    measured_rate(*(other.get(k, v) for k, v in asked.items()), machine=here)
    assert len(calls()) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"key": {}}', '{"flops": 1, "bytes_per_s": 1}', "\x00\xff"], ids=repr
)
def test_a_damaged_cache_is_measured_again(
    text: str, here: Machine, child: Callable[[str], Callable[[], list[list[str]]]]
) -> None:
    calls = child(say(TOLD))
    first = measured_rate("torch", "cpu", "float32", here)
    (kept,) = cache_folder().iterdir()
    whole = kept.read_bytes()
    kept.write_text(text, encoding="latin-1")
    assert measured_rate("torch", "cpu", "float32", here) == first
    assert len(calls()) == 2
    assert [p.read_bytes() for p in cache_folder().iterdir()] == [whole]


@pytest.mark.parametrize("number", ["0", "-1", "NaN", "Infinity", '"fast"', "null"])
def test_a_number_that_is_no_rate_in_the_cache(
    number: str, here: Machine, child: Callable[[str], Callable[[], list[list[str]]]]
) -> None:
    calls = child(say(TOLD))
    first = measured_rate("torch", "cpu", "float32", here)
    (kept,) = cache_folder().iterdir()
    kept.write_text(
        json.dumps({**json.loads(kept.read_text()), "flops": 0}).replace('"flops": 0', f'"flops": {number}')
    )
    assert measured_rate("torch", "cpu", "float32", here) == first
    assert len(calls()) == 2


def test_a_busy_cpu_is_measured_again_another_time(
    here: Machine, child: Callable[[str], Callable[[], list[list[str]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = child(say(TOLD))
    monkeypatch.setattr(os, "getloadavg", lambda: (here.cores, 0.0, 0.0))
    busy = measured_rate("torch", "cpu", "float32", here)
    assert busy is not None and "busy" in busy.source and not cache_folder().exists()
    measured_rate("torch", "cuda", "float32", here)  # a GPU is another matter
    assert len(list(cache_folder().iterdir())) == 1
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    idle = measured_rate("torch", "cpu", "float32", here)
    assert idle is not None and "busy" not in idle.source and len(calls()) == 3
    monkeypatch.setattr(os, "getloadavg", lambda: (here.cores, 0.0, 0.0))
    assert measured_rate("torch", "cpu", "float32", here) == idle  # what was kept is read
    assert len(calls()) == 3


@pytest.mark.parametrize(
    "script",
    [
        "exit 1", f"{say(TOLD)}\nexit 1", "", say("Traceback"), say("[1, 2]"), say('{"flops": 1}'),
        say('{"flops": -1, "bytes_per_s": 1}'), say('{"flops": NaN, "bytes_per_s": 1}'), "kill -9 $$",
    ],
    ids=repr,
)  # fmt: skip
def test_a_process_that_fails_gives_none_and_leaves_nothing(
    script: str, here: Machine, child: Callable[[str], Callable[[], list[list[str]]]]
) -> None:
    calls = child(script)
    assert measured_rate("torch", "cpu", "float32", here) is None
    assert len(calls()) == 1 and not cache_folder().exists()


def test_a_process_that_hangs_is_ended(
    here: Machine, child: Callable[[str], Callable[[], list[list[str]]]], tmp_path: Path
) -> None:
    child(f"echo $$ > {tmp_path}/pid\nsleep 3\n{say(TOLD)}")  # an answer that comes too late is none
    assert measured_rate("torch", "cpu", "float32", here, limit_s=0.5) is None
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_process_where_there_is_nothing_to_measure(
    here: Machine, child: Callable[[str], Callable[[], list[list[str]]]]
) -> None:
    calls = child(say(TOLD))
    assert measured_rate("reference", "cpu", "float32", here) is None
    assert measured_rate("torch", "cpu", "float32", replace(here, versions={"torch": ""})) is None
    assert calls() == []


def test_a_device_that_is_not_there_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured_rate("torch", "cuda", "bfloat16", probe(tmp_path), seconds=0.01, limit_s=120) is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_may_not_be_written_is_no_matter(
    here: Machine, child: Callable[[str], Callable[[], list[list[str]]]], tmp_path: Path
) -> None:
    child(say(TOLD))
    (tmp_path / "cache").mkdir(mode=0o500)
    assert measured_rate("torch", "cpu", "float32", here) is not None


def test_a_cache_folder_that_is_a_file_is_no_matter(
    here: Machine, child: Callable[[str], Callable[[], list[list[str]]]], tmp_path: Path
) -> None:
    child(say(TOLD))
    (tmp_path / "cache").write_text("in the way")
    assert measured_rate("torch", "cpu", "float32", here) is not None


def test_a_cache_that_cannot_be_finished_leaves_nothing(
    here: Machine, child: Callable[[str], Callable[[], list[list[str]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    child(say(TOLD))

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rates.os, "replace", full)
    assert measured_rate("torch", "cpu", "float32", here) is not None
    assert list(cache_folder().iterdir()) == []


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "burnish"
    monkeypatch.setattr(sys, "platform", "linux")
    for asked in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", asked)
        assert cache_folder() == tmp_path / ".cache" / "burnish"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "burnish"


def test_the_module_loads_no_framework() -> None:
    code = "import sys, burnish.machine.rate; print({'torch', 'mlx', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- published


def test_an_nvidia_gpu_by_its_name() -> None:
    machine = probe(Path("/"), recorded.H100)
    half, full = (published_rate(machine, "cuda", d) for d in ("bfloat16", "float32"))
    assert half is not None and full is not None and not half.measured
    assert (half.flops, full.flops, half.bytes_per_s) == (989e12, 67e12, 3.35e12)
    assert "H100" in half.source and half.source.startswith("published")


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L40S", "NVIDIA H200", ""])
def test_a_like_name_is_another_gpu(name: str) -> None:
    machine = replace(probe(Path("/"), recorded.H100), gpus=(Gpu(name, "cuda", 1 << 30, 1 << 30),))
    assert published_rate(machine, "cuda", "bfloat16") is None


def test_a_gpu_without_bfloat16_has_no_rate_in_it() -> None:
    machine = replace(probe(Path("/"), recorded.H100), gpus=(Gpu("Tesla T4", "cuda", 16 << 30, 15 << 30),))
    assert published_rate(machine, "cuda", "bfloat16") is None
    single = published_rate(machine, "cuda", "float32")
    assert single is not None and single.flops == 8.1e12


def test_nothing_is_published_of_a_cpu_nor_of_a_gpu_that_is_not_there() -> None:
    machine = probe(Path("/"), recorded.CONTAINER)
    assert published_rate(machine, "cpu", "float32") is None
    assert published_rate(machine, "cuda", "bfloat16") is None
    assert published_rate(machine, "metal", "bfloat16") is None
    unknown = replace(probe(Path("/"), recorded.M1_8), chip="Apple M9 Max")
    assert published_rate(unknown, "metal", "float32") is None


def test_an_apple_chip_by_name_and_cpu_cores() -> None:
    """As Apple says: M1 2.6 teraflops (8 cores), M2 Max 13.6 (38), M2 Ultra 27.2 (76)."""
    rates_of = {
        which.chip: published_rate(which, device, "bfloat16")
        for which in (probe(Path("/"), r) for r in (recorded.M1_8, recorded.M2_PRO_32, recorded.M4_MAX_128))
        for device in ("mps", "metal")
    }
    m1, m2, m4 = (rates_of[f"Apple {n}"] for n in ("M1", "M2 Pro", "M4 Max"))
    assert m1 is not None and m2 is not None and m4 is not None
    assert m1.flops == pytest.approx(2.6e12 * 7 / 8) and "7 GPU cores (the fewest" in m1.source
    assert m2.flops == pytest.approx(6.8e12, rel=0.01) and "fewest" not in m2.source
    assert m1.bytes_per_s < m2.bytes_per_s < m4.bytes_per_s == 546e9


def test_an_unknown_number_of_cores_is_the_smallest_variant() -> None:
    shared, smallest = apple("Apple M3 Max", 6), apple("Apple M3 Max", 14)
    assert shared is not None and smallest is not None
    assert (shared.flops, shared.bytes_per_s, shared.fewest) == (smallest.flops, smallest.bytes_per_s, True)
    assert apple("Apple M3 Pro Max", 14) is None


def test_every_card_is_faster_in_half_the_bits() -> None:
    for name, card in CARDS.items():
        assert card.bfloat16 is None or card.bfloat16 > card.float32, name
        assert 1e11 < card.bytes_per_s < card.float32, name

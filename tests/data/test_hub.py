"""Data sets of a hub: their ids, their rows, and what is said when there are none, all without a network."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from burnish.data import hub
from burnish.data.hub import HubId, parse_id
from burnish.data.rows import read_rows
from burnish.errors import UserError
from burnish.recipe import is_hub_id

ROWS = [{"question": f"q{i}", "answer": {"text": f"a{i}", "n": [i]}, "none": None} for i in range(5)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:openai/gsm8k", HubId("hf", "openai/gsm8k", None, "train")),
        ("hf:openai/gsm8k/main", HubId("hf", "openai/gsm8k", "main", "train")),
        ("hf:openai/gsm8k@test", HubId("hf", "openai/gsm8k", None, "test")),
        ("ms:A-b.c/d_e/zh-CN@train[:10%]", HubId("ms", "A-b.c/d_e", "zh-CN", "train[:10%]")),
    ],
)
def test_ids(source: str, expected: HubId) -> None:
    assert is_hub_id(source) and parse_id(source) == expected
    assert parse_id(str(expected)) == expected


@pytest.mark.parametrize(
    "source", ["hf:", "hf:gsm8k", "hf:a/b/c/d", "ms:a/b@", "hf:a/b@x@y", "hf: a/b", "hf:a//b"]
)
def test_what_is_no_id_is_said(source: str) -> None:
    with pytest.raises(UserError, match=r"expected \w\w:OWNER/NAME"):
        read_rows(source)


@pytest.mark.parametrize("path", ["rows.json", "data/hf:x.json", "/hf:/a/b", "HF:a/b"])
def test_paths_are_no_ids(path: str) -> None:
    assert not is_hub_id(path)


def answer(monkeypatch: pytest.MonkeyPatch, result: Iterable[Mapping[str, Any]] | Exception) -> list[HubId]:
    """Both hubs give this; what they are asked for is written down."""
    asked: list[HubId] = []

    def load(wanted: HubId) -> Iterable[Mapping[str, Any]]:
        asked.append(wanted)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(hub, "load_from_hf", load)
    monkeypatch.setattr(hub, "load_from_ms", load)
    return asked


def test_rows_of_a_real_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="no datasets: pip install 'burnish[data]'")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    asked = answer(monkeypatch, datasets.load_from_disk(tmp_path / "set"))
    found = read_rows("hf:owner/name/main@test")
    assert asked == [HubId("hf", "owner/name", "main", "test")]
    assert [r.values for r in found.rows] == ROWS
    assert (found.container, found.bad) == ("Hugging Face data set", ())
    assert [r.at for r in found.rows][::4] == ["hf:owner/name/main@test:1", "hf:owner/name/main@test:5"]
    assert [r.values for r in read_rows("hf:owner/name", 2).rows] == ROWS[:2]
    assert read_rows("ms:owner/name").container == "ModelScope data set"


def test_the_library_is_asked_for_the_split_and_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="no datasets: pip install 'burnish[data]'")
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_rows("hf:owner/name/main@test").rows) == 5
    assert asked == [("owner/name", "main", "test")]


def test_the_real_library_lists_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of the installed version, so that a new wording is seen here."""
    datasets = pytest.importorskip("datasets", reason="no datasets: pip install 'burnish[data]'")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"a": 1}\n', encoding="utf-8")

    def load(wanted: HubId) -> Any:
        cache = str(tmp_path / "cache")
        return datasets.load_dataset(str(folder), wanted.config, split=wanted.split, cache_dir=cache)

    monkeypatch.setattr(hub, "load_from_hf", load)
    assert read_rows("hf:a/b").rows[0].values == {"a": 1}
    with pytest.raises(UserError, match="a/b has no split nope; its splits are train\nwrite hf:a/b@train"):
        read_rows("hf:a/b@nope")
    with pytest.raises(
        UserError, match="a/b has no configuration c; it has default\nwrite hf:a/b/default@train"
    ):
        read_rows("hf:a/b/c")


class DatasetNotFoundError(FileNotFoundError):
    """As `datasets` names it."""


RECORDED = [  # datasets 5.2.0 and 4.8, huggingface_hub 1.x
    (
        ValueError("Unknown split \"dev\". Should be one of ['train', 'test']."),
        ["owner/name has no split dev; its splits are train, test", "write hf:owner/name/main@train"],
    ),
    (
        ValueError("BuilderConfig 'main' not found. Available: ['socratic', 'zh']"),
        ["no configuration main; it has socratic, zh", "write hf:owner/name/socratic@dev"],
    ),
    (
        ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\n"
            "Example of usage:\n\t`load_dataset('owner/name', 'main')`"
        ),
        ["it has main, socratic"],
    ),
    (
        ValueError(
            "Couldn't find cache for owner/name for config 'main'\nAvailable configs in the cache: ['zh']"
        ),
        ["no configuration main on this machine; there are zh", "write hf:owner/name/zh@dev"],
    ),
    (
        ValueError("Couldn't find cache for owner/name for config 'main'"),
        ["is not on this machine", "datasets.load_dataset('owner/name', 'main')"],
    ),
    (
        ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)"),
        [
            "cannot be reached",
            "without HF_HUB_OFFLINE",
            "datasets.load_dataset('owner/name', 'main')",
            "HF_ENDPOINT",
        ],
    ),
    (
        ConnectionError("Couldn't reach 'owner/name' on the Hub (LocalEntryNotFoundError)"),
        ["cannot be reached", "HF_ENDPOINT="],
    ),
    (OSError("[Errno -2] Temporary failure in name resolution"), ["cannot be reached", "HF_ENDPOINT="]),
    (TimeoutError("the read operation timed out"), ["cannot be reached"]),
    (
        DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub or cannot be accessed."),
        ["is not on the hub, or is private", "compare the name"],
    ),
    (
        DatasetNotFoundError(
            "Dataset 'owner/name' is a gated dataset on the Hub. You must be authenticated to access it."
        ),
        ["may be read only by those whom its owner lets", "hf auth login"],
    ),
    (
        RuntimeError("Dataset scripts are no longer supported, but found name.py"),
        ["is a program that makes a data set", "data.train"],
    ),
    (
        KeyError("features"),
        ["hf:owner/name/main@dev cannot be loaded: KeyError: 'features'", "download its files"],
    ),
]


@pytest.mark.parametrize(("error", "expected"), RECORDED)
def test_every_failure_is_a_sentence_with_the_next_step(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: list[str]
) -> None:
    answer(monkeypatch, error)
    with pytest.raises(UserError) as e:
        read_rows("hf:owner/name/main@dev")
    assert e.value.hint
    for part in expected:
        assert part in str(e.value)


def test_an_id_without_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, RECORDED[2][0])
    with pytest.raises(
        UserError, match="has several configurations; it has main, socratic\nwrite hf:a/b/main@train"
    ):
        read_rows("hf:a/b")


def test_modelscope_has_no_mirror_of_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, ConnectionError("no route"))
    with pytest.raises(UserError) as e:
        read_rows("ms:owner/name")
    assert "MsDataset.load('owner/name'" in e.value.hint and "HF_ENDPOINT" not in e.value.hint


def test_a_row_that_cannot_be_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield ROWS[0]
        raise ImportError("To support decoding audio files, please install 'torchcodec'.")

    answer(monkeypatch, rows())
    with pytest.raises(UserError, match="row 2 cannot be read: To support decoding"):
        read_rows("hf:owner/name")


def test_a_data_set_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, [])
    with pytest.raises(UserError, match="hf:owner/name holds no rows"):
        read_rows("hf:owner/name")


@pytest.mark.parametrize(
    ("source", "library", "how"),
    [
        ("hf:a/b", "datasets", r"pip install 'burnish\[data\]'"),
        ("ms:a/b", "modelscope", r"pip install 'burnish\[data\]' 'modelscope\[datasets\]'"),
    ],
)
def test_without_the_library(monkeypatch: pytest.MonkeyPatch, source: str, library: str, how: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"needs the library {library}, which is not installed\n{how}"):
        read_rows(source)


def test_modelscope_is_asked_for_the_split_and_the_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    class MsDataset:
        @staticmethod
        def load(dataset_name: str, *, subset_name: str | None, split: str) -> list[dict[str, Any]]:
            asked.append((dataset_name, subset_name, split))
            return ROWS

    library, room = ModuleType("modelscope"), ModuleType("modelscope.msdatasets")
    room.MsDataset = MsDataset  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "modelscope", library)
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", room)
    assert [r.values for r in read_rows("ms:owner/name/zh@test").rows] == ROWS
    assert asked == [("owner/name", "zh", "test")]

"""A hub's data set to rows: `hf:OWNER/NAME[/CONFIG][@SPLIT]`, or `ms:…` for ModelScope.

    container, items = hub_rows("hf:openai/gsm8k/main@test")

An item is (row number from 1, values). The libraries (`datasets`, `modelscope`) are imported only
here, when such an id is read; they keep what they fetched, and with HF_HUB_OFFLINE set `datasets` reads that.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from burnish.errors import EXIT_FAILED, UserError

_ID = re.compile(r"(hf|ms):([\w.-]+/[\w.-]+)(?:/([^/@\s]+))?(?:@([^/@\s]+))?")
_HUBS = {"hf": "Hugging Face data set", "ms": "ModelScope data set"}
_UNREACHED = (
    "couldn't reach", "couldn't find cache", "offline", "connection", "timed out", "max retries",
    "name resolution",
)  # fmt: skip


@dataclass(frozen=True)
class HubId:
    hub: str  # hf or ms
    name: str  # OWNER/NAME
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.hub}:{self.name}{f'/{self.config}' if self.config else ''}@{self.split}"

    def but(self, config: str | None, split: str) -> HubId:
        return HubId(self.hub, self.name, config, split)


def parse_id(source: str) -> HubId:
    """Raises UserError for what is no id of a data set."""
    found = _ID.fullmatch(source)
    if not found:
        raise UserError(
            f"{source} is no data set: expected {source[:3]}OWNER/NAME, then perhaps /CONFIG, then perhaps "
            "@SPLIT",
            "such as hf:openai/gsm8k/main@train",
        )
    return HubId(found[1], found[2], found[3], found[4] or "train")


def hub_rows(source: str, first: int | None = None) -> tuple[str, Iterator[tuple[int, dict[str, Any]]]]:
    """What holds the rows, and the rows (the `first` so many of them), each with its number from 1.

    Raises UserError for everything that the libraries fail on, with the next step.
    """
    wanted = parse_id(source)
    # The libraries raise types of their own, of the standard library and of their HTTP clients, so no list of
    # types is whole: whatever it is, the person asked for a data set and did not get it.
    try:
        found = load_from_hf(wanted) if wanted.hub == "hf" else load_from_ms(wanted)
    except UserError:
        raise
    except Exception as e:
        raise _explained(e, wanted) from e
    return _HUBS[wanted.hub], _numbered(found, wanted, first)


def load_from_hf(wanted: HubId) -> Iterable[Mapping[str, Any]]:
    """Downloads what is not on this machine yet."""
    try:
        import datasets
    except ModuleNotFoundError as e:
        raise _not_installed(wanted, "datasets", e, "pip install 'burnish[data]'") from e
    return datasets.load_dataset(wanted.name, wanted.config, split=wanted.split)  # pyright: ignore[reportReturnType]


def load_from_ms(wanted: HubId) -> Iterable[Mapping[str, Any]]:
    """Downloads what is not on this machine yet."""
    try:
        from modelscope.msdatasets import MsDataset
    except ModuleNotFoundError as e:
        raise _not_installed(
            wanted, "modelscope", e, "pip install 'burnish[data]' 'modelscope[datasets]'"
        ) from e
    return MsDataset.load(wanted.name, subset_name=wanted.config, split=wanted.split)


def _not_installed(wanted: HubId, library: str, error: ModuleNotFoundError, how: str) -> UserError:
    part = f" ({library} needs {error.name})" if error.name and error.name.split(".")[0] != library else ""
    return UserError(f"{wanted} needs the library {library}, which is not installed{part}", how)


def _numbered(
    found: Iterable[Mapping[str, Any]], wanted: HubId, first: int | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = enumerate(islice(found, first), 1)
    number = 0
    while True:
        # Features are decoded row by row, so the library can fail here too, with any type.
        try:
            number, values = next(rows)
        except StopIteration:
            return
        except Exception as e:
            raise UserError(
                f"{wanted}: row {number + 1} cannot be read: {_first_line(e)}",
                "use the rows before it with data.rows, or another data set",
            ) from e
        yield number, dict(values)


def _explained(error: Exception, wanted: HubId) -> UserError:
    """What went wrong in loading, by the text of the library's error."""
    text = str(error)
    low = text.lower()
    splits = _listed(text, r"Should be one of (\[.*?\])")
    if splits:
        return UserError(
            f"{wanted.name} has no split {wanted.split}; its splits are {', '.join(splits)}",
            f"write {wanted.but(wanted.config, splits[0])}",
        )
    if configs := _listed(text, r"[Aa]vailable(?: configs)?(?: in the cache)?: (\[.*?\])"):
        here = " on this machine" if "the cache" in text else ""
        asked = f"no configuration {wanted.config}{here}" if wanted.config else "several configurations"
        return UserError(
            f"{wanted.name} has {asked}; {'there are' if here else 'it has'} {', '.join(configs)}",
            f"write {wanted.but(configs[0], wanted.split)}",
        )
    if "gated dataset" in low or re.search(r"\b40[13]\b", text):
        return UserError(
            f"{wanted.name} may be read only by those whom its owner lets: {_first_line(error)}",
            "ask for access on its page, then: hf auth login",
        )
    if isinstance(error, ConnectionError | TimeoutError) or any(word in low for word in _UNREACHED):
        return _unreached(error, wanted)
    if "doesn't exist on the hub" in low or "couldn't find" in low or "not found" in low:
        return UserError(
            f"{wanted.name} is not on the hub, or is private: {_first_line(error)}",
            "compare the name with its page; for a private data set: hf auth login",
        )
    if "scripts are no longer supported" in low:
        return UserError(
            f"{wanted.name} is a program that makes a data set, and the library runs none any more",
            "look for a copy of it in Parquet, or download its files and name one in data.train",
        )
    return UserError(
        f"{wanted} cannot be loaded: {type(error).__name__}: {_first_line(error)}",
        "download its files and name one in data.train, or use another data set",
        EXIT_FAILED,
    )


def _unreached(error: Exception, wanted: HubId) -> UserError:
    if wanted.hub == "ms":
        how = f"MsDataset.load('{wanted.name}', subset_name={wanted.config!r}, split='{wanted.split}')"
        how = f'python -c "from modelscope.msdatasets import MsDataset; {how}"'
        mirror = ""
    else:
        code = f"import datasets; datasets.load_dataset({wanted.name!r}, {wanted.config!r})"
        how = f'python -c "{code}"'
        mirror = "; where the hub is slow or closed, first: export HF_ENDPOINT=https://hf-mirror.com"
    return UserError(
        f"{wanted} is not on this machine and its hub cannot be reached: {_first_line(error)}",
        f"with a network, and without HF_HUB_OFFLINE, fetch it beforehand: {how}{mirror}",
        EXIT_FAILED,
    )


def _listed(text: str, pattern: str) -> list[str]:
    """The names of a Python list that the library printed into its message."""
    found = re.search(pattern, text, re.S)
    if not found:
        return []
    try:
        return [str(name) for name in ast.literal_eval(found[1])]
    except (ValueError, SyntaxError):
        return []


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

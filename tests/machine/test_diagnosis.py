"""The catalogue against recorded messages: each is known by one entry alone, and what is no failure by none.

A file of `messages/` says in its first line which entry it belongs to, and in its second where it was
recorded.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from burnish.cli.app import app
from burnish.machine.diagnosis import Diagnosis, diagnose, entries, entry, language_of, matching
from burnish.machine.doctor import checks
from burnish.machine.probe import probe
from burnish.recipe import Recipe, parse, schema, shipped, shipped_text
from tests.machine import recorded

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHINESE = re.compile(r"[\u4e00-\u9fff]")
OVERRIDE = re.compile(r"[a-z_]+(?:\.[a-z_]+)?=")
VERBS = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
# Tried once a line, from its beginning.
UNLESS_AN_ERROR = r"^(?:\w+\.)*\w*(?:Error|Exception)\b"
# What a remedy may have a person type beside recipe keys, burnish and pip: nothing that destroys anything.
PROGRAMS = {
    "pip", "export", "unset", "hf", "modelscope", "git", "python3", "python3.12", "/opt/homebrew/bin/brew",
    "/opt/homebrew/bin/python3.12", "nvidia-smi", "sw_vers", "df", "ldd", "ls", "mount", "quota", "ulimit",
    "apt-get",
}  # fmt: skip


@dataclass(frozen=True)
class Message:
    name: str
    id: str
    source: str
    text: str


def _messages() -> list[Message]:
    found: list[Message] = []
    for path in sorted((HERE / "messages").glob("*.txt")):
        first, second, text = path.read_text(encoding="utf-8").split("\n", 2)
        assert first.startswith("# id: ") and second.startswith("# source: "), path.name
        found.append(Message(path.stem, first[6:], second[10:], text))
    return found


MESSAGES = _messages()
EN, ZH = entries("en"), entries("zh")
TYPED = sorted({r.try_ for e in EN for r in e.remedies if r.try_})


def text_of(name: str) -> str:
    return next(m.text for m in MESSAGES if m.name == name)


# --- recorded messages ---


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m.name)
def test_a_recorded_message_is_known_by_its_entry_and_by_no_other(message: Message) -> None:
    assert matching(message.text) == [message.id]
    found = diagnose(message.text)
    assert found is not None and found.id == message.id
    assert message.source and message.text.strip()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m.name)
def test_it_is_found_in_the_middle_of_a_log(message: Message) -> None:
    log = f"loading the model\nstep 1 of 20: loss 2.31\n{message.text}\n3 leaked semaphores to clean up\n"
    assert matching(log) == [message.id]


def test_every_entry_has_a_recorded_message_and_there_are_many() -> None:
    assert {m.id for m in MESSAGES} == {e.id for e in EN}
    assert len(MESSAGES) >= 60


def test_of_several_the_first_in_the_file_wins() -> None:
    memory, crash = text_of("mps-out-of-memory-1"), text_of("segmentation-fault-1")
    order = [e.id for e in EN]
    assert order.index("mps-out-of-memory") < order.index("segmentation-fault")
    for message in (memory + crash, crash + memory):  # by the file's order, not by the message's
        assert matching(message) == ["mps-out-of-memory", "segmentation-fault"]
        found = diagnose(message)
        assert found is not None and found.id == "mps-out-of-memory"


@pytest.mark.parametrize(
    ("general", "specific"),
    [
        ("segmentation-fault-1", "segfault-two-openmp-1"),
        ("mlx-library-missing-3", "macos-too-old-3"),
        ("pip-timeout-1", "hub-timeout-1"),
        ("hub-unreachable-1", "ssl-certificate-2"),
        ("hub-unreachable-1", "proxy-refused-1"),
        ("hub-unreachable-1", "hub-rate-limit-1"),
        ("hub-unreachable-1", "hub-server-error-1"),
        ("hub-unreachable-1", "hub-timeout-1"),
        ("disk-full-5", "shared-memory-1"),
        ("disk-full-5", "disk-quota-1"),
        ("disk-full-5", "file-too-large-1"),
    ],
)
def test_in_a_chain_of_errors_the_one_that_names_the_cause_counts(general: str, specific: str) -> None:
    wanted = next(m.id for m in MESSAGES if m.name == specific)
    assert matching(text_of(specific) + text_of(general)) == [wanted]


def test_an_operation_that_falls_back_to_the_cpu_is_no_failure() -> None:
    said = "The operator 'aten::linalg_cholesky_ex.L' is not currently supported on the MPS backend"
    assert matching(f"NotImplementedError: {said}") == ["mps-operator-missing"]
    assert matching(f"UserWarning: {said} and will fall back to run on the CPU.") == []


@pytest.mark.parametrize(
    "warning", ["cache-with-checkpointing-1", "tokenizer-row-too-long-1", "tokenizers-after-fork-1"]
)
def test_a_warning_is_not_the_cause_where_an_error_stands(warning: str) -> None:
    assert diagnose(text_of(warning)) is not None
    assert diagnose(text_of(warning) + UNRELATED) is None
    found = diagnose(text_of(warning) + text_of("cuda-out-of-memory-1"))
    assert found is not None and found.id == "cuda-out-of-memory"


# --- what is no failure, or none that is known ---

UNRELATED = """Traceback (most recent call last):
  File "train.py", line 12, in <module>
    print(total + names)
          ~~~~~~^~~~~~~
TypeError: unsupported operand type(s) for +: 'int' and 'list'
"""
LOG = """run runs/demo: 12 examples (302 tokens, 84 of them trained), 0 to validate on
  torch on cpu, weights bfloat16; computing in bfloat16; micro-batch 4; activations kept for 3 layers, adapters in 3
  fits: needs 0.43 GiB of 20.29 GiB
Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'. Please make sure you already `pip install kernels` and the kernels >= 0.11.1
rehearsed the longest step: 0.45 GiB measured, 0.43 predicted (-4.3 %), 0.0 s
step 1/4  loss 6.6387  lr 2.00e-04  7303 tokens/s  0.46 GiB (peak 0.46 GiB)  left 0:00
step 4/4  loss 6.5658  lr 5.00e-05  5331 tokens/s  0.48 GiB (peak 0.48 GiB)  left 0:00
step 4: saved runs/demo/checkpoints/000004
adapter of step 4: runs/demo/adapter   (0:04 in all)
memory: estimated 0.43 GiB, measured peak 0.48 GiB (-10 %)
"""  # noqa: E501  (a run of burnish's, word for word)
WORDS_NEAR = """out of 1,000 rows 998 were kept
no memory of the last question is kept; the disk has space
mlx and torch are both installed; CUDA is available; MPS is available
killed 3 stale processes; segmentation of the text fell to 12 parts
KeyError: 'answer'
RuntimeError: shape '[2, 3]' is invalid for input of size 7
FileNotFoundError: [Errno 2] No such file or directory: 'data.jsonl'
"""


@pytest.mark.parametrize("text", ["", "\n", UNRELATED, LOG, WORDS_NEAR])
def test_unknown_errors_and_good_news_are_left_alone(text: str) -> None:
    assert matching(text) == []
    assert diagnose(text) is None


@pytest.mark.parametrize(
    "path", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name
)
def test_documents_are_no_failures(path: Path) -> None:
    assert matching(path.read_text(encoding="utf-8")) == []


def test_recipes_and_their_schema_are_no_failures() -> None:
    for text in (schema(), *(shipped_text(name) for name in shipped())):
        assert matching(text) == []


def test_what_doctor_says_of_recorded_machines_is_no_failure() -> None:
    machines = [v for v in vars(recorded).values() if isinstance(v, recorded.Recorded)]
    assert machines
    for system in machines:
        for check in checks(probe(Path("."), system)):
            assert matching(f"{check.name}: {check.found}\n{check.advice}") == [], check


# --- the entries themselves ---


def test_ids_are_words_with_hyphens_and_each_is_there_once() -> None:
    ids = [e.id for e in EN]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-z0-9]+(?:-[a-z0-9]+)*", i) for i in ids)


@pytest.mark.parametrize(("en", "zh"), list(zip(EN, ZH)), ids=[e.id for e in EN])
def test_both_languages_say_it_and_type_the_same(en: Diagnosis, zh: Diagnosis) -> None:
    assert en.id == zh.id and en.source == zh.source and en.source
    assert CHINESE.search(zh.cause) and not CHINESE.search(en.cause)
    assert en.remedies and [r.try_ for r in en.remedies] == [r.try_ for r in zh.remedies]
    for ours, theirs in zip(en.remedies, zh.remedies):
        assert ours.text and not CHINESE.search(ours.text)
        assert CHINESE.search(theirs.text)


def test_an_entry_is_found_by_its_id_in_either_language() -> None:
    assert entry("disk-full") == next(e for e in EN if e.id == "disk-full")
    assert entry("disk-full", "zh") == next(e for e in ZH if e.id == "disk-full")
    assert diagnose(text_of("disk-full-1"), "zh") == entry("disk-full", "zh")
    with pytest.raises(KeyError):
        entry("no-such-entry")


@pytest.mark.parametrize("typed", TYPED)
def test_what_is_to_be_typed_can_be_typed(typed: str) -> None:
    words = shlex.split(typed)
    if OVERRIDE.match(words[0]):
        if "care" not in Recipe.model_fields:
            words = [w for w in words if not w.startswith("care.")]
        assert all(OVERRIDE.match(w) for w in words)
        parse("", overrides=words)  # raises UserError for an unknown key, or a value that it does not take
    elif words[0] == "burnish":
        assert words[1] in VERBS
    else:
        assert words[0] in PROGRAMS


def test_a_wrong_key_or_value_would_be_noticed() -> None:
    """The check above rests on `parse`: it must refuse what no recipe takes."""
    from burnish.errors import UserError

    for wrong in ("train.micro_batches=1", "quantize=3bit", "train.max_length=short"):
        with pytest.raises(UserError):
            parse("", overrides=[wrong])


def test_no_limit_is_lifted_before_all_else_was_tried() -> None:
    """The guide's way out of full memory can take the whole system down."""
    last = entry("mps-out-of-memory").remedies[-1]
    assert last.try_ == "care.mps_limit=none" and "last resort" in last.text
    for e in EN:
        for remedy in e.remedies:
            assert "WATERMARK" not in remedy.try_


def test_no_pattern_can_run_on_without_end() -> None:
    """A message may be megabytes on one line. What is repeated freely within a pattern is tried at
    every place takes the square of that: such a pattern took 40 s of one megabyte.
    """
    text = (ROOT / "src/burnish/machine/diagnoses.toml").read_text(encoding="utf-8")
    for number, written in enumerate(tomllib.loads(text)["diagnosis"]):
        for pattern in [*written["patterns"], *written.get("unless", ())]:
            bare = pattern.replace(r"\*\*", "").replace(UNLESS_AN_ERROR, "")
            assert not re.search(r"(?:\.|\\S|\])[*+](?!\+)", bare.replace("[\\d.]+", "")), (number, pattern)


# --- language ---


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh"}, "zh"),
        ({"LANG": "ZH_tw"}, "zh"),
        ({"LANG": "zh-Hans"}, "zh"),
        ({"LANG": "zha_CN"}, "en"),
        ({"LANG": "C.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, "en"),
        ({"LC_MESSAGES": "en_US.UTF-8", "LC_ALL": "zh_TW.UTF-8"}, "zh"),
        ({"LC_ALL": "", "LC_MESSAGES": "", "LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LC_CTYPE": "zh_CN.UTF-8"}, "en"),
    ],
)
def test_the_language_is_taken_as_the_c_library_does(environment: dict[str, str], expected: str) -> None:
    assert language_of(environment) == expected

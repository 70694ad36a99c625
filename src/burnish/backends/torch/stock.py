"""A model folder as a stranger's script reads it: transformers, PEFT for an adapter, and nothing of ours.

    consumer = open_stock(Path("exported"), dtype="float32")
    nats = consumer.score(consumer.tokens("the whole text"))

No kernel, no patch and no knowledge of burnish's is in the way, so what comes out is what a user would get.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from burnish.backends.stock import Consumer
from burnish.backends.torch.device import translated
from burnish.errors import OutOfMemory, UserError, all_problems

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AT_A_TIME = 64  # rows of logits in float64: 64 × 150,000 words are 77 MB


class StockTorch:
    """transformers' model and tokenizer behind `Consumer`."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, ends: set[int] | None) -> None:
        self._model, self._tokenizer, self._device, self._ends = model, tokenizer, device, ends

    @torch.inference_mode()
    def score(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [T - 1], as `Consumer.score`. The softmax is in float64: torch's own in float32 is off by
        1.6e-5 over 49,152 words on a CPU, which is more than two right programs differ by.
        """
        ids = torch.tensor([list(tokens)], device=self._device)
        with translated():
            logits_TV = self._model(input_ids=ids, use_cache=False).logits[0, :-1].float().cpu()
        found = []
        for at in range(0, len(logits_TV), _AT_A_TIME):
            rows = torch.log_softmax(logits_TV[at : at + _AT_A_TIME].double(), -1)
            targets = torch.tensor(tokens[at + 1 : at + 1 + len(rows)])
            found.append(rows.gather(1, targets[:, None])[:, 0])
        return torch.cat(found).float().numpy() if found else np.zeros(0, np.float32)

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
        """As `Consumer.greedy`, by `model.generate`."""
        if max_new_tokens < 1:
            return []
        ids = torch.tensor([list(prompt)], device=self._device)
        how = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=0,
        )
        with translated():
            made = self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how
            )
        answer = made[0, ids.shape[1] :].tolist()
        return answer[:-1] if answer and answer[-1] in set(stop_ids) else answer

    def ends(self, token: int) -> bool | None:
        """As `Consumer.ends`, by generation_config.json."""
        return None if self._ends is None else token in self._ends

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """As `Consumer.prompt`, by `apply_chat_template`."""
        try:
            return self._tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, return_dict=False
            )
        except Exception as e:  # no template, or what Jinja and the template itself raise
            raise UserError(
                f"transformers makes no prompt of the messages: {type(e).__name__}: {str(e)[:500]}",
                "check the folder's chat_template.jinja",
            ) from e

    def tokens(self, text: str) -> list[int]:
        """As `Consumer.tokens`, by the tokenizer's own defaults."""
        return list(self._tokenizer(text)["input_ids"])

    def close(self) -> None:
        """Drops the model; on CUDA its memory goes back to the driver."""
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def open_stock(
    folder: Path, adapter: Path | None = None, dtype: str = "auto", device: str = "cpu"
) -> Consumer:
    """The model of `folder`, with the PEFT adapter of `adapter` on it where one is given, and that one's own
    tokenizer where it has one.

    dtype: 'auto' as stored, or 'float32', 'bfloat16', 'float16' to compute in that. device: torch's name of
    one. Raises UserError, in transformers' or PEFT's own words, for a folder that they cannot read, and for
    weights that the model has and the folder has not: transformers would draw them at random.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its advice is for those who train
    _check_there(folder, "config.json")
    try:
        own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(str(adapter if own else folder), local_files_only=True)
        with translated():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=DTYPES[dtype], local_files_only=True, output_loading_info=True
            )
            model, found = loaded
    except Exception as e:  # dozens of types: of JSON, of safetensors, of each model's own code
        raise _unread(folder, "transformers", e) from e
    if found["missing_keys"]:
        problems = sorted(found["missing_keys"])
        raise all_problems(
            f"{folder} lacks weights that transformers' model has:", problems, "write or download it again"
        )
    # `generate` would take from here what is not said to it: a model's own penalties and temperature.
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig()
    if adapter is not None:
        model = _with_adapter(model, adapter)
    where = torch.device(device)
    with translated():
        model = model.to(where).eval()
    named: list[int] = [ends] if isinstance(ends, int) else list(ends or ())
    return StockTorch(model, tokenizer, where, None if adapter is not None else set(named))


def _with_adapter(model: Any, adapter: Path) -> Any:
    _check_there(adapter, "adapter_config.json")
    try:
        with translated(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT's calls to older names in transformers
            return PeftModel.from_pretrained(model, str(adapter))
    except Exception as e:  # as many types as above
        raise _unread(adapter, "PEFT", e) from e


def _check_there(folder: Path, file: str) -> None:
    """Both libraries take what is no folder here for a name on a hub."""
    if not (folder / file).is_file():
        raise UserError(f"{folder} holds no {file}", "give the folder that holds it")


def _unread(folder: Path, library: str, error: Exception) -> Exception:
    if isinstance(error, OutOfMemory | MemoryError):
        return error
    said = f"{library} cannot load {folder}: {type(error).__name__}: {str(error)[:500]}"
    return UserError(said, "check that the folder is whole; burnish doctor   shows installed versions")

"""Which stock chat templates are proven on which conversations, and what takes over where they are not.

    python bench/templates.py --tokenizer .cache/SmolLM2-135M-Instruct

Prints two Markdown tables: templates × conversations, and the reasons for what is refused. Writes nothing.
The templates are those of an installed trl (pip install --no-deps trl), read as files. They are given to the
one tokenizer, with the tokens that they name added to it: what a template does with text does not depend on
the vocabulary. The conversations, and how the tokenizers are made, are those of tests/data/templates.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORDS = {
    "p": "proven", "q": "no-think", "P": "**plain**", "H": "**around**", "x": "refused",
    "!": "refused (tokens)",
}  # fmt: skip


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.path.insert(0, str(ROOT))
    from tests.data.templates import CASES, MORE_CASES, NO_TRL, carrying, outcome, stock_templates

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, default=ROOT / ".cache" / "SmolLM2-135M-Instruct")
    parser.add_argument("--only", nargs="*", default=[], help="names of templates")
    a = parser.parse_args()
    stock = {n: t for n, t in stock_templates().items() if not a.only or n in a.only}
    if not stock:
        sys.exit(NO_TRL)
    cases = {**CASES, **MORE_CASES}
    kinds: Counter[str] = Counter()
    reasons: dict[tuple[str, str], list[str]] = {}
    print(f"Templates of trl {version('trl')}, transformers {version('transformers')}.\n")
    print(f"| template | {' | '.join(cases)} |\n|---|{'---|' * len(cases)}")
    for name, text in stock.items():
        tokenizer, row = carrying(a.tokenizer, text, name), []
        for case, conversation in cases.items():
            kind, why, _ = outcome(tokenizer, conversation)
            kinds[WORDS[kind].strip("*")] += 1
            row.append(WORDS[kind])
            if kind in "x!":
                reasons.setdefault((name, why), []).append(case)
        print(f"| `{name}` | {' | '.join(row)} |", flush=True)
    print(f"\nOf {kinds.total()}: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}.")
    print(
        "\nproven: by the model's own template. no-think: by its own with `enable_thinking` false. **plain**:"
        " repaired by the plain training template. **around**: repaired by its own around hidden answers.\n"
    )
    print("| template | refused | reason |\n|---|---|---|")
    for (name, why), where in reasons.items():
        told = why.replace("|", "\\|").replace("\n", " ")
        print(f"| `{name}` | {', '.join(where)} | {told} |")


if __name__ == "__main__":
    main()

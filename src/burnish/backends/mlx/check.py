"""Does a model taken apart do what it does whole? Asked of every model that is opened, with few tokens.

mlx-lm has more than a hundred model types, and more come. Those that do something between their layers, or
mix tokens by other means than attention, would train wrong without a word; here they are found out on their
own numbers.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from burnish.backends.mlx.attention import joined, ours
from burnish.backends.mlx.decoder import Decoder
from burnish.data.packing import segment_mask
from burnish.errors import Unsupported

# Relative to the size of what is compared. Rounding stays far below, a part left out far above.
EXACT, ROUNDED = 1e-3, 0.1
_LENGTH, _BORDERS = 16, (7, 4, 10)  # tokens of a row, and where its second example begins


def check_whole(decoder: Decoder, n_words: int, exact: bool) -> None:
    """Raises Unsupported where the parts do not give the logits of the whole. exact: computed in float32."""
    tokens = _tokens(n_words)
    wanted = decoder.model(tokens)
    got = decoder.logits(_hidden(decoder, tokens))
    if not _alike(got, wanted, exact):
        raise Unsupported(
            f"mlx-lm's {_kind(decoder)} does more than go from layer to layer, so it cannot be trained one "
            "layer at a time",
            "model",
        )


def check_packed(decoder: Decoder, n_words: int, exact: bool) -> None:
    """Raises Unsupported where an example is changed by another in its row, or by another row's borders."""
    tokens = mx.concatenate([_tokens(n_words), _tokens(n_words)[:1]])
    # Three rows with borders of their own: a mask may be right for one row and land elsewhere for several.
    segments = segment_mask(np.arange(_LENGTH) >= np.array(_BORDERS)[:, None])
    try:
        together = _hidden(decoder, tokens, mx.array(segments)[:, None])
    except ValueError:  # shapes that do not go together
        together = None
    for row, border in enumerate(_BORDERS):
        alone = _hidden(decoder, tokens[row : row + 1, border:])
        if together is None or not _alike(together[row : row + 1, border:], alone, exact):
            raise Unsupported(
                f"mlx-lm's {_kind(decoder)} does not keep the examples of a packed row apart",
                "model",
                "set train.pack=false",
            )


def _tokens(n_words: int) -> mx.array:
    drawn = np.random.default_rng(0).integers(0, n_words, (2, _LENGTH))
    return mx.array(drawn.astype(np.int32))


def _kind(decoder: Decoder) -> str:
    return type(decoder.model).__module__.rsplit(".", 1)[-1]


def _hidden(decoder: Decoder, tokens: mx.array, segments: mx.array | None = None) -> mx.array:
    """Hidden states after the last layer, the plain way."""
    hidden, calls = decoder.calls(tokens)
    masks = joined([c.mask for c in calls], segments, hidden.dtype)
    with ours(decoder.layers):
        for layer, call, mask in zip(decoder.layers, calls, masks, strict=True):
            hidden = call.to(layer, hidden, mask)
            mx.eval(hidden)
    return hidden


def _alike(got: mx.array, wanted: mx.array, exact: bool) -> bool:
    """By the root mean square of the difference, relative to that of `wanted`."""
    got, wanted = got.astype(mx.float32), wanted.astype(mx.float32)
    apart = mx.sqrt(((got - wanted) ** 2).mean() / (wanted**2).mean())
    return float(apart) <= (EXACT if exact else ROUNDED)

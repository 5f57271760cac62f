"""A decoder with a cache of keys and values, run step after step on its own past."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qcompile.errors import ModelError
from qcompile.execute.session import run
from qcompile.ir.model import InputInfo, Model

Arrays = dict[str, NDArray[Any]]
_PAST = re.compile(r"past_key_values|past_keys_values|past_key_value|past_kv|past")
_PRESENT = re.compile(r"present_key_values|present_key_value|present_kv|present")
_TOKENS = ("input_ids", "decoder_input_ids", "tokens", "ids")


@dataclass(frozen=True)
class Decoder:
    """Which inputs of a decoder are what.

    `tokens`: [batch, length] of integers; `caches`: past input -> present output; `mask`, `places`: inputs that follow from the
    lengths (1 for each token so far; the token's place); `flag`: whether there is a past; `logits`: [batch, length, words].
    """

    tokens: InputInfo
    caches: Mapping[str, str]
    mask: InputInfo | None
    places: tuple[InputInfo, ...]
    flag: InputInfo | None
    logits: str
    inputs: Mapping[str, InputInfo]

    @property
    def given(self) -> tuple[InputInfo, ...]:
        """The inputs that data must hold: tokens, and what does not change from step to step."""
        made = {*self.caches, *(i.name for i in (self.mask, self.flag, *self.places) if i is not None)}
        return tuple(i for i in self.inputs.values() if i.name not in made)


def decoder_of(model: Model) -> Decoder:
    """What `model` is as a decoder.

    Raises:
        ModelError: it has no cache whose inputs are named past... and whose outputs present..., or takes no tokens.
    """
    inputs, outputs = {i.name: i for i in model.inputs()}, [str(v.name) for v in model.graph.outputs]
    caches = _caches(inputs, outputs)
    if not caches:
        raise ModelError(
            "the model keeps no cache: no input past... has an output present... of the same rest of the name;"
            " give its runs as data (docs/guide/data.md)"
        )
    integers = [i for i in inputs.values() if i.dtype.kind in "iu" and i.name not in caches]
    mask = next((i for i in integers if "mask" in i.name and "encoder" not in i.name), None)
    places = tuple(i for i in integers if "position" in i.name)
    tokens = next((i for name in _TOKENS for i in integers if name in i.name and i is not mask and i not in places), None)
    logits = next((name for name in outputs if name not in caches.values()), None)
    if tokens is None or logits is None:
        raise ModelError(f"no input of token numbers (as input_ids) among {list(inputs)}; give its runs as data")
    flag = next((i for i in inputs.values() if i.dtype.kind == "b" and "cache" in i.name), None)
    return Decoder(tokens, caches, mask, places, flag, logits, inputs)


def _caches(inputs: Mapping[str, InputInfo], outputs: Sequence[str]) -> dict[str, str]:
    rests = {_PRESENT.sub("", name, count=1): name for name in outputs if _PRESENT.search(name)}
    pasts = {name: _PAST.sub("", name, count=1) for name in inputs if _PAST.search(name)}
    return {name: rests[rest] for name, rest in pasts.items() if rest in rests}


def steps_of(decoder: Decoder, session: ort.InferenceSession, given: Arrays, steps: int) -> Iterator[Arrays]:
    """The inputs of each run for one sequence [1, ...]: the prompt with an empty past, then `steps` tokens, one a run, each the
    likeliest behind those before.

    A decoder that takes one token a run reads the prompt token by token.
    """
    prompt = given[decoder.tokens.name]
    width = decoder.tokens.shape[1]
    queue = [prompt] if not isinstance(width, int) else [prompt[:, i : i + width] for i in range(0, prompt.shape[1], width)]
    past = {name: _empty(decoder.inputs[name], given) for name in decoder.caches}
    seen, made = 0, 0
    while queue:
        tokens = queue.pop(0)
        feed = {**given, **past, **_lengths(decoder, tokens, seen), decoder.tokens.name: tokens}
        yield {name: feed[name] for name in decoder.inputs}
        seen += tokens.shape[1]
        if not queue and made == steps:
            return
        logits, *presents = run(session, feed, [decoder.logits, *decoder.caches.values()])
        past = dict(zip(decoder.caches, presents, strict=True))
        if not queue:
            queue, made = [np.argmax(logits[:, -1:], axis=-1).astype(decoder.tokens.dtype)], made + 1


def _lengths(decoder: Decoder, tokens: NDArray[Any], seen: int) -> Arrays:
    count = tokens.shape[1]
    made: Arrays = {}
    if decoder.mask is not None:
        made[decoder.mask.name] = np.ones((1, seen + count), decoder.mask.dtype)
    for each in decoder.places:
        at = np.arange(seen, seen + count, dtype=each.dtype)
        made[each.name] = at if len(each.shape) == 1 else at[None]
    if decoder.flag is not None:
        made[decoder.flag.name] = np.full([1] * len(decoder.flag.shape), seen > 0)
    return made


def _empty(info: InputInfo, given: Arrays) -> NDArray[Any]:
    """A past of no tokens: the axis behind batch and heads that is dynamic has length 0.

    Raises:
        ModelError: its lengths are fixed.
    """
    if info.name in given:
        return given[info.name]
    free = [k for k, d in enumerate(info.shape) if not isinstance(d, int)][1 if not isinstance(info.shape[0], int) else 0 :]
    if len(free) != 1:
        shown = ", ".join(map(str, info.shape))
        raise ModelError(f"the past {info.name!r} is [{shown}]: one axis but the batch must be dynamic; give its runs as data")
    return np.zeros([0 if k == free[0] else d if isinstance(d, int) else 1 for k, d in enumerate(info.shape)], info.dtype)

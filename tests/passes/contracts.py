"""The table of what each pass changes: goldens/contracts.table has a row a pass, a column a model, a letter a target.

A cell holds a letter for each target that the model is compiled for: the target's own where the pass changes the model (t, o, i,
v for openvino), a dot where it does nothing and must say why.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qcompile.pipeline import registry
from qcompile.pipeline.base import Kind
from qcompile.pipeline.spec import format_pass, with_option
from tests.passes.models import QUANTIZED
from tests.passes.running import Step, builtin_passes, fixture_step

TABLE = Path(__file__).parents[1] / "goldens" / "contracts.table"
LETTERS = {"trt": "t", "ort": "o", "integer": "i", "openvino": "v"}
ALL = tuple(LETTERS)
EXPORTED = ("trt", "ort", "integer")
MODELS: dict[str, tuple[str, ...]] = {
    "timm_vit_shared_ts17": EXPORTED,
    "timm_vit_dy23": ("trt", "ort"),
    "timm_swin_padded_dy18": ("trt",),
    "hf_bert_shared_ts14": ("trt",),
    "hf_llama_dy23": ("trt",),
    "hybrid_ts17": ("trt",),
    "stem": EXPORTED,
    "joined": EXPORTED,
    "biased": EXPORTED,
    "block": ALL,
    "tokens": ALL,
    "convs": ALL,
    "mixed": ALL,
    **dict.fromkeys(QUANTIZED, ("trt", "ort")),
}
READERS = ("dequantize", "import-qdq", "unify-qdq")
"""The passes that are run on quantized models."""
VARIANTS = (
    "smooth{shift always}",
    "smooth{search}",
    "smooth{alpha=1.0 sites=norm always}",
    "repq{percentile=minmax always}",
    "opset{version=21}",
    "rotate{r4=block mean=fold}",
    "rotate{kind=klt search=3}",
    "center{balance gelu}",
    "center{drop heads softmax}",
    "equalize{by=weights steps=16}",
)


@dataclass(frozen=True)
class Case:
    """One pass on one model for one target."""

    spec: str
    model: str
    target: str

    def __str__(self) -> str:
        return f"{self.model}-{self.target}-{self.spec}"

    def run(self) -> Step:
        """The pass behind the passes that it requires."""
        return fixture_step(self.model, self.spec, self.target)


def specs(*kinds: Kind) -> list[str]:
    """Registered passes of some kinds, as pipeline strings, with a few other options of interest.

    A contract is about folds, and not about whether they pay on random data.
    """
    plain = (with_option(p, "always", True) or p for p in builtin_passes())
    known = [*(format_pass(p) for p in plain), *(v for v in VARIANTS if v.partition("{")[0] in registry.names())]
    return [spec for spec in known if registry.parse(spec)[0].kind in kinds]


def cases(*kinds: Kind) -> list[Case]:
    """Every pass of some kinds on every model for each of its targets; a model's cases stand together."""
    found = (Case(spec, model, target) for model, targets in MODELS.items() for target in targets for spec in specs(*kinds))
    return [case for case in found if case.model not in QUANTIZED or case.spec in READERS]


@cache
def changing() -> frozenset[Case]:
    """The cases that change something, as the table says."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    names = lines[0].split("|")[1:]
    found = set[Case]()
    for line in lines[1:]:
        spec, *cells = (cell.strip() for cell in line.split("|"))
        for name, cell in zip(names, cells, strict=True):
            found |= {Case(spec, name.strip(), target) for target, letter in LETTERS.items() if letter in cell}
    return frozenset(found)


def changing_cases(*kinds: Kind) -> list[Case]:
    """The cases of some kinds that change something."""
    return [case for case in cases(*kinds) if case in changing()]


def table() -> str:
    """The table as it must be."""
    wide = max(len(spec) for spec in specs(*Kind))
    head = " | ".join(["pass".ljust(wide), *MODELS])
    rows = [" | ".join([spec.ljust(wide), *(_cell(spec, name).ljust(len(name)) for name in MODELS)]) for spec in specs(*Kind)]
    return "\n".join(line.rstrip() for line in (head, *rows)) + "\n"


def _cell(spec: str, name: str) -> str:
    if name in QUANTIZED and spec not in READERS:
        return "." * len(MODELS[name])
    return "".join(LETTERS[target] if Case(spec, name, target).run().changed else "." for target in MODELS[name])

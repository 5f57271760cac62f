"""Where passes come from: ours by name, other packages' by entry point, the user's by file.py:function."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points

from qcompile.errors import UsageError
from qcompile.pipeline import spec
from qcompile.pipeline.base import Pass
from qcompile.quant.spec import SCHEMES
from qcompile.target.catalog import TARGETS

ENTRY_POINT_GROUP = "qcompile.passes"

BUILTIN: dict[str, str] = {
    "canonicalize": "qcompile.passes.forms.canonicalize.canonicalize:Canonicalize",
    "fold-pad": "qcompile.passes.forms.fold_pad:FoldPad",
    "space-to-depth": "qcompile.passes.forms.space_to_depth:SpaceToDepthStem",
    "gelu-order": "qcompile.passes.forms.gelu_order:GeluOrder",
    "bias-rank": "qcompile.passes.forms.bias_rank:BiasRank",
    "fold-bn": "qcompile.passes.forms.fold_bn:FoldBatchNorm",
    "fold-dims": "qcompile.passes.forms.fold_dims:FoldDims",
    "opset": "qcompile.passes.forms.opset:RaiseOpset",
    "fuse-norm": "qcompile.passes.forms.fuse_norm:FuseNorm",
    "split-qkv": "qcompile.passes.forms.split_qkv.split_qkv:SplitQkv",
    "rotate": "qcompile.passes.equivalent.rotate.rotate:Rotate",
    "center": "qcompile.passes.equivalent.center.center:Center",
    "split-shortcut": "qcompile.passes.equivalent.split_shortcut:SplitShortcut",
    "smooth": "qcompile.passes.equivalent.smooth.smooth:SmoothQuant",
    "repq": "qcompile.passes.equivalent.repq:RepQ",
    "equalize": "qcompile.passes.equivalent.equalize:CrossLayerEqualization",
    "absorb-bias": "qcompile.passes.fit.absorb_bias:AbsorbBias",
    "annotate": "qcompile.passes.annotate.annotate:Annotate",
    "rtn": "qcompile.passes.fit.rtn:RoundToNearest",
    "bias-correct": "qcompile.passes.fit.bias_correct.bias_correct:BiasCorrection",
    "insert-qdq": "qcompile.passes.lower.insert_qdq:InsertQdq",
    "integer": "qcompile.passes.lower.integer.integer:Integer",
    "fp16": "qcompile.passes.lower.half.fp16:Half",
    "bf16": "qcompile.passes.lower.half.bf16:BrainHalf",
    "log2-softmax": "qcompile.passes.annotate.log2_softmax:Log2Softmax",
    "compand-gelu": "qcompile.passes.annotate.compand_gelu:CompandGelu",
    "bias-reparam": "qcompile.passes.fit.bias_reparam:BiasReparam",
    "split-range": "qcompile.passes.equivalent.split_range:SplitRange",
}

PRESETS: dict[str, str] = {
    "repq-vit": "repq{softmax=log-sqrt2}",
    "quarot": "rotate{r4=block mean=fold}",
    "quantvggt": "rotate,smooth",
    "mambaquant": "rotate{kind=klt},smooth",
    "dfq": "equalize{by=weights center=false},absorb-bias,bias-correct",
    "fq-vit": "log2-softmax{bits=4}",
    "adalog": "repq,log2-softmax{kind=adalog},compand-gelu,bias-reparam",
    "is-vit": "repq,log2-softmax{kind=sulq}",
    "dopq-vit": "repq,log2-softmax{kind=tan}",
    "ptq4vit": "log2-softmax{kind=twin},compand-gelu{kind=twin}",
}


def names() -> list[str]:
    """All pass names that can be written in a pipeline, sorted."""
    return sorted({*BUILTIN, *_entry_points()})


@cache
def _entry_points() -> dict[str, str]:
    return {e.name: e.value for e in entry_points(group=ENTRY_POINT_GROUP)}


def lookup(name: str) -> type[Pass] | None:
    """The class behind a name, imported only now; None if there is no such pass.

    Raises:
        UsageError: an entry point that cannot be imported.
    """
    if ".py:" in name:
        return _load("qcompile.passes.surgery:GraphSurgery")
    if name in BUILTIN:
        return _load(BUILTIN[name])
    return _load(_entry_points()[name]) if name in _entry_points() else None


def _load(where: str) -> type[Pass]:
    module, _, attribute = where.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise UsageError(f"pass {where!r} cannot be imported ({e}); reinstall the package that provides it") from e
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise UsageError(f"{where!r} is not a subclass of qcompile.Pass; correct the entry point of the package that provides it")
    return found


def parse(text: str) -> list[Pass]:
    """A pipeline string as passes, presets expanded."""
    return spec.parse(text, lookup, [*names(), *PRESETS], PRESETS.get)


def provider(fact_value: str) -> Pass:
    """A pass by name with default options, for the planner's completion."""
    cls = lookup(fact_value)
    assert cls is not None
    return cls()


def defaults() -> dict[str, str]:
    """What runs when no --passes is given, by scheme; by `target-scheme` where targets differ."""
    found: dict[str, str] = {}
    for scheme in SCHEMES.values():
        of_target = {t.name: t.default(scheme) for t in TARGETS.values() if scheme.name in t.schemes}
        same = len(set(of_target.values())) == 1
        found |= {scheme.name if same else f"{target}-{scheme.name}": text for target, text in of_target.items() if text}
    return found

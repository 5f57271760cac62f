"""fold-pad: Pad into the convolution behind it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.calib.observe.change import Changes
from qcompile.ir.edit import erase_dead
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, is_op
from qcompile.pipeline.base import Kind, PassContext, Stage
from qcompile.pipeline.site import Applied, Missed, SitePass
from qcompile.structure import Matches


@dataclass(frozen=True)
class FoldPad(SitePass[ir.Node]):
    """Fold a Pad with zeros into the `pads` of the convolutions that read it.

    before: Conv(Pad(x, zeros, [0, 0, 0, 0, 0, 0, 1, 1]), pads [0, 0, 0, 0])     after: Conv(x, pads [0, 0, 1, 1])
    A Pad between two quantized convolutions costs a detour through float on ONNX Runtime.
    """

    name = "fold-pad"
    kind = Kind.EQUIVALENT
    needs = Stage.CANONICAL

    def sites(self, model: Model, ctx: PassContext) -> Matches[ir.Node]:
        """Every Pad."""
        return Matches(tuple(node for node in model.graph if is_op(node, "Pad")))

    def nodes(self, site: ir.Node) -> Iterable[ir.Node]:
        """Selectors say what is quantized, which this does not touch."""
        return ()

    def rewrite(self, model: Model, site: ir.Node, ctx: PassContext, changes: Changes) -> Applied | Missed:
        """Add the amounts to the `pads` of the readers."""
        if reason := _refusal(site):
            return Missed(reason)
        amounts = _amounts(site)
        assert amounts is not None
        rank = len(amounts) // 2
        spatial = [*amounts[2:rank], *amounts[rank + 2 :]]
        for conv, _ in list(site.outputs[0].uses()):
            old = list(conv.attributes["pads"].as_ints()) if "pads" in conv.attributes else [0] * len(spatial)
            conv.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(old, spatial, strict=True)])
            conv.replace_input_with(0, site.inputs[0])
        return Applied("folded into the convolution's pads")

    def finish(self, model: Model) -> None:
        """Drop the Pads that nothing reads any more."""
        erase_dead(model)


def _refusal(pad: ir.Node) -> str | None:
    amounts = _amounts(pad)
    if amounts is None or _mode(pad) != "constant" or not _pads_zeros(pad):
        return "it does not pad with zeros by constant amounts"
    rank = len(amounts) // 2
    if rank < 3 or any(amounts[:2]) or any(amounts[rank : rank + 2]) or min(amounts) < 0:
        return "it pads the batch or channel axis, or crops"
    uses = pad.outputs[0].uses()
    if not uses or pad.outputs[0].is_graph_output() or not all(is_op(n, "Conv") and i == 0 and _written_out(n) for n, i in uses):
        return "something else than convolutions with written-out padding reads it"
    return None


def _amounts(pad: ir.Node) -> list[int] | None:
    """The amounts [begin of every axis, end of every axis]; None when not constant or only for some axes."""
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        return None
    array = const_array(pad.inputs[1]) if len(pad.inputs) > 1 and pad.inputs[1] is not None else None
    return None if array is None else [int(v) for v in array]


def _mode(pad: ir.Node) -> str:
    return pad.attributes["mode"].as_string() if "mode" in pad.attributes else "constant"


def _pads_zeros(pad: ir.Node) -> bool:
    if len(pad.inputs) < 3 or pad.inputs[2] is None:
        return True
    value = const_array(pad.inputs[2])
    return value is not None and not value.any()


def _written_out(conv: ir.Node) -> bool:
    return "auto_pad" not in conv.attributes or conv.attributes["auto_pad"].as_string() in ("", "NOTSET")

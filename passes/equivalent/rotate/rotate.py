"""rotate: Hadamard rotations of the residual stream, the attention values and the MLP's hidden layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from qcompile.calib.observe import Probe
from qcompile.calib.observe.change import Changes
from qcompile.ir.model import Model
from qcompile.passes.equivalent.rotate.hidden import rotate_hidden
from qcompile.passes.equivalent.rotate.rows import probe
from qcompile.passes.equivalent.rotate.stream import Wanted, names, rotate_streams
from qcompile.passes.equivalent.rotate.values import rotate_values
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult
from qcompile.structure import find_mlps, find_v_projections
from qcompile.structure.core import names_between
from qcompile.structure.region import find_regions


@dataclass(frozen=True)
class Rotate(Pass):
    """Spread outliers over all channels: the residual stream x becomes x R, folded into every weight that writes or reads it.

    before: ... W_out -> + -> LayerNorm(g, b) -> W_in           x = the stream, z = the input of the MLP's second linear
    after:  ... W_out R -> + -> LayerNorm(1, 0) -> R^T diag(g) W_in, c + b W_in
    r1: the stream (QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406): embeddings, positions, class token, patch
    convolution and output projections take R, what reads the norms takes R^T.  RMS(x R) = RMS(x) R for every orthogonal R;
    for a LayerNorm R also keeps the mean, R 1 = 1, so the operator stays as it is.  mean=fold: all writers give up their mean
    over the channels, LayerNorm becomes RMSNorm and R is any rotation (SliceGPT, arXiv:2401.15024); never for an RMSNorm.
    r2: W_v R2 and R2^T W_o in each head, biases included.  r4=block: Reshape -> MatMul [b, b] -> Reshape in front of the
    second MLP linear, which takes the inverse: a small cost at run time.
    kind=klt: the eigenvectors of the second moment of the stream, of each head's values and of the hidden blocks first: equal
    energy in all channels (MambaQuant, arXiv:2501.13484).  search: that many draws of r1; the one with the least quantization
    error of the reading layers on calibration rows is kept.  Folded in float64.
    Exact in float on every target: r1 and r2 without a new node, r4 and mean=fold with some.
    Refused: post-norm blocks (BERT), adaLN, a nonlinearity on the stream, the stream as graph output.
    """

    name = "rotate"
    kind = Kind.EQUIVALENT
    r1: Annotated[bool, "rotate the residual stream (free)"] = True
    r2: Annotated[bool, "rotate the values of each attention head (free)"] = True
    r4: Annotated[Literal["none", "block"], "rotate the MLP's hidden layer while it runs, in blocks of 128 channels"] = "none"
    kind_: Annotated[Literal["hadamard", "klt"], "random Hadamard, or eigenvectors of calibration data first"] = "hadamard"
    search: Annotated[int, "draws to choose the best of"] = 1
    mean: Annotated[Literal["keep", "fold"], "rotate around the mean of a LayerNorm, or fold it into the writers"] = "keep"
    seed: Annotated[int, "of the random signs; added to --seed"] = 0

    def __post_init__(self) -> None:
        self.check_range("search", 1, 1000)

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """Rows of what is rotated, where the rotation depends on data."""
        if self.r1 and self._wanted.measures:
            for region in find_regions(model.graph):
                yield from (probe(n.norm.input) for n in region.norms)
        if self.kind_ == "klt":
            values = (site.linear for site in find_v_projections(model.graph) if self.r2)
            yield from (probe(linear.output) for linear in values if linear.channel_axis == -1)
            yield from (probe(mlp.fc2.input) for mlp in find_mlps(model.graph) if self.r4 == "block")

    def moves(self, model: Model, ctx: PassContext) -> Iterable[str]:
        """The stream, what its norms make, the values, and what stands in front of a branch's scale."""
        for region in find_regions(model.graph) if self.r1 else ():
            yield from names(region)
        for site in find_v_projections(model.graph) if self.r2 else ():
            yield from names_between([site.linear.node], site.out.node)
        for mlp in find_mlps(model.graph) if self.r4 == "block" else ():
            yield str(mlp.fc2.input.name)

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Rotate every stream, head and hidden layer that allows it; remark on the others."""
        changes, rng = Changes(), np.random.default_rng([ctx.seed, self.seed])
        done = self.r1 and rotate_streams(model, self._wanted, ctx, rng, changes)
        done = (self.r2 and rotate_values(model, self.kind_ == "klt", ctx, rng, changes)) or done
        done = (self.r4 == "block" and rotate_hidden(model, self.kind_ == "klt", ctx, rng)) or done
        return PassResult(done, changes)

    @property
    def _wanted(self) -> Wanted:
        return Wanted(self.search, self.kind_ == "klt", self.mean == "fold")

"""Rules of the integer target: purity between the borders, and the overflow proof."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from onnx import NodeProto, TensorProto

from qcompile.errors import ModelError
from qcompile.oracle.graph import DOMAINS, FLOATS, border_casts
from qcompile.oracle.qlinear import SCALES, SUMS
from qcompile.oracle.ranges import Proof, prove
from qcompile.oracle.run import OPERATORS
from qcompile.target import rules_common as common
from qcompile.target.findings import Check, Context, Hits, Rule
from qcompile.target.view import GraphView

_BORDER = ("QuantizeLinear", "DequantizeLinear")
_NO_CODE = frozenset({"Constant", *_BORDER})
KEPT = OPERATORS - SUMS.keys() | {"Constant"}  # what may stay as it is where a model computes with integers already
_FLOAT_PARAMETERS = {"Resize": (1, 2), **dict.fromkeys(SUMS, SCALES)}  # constants: how to move elements, and scales
_NAMES: dict[int | None, str] = {TensorProto.UINT8: "uint8", TensorProto.INT8: "int8"}
_MIXED = (TensorProto.UINT8, TensorProto.INT8)
_SATURATING = {  # operand slots, and the pairs measured to saturate (a convolution's weights are the left operand)
    "ConvInteger": ((0, 1), _MIXED[::-1]),
    "MatMulInteger": ((0, 1), _MIXED),
    "QLinearConv": ((0, 3), _MIXED),
    "QLinearMatMul": ((0, 3), _MIXED),
}
FUSED = "ort-fused"
_PROOFS: WeakKeyDictionary[GraphView, Proof | None] = WeakKeyDictionary()


def proof_of(view: GraphView) -> Proof | None:
    """The overflow proof of a pure graph, made once; None where the graph is not pure (QC-INT-001 and 002 say why)."""
    if view not in _PROOFS:
        _PROOFS[view] = _prove(view)
    return _PROOFS[view]


def _prove(view: GraphView) -> Proof | None:
    if [*_floats(view), *_foreign(view)]:
        return None
    try:
        return prove(view.model, view.base_dir)
    except ModelError:
        return None


# ---- purity -------------------------------------------------------------------------------------------------------


def float_tensor(context: Context) -> Hits:
    """A floating-point tensor inside, or a QuantizeLinear or DequantizeLinear that is not at the model's border."""
    return _floats(context.view)


def _floats(view: GraphView) -> Hits:
    inputs = {i.name for i in view.model.graph.input}
    outputs = {o.name for o in view.model.graph.output}
    casts = border_casts(view.nodes, inputs, outputs)
    inputs |= {n.output[0] for n in casts if n.input[0] in inputs}
    outputs |= {n.input[0] for n in casts if n.output[0] in outputs}
    read_at_border = Counter(n.input[0] for n in casts)
    for node in view.nodes:
        if node in casts:
            continue
        if node.op_type == "QuantizeLinear" and node.input[0] not in inputs:
            yield node.name, f"it quantizes {node.input[0]!r}, which is not an input of the model"
        elif node.op_type == "DequantizeLinear" and (node.output[0] not in outputs or _read_inside(view, node, read_at_border)):
            yield node.name, f"it makes {node.output[0]!r}, which is not only an output of the model"
        elif node.op_type not in _BORDER:
            yield from ((node.name, f"{node.op_type} {how} the float tensor {name!r}") for how, name in _float_uses(view, node))
    read = {node.input[0] for node in view.nodes if node.op_type == "QuantizeLinear"}
    for name in sorted((inputs & outputs) - read):
        if view.elem_types.get(name) in FLOATS:
            yield "", f"the float input {name!r} is an output, too"


def _read_inside(view: GraphView, node: NodeProto, at_border: Mapping[str, int]) -> bool:
    return len(view.consumers.get(node.output[0], ())) > at_border.get(node.output[0], 0)


def _float_uses(view: GraphView, node: NodeProto) -> list[tuple[str, str]]:
    skipped = _FLOAT_PARAMETERS.get(node.op_type, ())
    reads = [("reads", name) for slot, name in enumerate(node.input) if name and slot not in skipped]
    if node.op_type == "Constant":
        return []
    return [use for use in [*reads, *(("makes", x) for x in node.output)] if view.elem_types.get(use[1]) in FLOATS]


def unknown_operator(context: Context) -> Hits:
    """An operator that hides floating point, has no integer meaning in ONNX, or is not on the list of this target."""
    return _foreign(context.view)


def _foreign(view: GraphView) -> Hits:
    for node in view.nodes:
        if node.domain not in DOMAINS:
            yield node.name, f"{node.domain}.{node.op_type} is not a standard operator"
        elif node.op_type not in OPERATORS | _NO_CODE:
            yield node.name, f"{node.op_type} is not an integer operator"
        elif node.op_type in SUMS and _profile(view) != FUSED:
            yield (
                node.name,
                f"{node.op_type} rescales in float: only the profile {FUSED} (metadata qcompile.integer) allows it",
            )


def _profile(view: GraphView) -> str:
    return next((p.value for p in view.model.metadata_props if p.key == "qcompile.integer"), "strict")


# ---- the proof ----------------------------------------------------------------------------------------------------


def _of_kind(kind: str, doc: str) -> Check:
    def check(context: Context) -> Hits:
        proof = proof_of(context.view)
        yield from ((p.node, p.message) for p in (() if proof is None else proof.problems) if p.kind == kind)

    check.__doc__ = doc
    return check


overflow32 = _of_kind("overflow32", "A result of 32 bits or fewer can overflow.")
overflow64 = _of_kind("overflow64", "A result of 64 bits can overflow.")
shift_amount = _of_kind("shift", "A shift by a negative amount, or by the width of its operand or more.")
lossy_cast = _of_kind("cast", "A Cast to a narrower type can cut off bits.")
division_by_zero = _of_kind("zero", "A divisor can be zero.")
index_range = _of_kind("index", "An index can lie outside its table.")
unbounded = _of_kind("unbounded", "No bound can be derived for an operator.")
wide_comparison = _of_kind(
    "compare", "ONNX Runtime 1.31 compares int64 numbers beyond 2^31 wrongly in Clip, Max, Min and Sign on x86-64."
)
wide_sum = _of_kind("sum", "ONNX Runtime sums int64 in double: above 2^53 the result is not exact.")


def broken_border(context: Context) -> Hits:
    """The integer part cannot be separated: a float input without QuantizeLinear, or a float output without DequantizeLinear."""
    view = context.view
    if proof_of(view) is not None or any(True for _ in (*_floats(view), *_foreign(view))):
        return
    try:
        prove(view.model, view.base_dir)
    except ModelError as error:
        yield "", str(error)


def unnamed_rule(context: Context) -> Hits:
    """The metadata do not say how numbers are rounded (`qcompile.rounding`) or which profile this is (`qcompile.integer`)."""
    present = {p.key for p in context.view.model.metadata_props}
    missing = [key for key in ("qcompile.rounding", "qcompile.integer") if key not in present]
    if missing:
        yield "", f"metadata {' and '.join(missing)} missing"


def saturating_pair(context: Context) -> Hits:
    """Sums of uint8 by int8 products saturate in ONNX Runtime on x86-64 with AVX2 and no VNNI; int8 by int8 never does."""
    view = context.view
    for node in view.of_type(*_SATURATING):
        slots, *pairs = _SATURATING[node.op_type]
        types = tuple(view.elem_types.get(node.input[slot]) for slot in slots)
        if types in pairs:
            yield node.name, f"{node.op_type} multiplies {_NAMES[types[0]]} by {_NAMES[types[1]]}"


_AGAIN = "compile the float model with --target integer"
_SPLIT = "split the layer along its reduction axis, or use fewer bits"
_WRONG_KERNEL = "keep the numbers below 2^31, or use Where with Less or Greater"
_NO_DIVISION = "take Max of the divisor and 1 first"

INTEGER_RULES: tuple[Rule, ...] = (
    Rule("QC-INT-001", "float tensor", "error", _AGAIN, float_tensor, "wrong"),
    Rule("QC-INT-002", "operator", "error", _AGAIN, unknown_operator, "wrong"),
    Rule("QC-INT-003", "int32 overflow", "error", _SPLIT, overflow32, "wrong"),
    Rule("QC-INT-004", "int64 overflow", "error", "use a smaller multiplier and exponent", overflow64, "wrong"),
    Rule("QC-INT-005", "shift amount", "error", "clip the shift to 0..63", shift_amount, "wrong"),
    Rule("QC-INT-006", "lossy cast", "error", "put a Clip to the type's range in front of the Cast", lossy_cast, "wrong"),
    Rule("QC-INT-007", "division by zero", "error", _NO_DIVISION, division_by_zero, "wrong"),
    Rule("QC-INT-008", "table index", "error", "clip the index to the table", index_range, "wrong"),
    Rule("QC-INT-009", "no bound", "error", "store weights, axes and shapes as constants", unbounded, "wrong"),
    Rule("QC-INT-010", "border", "error", _AGAIN, broken_border, "wrong"),
    Rule("QC-INT-011", "metadata", "warning", _AGAIN, unnamed_rule),
    Rule("QC-INT-012", "int64 comparison", "error", _WRONG_KERNEL, wide_comparison, "wrong"),
    Rule("QC-INT-013", "int64 sum", "error", "shift the terms to the right first", wide_sum, "wrong"),
    Rule("QC-INT-014", "uint8 by int8", "error", "use int8 codes for both operands", saturating_pair, "wrong"),
    Rule("QC-INT-015", "scale not constant", "error", "store the scale as an initializer", common.scale_not_constant, "wrong"),
    Rule(
        "QC-INT-016",
        "scale value",
        "error",
        "calibrate again with data that reaches this tensor",
        common.scale_not_positive,
        "wrong",
    ),
    Rule(
        "QC-INT-017",
        "scale not finite",
        "error",
        "calibrate again; look for Inf or NaN in the data",
        common.scale_not_finite,
        "wrong",
    ),
    Rule("QC-INT-018", "opset", "error", "convert to opset 26 or lower", common.opset_too_high, "refused"),
    Rule("QC-INT-019", "node names", "warning", "give every node a unique name (`canonicalize` does)", common.bad_names),
)

"""Facts about operators by name: one table, which every set of operator names in the compiler is made from.

It says what is true of an operator wherever it stands; where a rule follows more or fewer operators for a reason of its own,
it adds or takes away names at its place (`ops_with("reshapes") | {"Cast"}`).  An operator without a row has no trait: nothing
is known of it.  The names are of the standard domain; the caller looks at the node's domain.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

Trait = Literal[
    "compute",  # products with a weight or of two tensors
    "convolution",
    "movement",  # every output element is a copy of an input element (or a pad constant)
    "copies",  # the output is the input (at inference)
    "reshapes",  # the same elements in the same order, another shape
    "elementwise",  # an output element depends on the input elements at its own place only
    "unary",  # of one float tensor, element by element
    "activation",  # one made to stand behind a layer
    "arithmetic",  # of two tensors
    "picks",  # the output element is one of the input elements at its place
    "bits",  # of integers, bit by bit
    "integer-product",  # products of integer codes
    "recurrent",  # carries a state along a sequence, with the weights W and R in slots 1 and 2
    "random",  # another output at each run
    "jumps",  # a small error of the input can be a whole step of the output: indices, flags, rounded numbers
    "bounded",  # |y| <= 1 for any input
    "no-larger",  # |y| <= max |x| over the input's elements
    "spreads-nan",  # a NaN in the data input is one in the output
]

_IMPLIED: dict[Trait, tuple[Trait, ...]] = {
    "convolution": ("compute",),
    "copies": ("movement", "elementwise"),
    "reshapes": ("movement",),
    "unary": ("elementwise",),
    "activation": ("unary", "elementwise"),
    "arithmetic": ("elementwise",),
    "picks": ("elementwise",),
    "bits": ("elementwise",),
}

_ROWS: dict[str, tuple[Trait, ...]] = {
    "Abs": ("unary", "no-larger"),
    "Add": ("arithmetic", "spreads-nan"),
    "ArgMax": ("jumps",),
    "ArgMin": ("jumps",),
    "AveragePool": ("no-larger",),
    "BatchNormalization": ("spreads-nan",),
    "Bernoulli": ("random",),
    "BitShift": ("bits",),
    "BitwiseAnd": ("bits",),
    "BitwiseNot": ("bits",),
    "BitwiseOr": ("bits",),
    "BitwiseXor": ("bits",),
    "Cast": ("elementwise", "no-larger", "spreads-nan"),
    "Ceil": ("elementwise", "jumps"),
    "Celu": ("activation",),
    "Clip": ("elementwise",),
    "Concat": ("movement",),
    "Conv": ("convolution", "spreads-nan"),
    "ConvInteger": ("integer-product",),
    "ConvTranspose": ("convolution",),
    "Cos": ("unary", "bounded"),
    "DepthToSpace": ("movement",),
    "Div": ("arithmetic", "spreads-nan"),
    "Dropout": ("copies", "no-larger"),
    "DynamicQuantizeLinear": ("jumps",),
    "Elu": ("activation",),
    "Equal": ("elementwise", "jumps"),
    "Erf": ("unary", "bounded", "spreads-nan"),
    "Exp": ("unary", "spreads-nan"),
    "Expand": ("movement",),
    "Flatten": ("reshapes", "spreads-nan"),
    "Floor": ("elementwise", "jumps"),
    "GRU": ("recurrent",),
    "Gather": ("movement",),
    "GatherElements": ("movement",),
    "GatherND": ("movement",),
    "Gelu": ("activation", "no-larger", "spreads-nan"),
    "Gemm": ("compute", "spreads-nan"),
    "GlobalAveragePool": ("no-larger", "spreads-nan"),
    "Greater": ("elementwise", "jumps"),
    "GreaterOrEqual": ("elementwise", "jumps"),
    "HardSigmoid": ("activation", "bounded"),
    "HardSwish": ("activation",),
    "Hardmax": ("jumps",),
    "Identity": ("copies", "no-larger", "spreads-nan"),
    "LSTM": ("recurrent",),
    "LayerNormalization": ("spreads-nan",),
    "LeakyRelu": ("activation", "no-larger"),
    "Less": ("elementwise", "jumps"),
    "LessOrEqual": ("elementwise", "jumps"),
    "Log": ("unary",),
    "MatMul": ("compute", "spreads-nan"),
    "MatMulInteger": ("integer-product",),
    "Max": ("picks",),
    "MaxPool": ("no-larger",),
    "Min": ("picks",),
    "Mish": ("activation",),
    "Mul": ("arithmetic", "spreads-nan"),
    "Multinomial": ("random",),
    "Neg": ("unary", "no-larger"),
    "NonMaxSuppression": ("jumps",),
    "NonZero": ("jumps",),
    "Pad": ("movement",),
    "Pow": ("arithmetic", "spreads-nan"),
    "QLinearConv": ("integer-product",),
    "QLinearMatMul": ("integer-product",),
    "QuantizeLinear": ("jumps",),
    "RNN": ("recurrent",),
    "RandomNormal": ("random",),
    "RandomNormalLike": ("random",),
    "RandomUniform": ("random",),
    "RandomUniformLike": ("random",),
    "Reciprocal": ("unary",),
    "ReduceMax": ("no-larger",),
    "ReduceMean": ("no-larger", "spreads-nan"),
    "ReduceMin": ("no-larger",),
    "Relu": ("activation", "no-larger"),
    "Reshape": ("reshapes", "spreads-nan"),
    "Round": ("elementwise", "jumps"),
    "Selu": ("activation",),
    "Sigmoid": ("unary", "bounded", "spreads-nan"),
    "Sign": ("elementwise", "jumps"),
    "Sin": ("unary", "bounded"),
    "Slice": ("movement",),
    "Softmax": ("bounded", "spreads-nan"),
    "Softplus": ("activation",),
    "Softsign": ("activation",),
    "SpaceToDepth": ("movement",),
    "Split": ("movement",),
    "Sqrt": ("unary", "spreads-nan"),
    "Squeeze": ("reshapes", "spreads-nan"),
    "Sub": ("arithmetic", "spreads-nan"),
    "Sum": ("elementwise",),
    "Swish": ("activation",),
    "Tanh": ("unary", "bounded", "spreads-nan"),
    "ThresholdedRelu": ("activation",),
    "Tile": ("movement",),
    "TopK": ("jumps",),
    "Transpose": ("movement", "spreads-nan"),
    "Unique": ("jumps",),
    "Unsqueeze": ("reshapes", "spreads-nan"),
    "Where": ("picks",),
}

SCALED_AT_RUN_TIME = frozenset({
    "ConvInteger", "DynamicQuantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "GatherBlockQuantized", "MatMulBnb4",
    "MatMulInteger", "MatMulInteger16", "MatMulIntegerToFloat", "MatMulNBits", "QAttention", "QMoE",
})  # fmt: skip
"""Operators of quantized models whose codes no Q/DQ nodes can stand for: they stay as they are."""

TRAITS: dict[str, frozenset[Trait]] = {
    name: frozenset(traits).union(*(_IMPLIED.get(t, ()) for t in traits)) for name, traits in _ROWS.items()
}


@cache
def ops_with(*traits: Trait) -> frozenset[str]:
    """Names of the operators that have all of `traits`."""
    return frozenset(name for name, known in TRAITS.items() if known.issuperset(traits))

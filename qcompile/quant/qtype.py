"""QType: the number formats a tensor may be quantized to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Family = Literal["int", "float", "companded"]
COMPANDED = ("log2", "log-sqrt2", "adalog", "sulq", "tan", "twin", "twin-gelu", "uniform")


@dataclass(frozen=True)
class QType:
    """A storage format: integer codes `qmin..qmax`, or a small float with largest magnitude `qmax`.

    `storage` is the ONNX element type that holds the codes (a 6-bit integer is stored in INT8 with a
    clipped code range); `bits` is the width that counts for the size of the model.
    """

    name: str
    family: Family
    bits: int
    qmin: float
    qmax: float
    storage: str

    @property
    def signed(self) -> bool:
        """Whether negative codes exist."""
        return self.qmin < 0

    @property
    def companded(self) -> bool:
        """Whether the codes stand for unevenly spaced values (`quant.companding`)."""
        return self.family == "companded"

    @property
    def narrow(self) -> bool:
        """Whether the codes are a strict subset of what `storage` can hold (simulated width)."""
        return self.family == "int" and self.storage in ("INT8", "UINT8") and self.bits < 8


def _int(bits: int, signed: bool, storage: str) -> QType:
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return QType(f"{'' if signed else 'u'}int{bits}", "int", bits, lo, hi, storage)


INT8 = _int(8, True, "INT8")
UINT8 = _int(8, False, "UINT8")
INT16 = _int(16, True, "INT16")
UINT16 = _int(16, False, "UINT16")
INT4 = _int(4, True, "INT4")
UINT4 = _int(4, False, "UINT4")
FLOAT8E4M3FN = QType("float8e4m3fn", "float", 8, -448.0, 448.0, "FLOAT8E4M3FN")
FLOAT4E2M1 = QType("float4e2m1", "float", 4, -6.0, 6.0, "FLOAT4E2M1")

_NAMED = {t.name: t for t in (INT8, UINT8, INT16, UINT16, INT4, UINT4, FLOAT8E4M3FN, FLOAT4E2M1)}


def simulated_int(bits: int, signed: bool = True) -> QType:
    """A `bits`-wide integer stored in 8-bit codes (2 <= bits <= 8), named `int6@int8`: for widths simulated in ORT."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be in 2..8, got {bits}")
    exact = _int(bits, signed, "INT8" if signed else "UINT8")
    return exact if bits == 8 else replace(exact, name=f"{exact.name}@{exact.storage.lower()}")


def _companded(name: str) -> QType | None:
    """`log2u4`: 4-bit log2 codes; `log2u4p`: the paper's levels; `log2u4@float8e4m3fn`: values that E4M3 holds exactly."""
    base, _, storage = name.partition("@")
    kind, _, width = base.rpartition("u")
    bits, paper = width.removesuffix("p"), width.endswith("p")
    if kind not in COMPANDED or not bits.isdigit() or storage not in ("", FLOAT8E4M3FN.name):
        return None
    return QType(name, "companded", int(bits), 0, 2 ** int(bits) - (not paper), storage.upper() or "INT32")


def qtype(name: str) -> QType:
    """Look a format up by name: `int8`, `uint8`, `int6@int8` (simulated), `float8e4m3fn`, ...

    Raises:
        ValueError: no such format.
    """
    if name in _NAMED:
        return _NAMED[name]
    base, at, _ = name.partition("@")
    stem, signed = (base[1:], False) if base.startswith("uint") else (base, True)
    if stem.startswith("int") and stem[3:].isdigit() and 2 <= int(stem[3:]) <= 8:
        found = simulated_int(int(stem[3:]), signed)
        if not at or found.name == name:
            return found
    if (companded := _companded(name)) is not None:
        return companded
    raise ValueError(f"unknown quantized type {name!r}")

"""What a target may ask of the file that was written for it, before the file takes its name."""

from __future__ import annotations

from typing import Protocol


class Trial(Protocol):
    """The file, and every way there is to try it.

    Each raises `GateError` or `BuildError` where the file fails and the model that it was made from does not; where both fail
    that way, it is said and the file stands.
    """

    def loads(self) -> None:
        """ONNX Runtime runs the file, every operator as it is written."""
        ...

    def keeps_rules(self) -> None:
        """The target's rules find nothing in it that its runtime refuses or computes wrongly."""
        ...

    def runs(self) -> None:
        """ONNX Runtime runs it as deployed, optimized; that is what figures are of."""
        ...

    def parses(self) -> None:
        """The builder of the target's engines reads it; nothing where that is not installed."""
        ...

    def runs_in_openvino(self) -> None:
        """OpenVINO's CPU plugin runs it; that is what figures are of.  Nothing where it is not installed."""
        ...

    def computes_exactly(self) -> None:
        """ONNX Runtime gives bit for bit what integer arithmetic gives."""
        ...

from __future__ import annotations

from tests.passes.measures import op_types
from tests.passes.models import fixture
from tests.passes.running import fixture_step


def test_attention_of_opset_23_is_taken_apart() -> None:
    assert "Attention" in op_types(fixture("timm_vit_dy23"))
    done = fixture_step("timm_vit_dy23", "canonicalize", "trt")
    assert "Attention" not in op_types(done.after) and op_types(done.after).count("Softmax") == 2

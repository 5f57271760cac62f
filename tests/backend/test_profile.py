"""Profile strings, defaults and checks."""

from __future__ import annotations

import json

import onnx
import pytest
from onnx import TensorProto, helper

from qcompile.backend.profile import SHAPES_KEY, check_profile, default_profile, outside_calibration, parse_profile
from qcompile.errors import UsageError


def model(**inputs: list[int | str]) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in inputs.items()]
    return helper.make_model(helper.make_graph([], "g", values, []))


def test_parse() -> None:
    profile = parse_profile("x:1x3x32x32,8x3x32x32,32x3x32x32; layer:0:2x4")
    assert profile.to_json() == {"x": [[1, 3, 32, 32], [8, 3, 32, 32], [32, 3, 32, 32]], "layer:0": [[2, 4]] * 3}
    assert profile.optimum()["x"] == (8, 3, 32, 32)


@pytest.mark.parametrize("text", ["x", "x:1x3,2x3", "x:1xax3", ":1x3", "x:8x3,1x3,32x3", "x:0x3,1x3,2x3", "x:1x3,1x3x4,2x3"])
def test_bad_strings(text: str) -> None:
    with pytest.raises(UsageError, match="profile"):
        parse_profile(text)


def test_defaults() -> None:
    assert default_profile(model(x=[1, 3, 8, 8])) is None
    guessed = default_profile(model(x=["N", 3, "T"], y=[4]))
    assert guessed is not None and guessed.to_json() == {"x": [[1, 3, 8], [8, 3, 32], [32, 3, 128]]}
    assert "guessed" in guessed.source


def test_calibration_shapes_are_used() -> None:
    m = model(ids=["N", "T"])
    m.metadata_props.add(key=SHAPES_KEY, value=json.dumps({"ids": [16, 200]}))
    found = default_profile(m)
    assert (
        found is not None and found.to_json() == {"ids": [[1, 8], [8, 200], [32, 200]]} and found.source == "calibration shapes"
    )
    m.metadata_props[0].value = "not json"
    assert "guessed" in default_profile(m).source  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("z:1x3", "not an input"),
        ("x:1x4", "does not fit"),
        ("x:1x3x3", "does not fit"),
        ("y:4", "no shapes for the dynamic input 'x'"),
    ],
)
def test_profiles_that_do_not_fit(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        check_profile(model(x=["N", 3], y=[4]), parse_profile(text))


def test_shapes_that_calibration_never_saw() -> None:
    m = model(ids=["N", "T"], x=["N", 4])
    assert outside_calibration(m, parse_profile("ids:1x8,8x64,32x512")) == []
    m.metadata_props.add(key=SHAPES_KEY, value=json.dumps({"ids": [1, 128], "x": [1, 4]}))
    assert outside_calibration(m, parse_profile("ids:1x8,8x64,32x128;x:1x4,8x4,64x4")) == []
    (line,) = outside_calibration(m, parse_profile("ids:1x8,8x64,32x512"))
    assert line.startswith("axis 1 of 'ids' runs from 8 to 512 in the profile, but was calibrated at 128")


def test_shapes_between_the_recorded_ends() -> None:
    m = model(ids=["N", "T"])
    m.metadata_props.add(key=SHAPES_KEY, value=json.dumps({"ids": {"min": [1, 64], "max": [1, 128]}}))
    assert outside_calibration(m, parse_profile("ids:1x8,8x64,32x100")) == []
    for text in ("ids:1x8,8x64,32x512", "ids:1x8,8x16,32x32"):
        assert "but was calibrated at 64 to 128" in outside_calibration(m, parse_profile(text))[0]


@pytest.mark.parametrize(
    ("seen", "points"),
    [
        ({"ids": (1, 1), "mask": (11, 14), "past": (10, 13)}, [[1, 1, 128], [9, 14, 256], [8, 13, 128]]),  # single steps
        ({"ids": (1, 10), "mask": (10, 14), "past": (0, 13)}, [[1, 10, 128], [2, 23, 256], [1, 13, 128]]),  # and the prompt
        ({"ids": (4, 4), "mask": (9, 9), "past": (7, 7)}, [[4, 4, 128], [8, 9, 128], [7, 7, 128]]),  # no sum
    ],
)
def test_the_mask_of_a_decoder_is_as_long_as_past_and_tokens(seen: dict[str, tuple[int, int]], points: list[list[int]]) -> None:
    m = model(**{name: ["N", name] for name in seen})
    recorded = {name: {"min": [1, low], "max": [1, high]} for name, (low, high) in seen.items()}
    m.metadata_props.add(key=SHAPES_KEY, value=json.dumps(recorded))
    found = default_profile(m)
    assert found is not None
    assert [[p[1] for p in found.to_json()[name]] for name in seen] == points


def test_a_sum_may_be_spelled() -> None:
    m = model(ids=["N", "new"], mask=["N", "past + new"], past=["N", "past"])
    m.metadata_props.add(key=SHAPES_KEY, value=json.dumps({n: {"min": [1, 3], "max": [1, 5]} for n in ("ids", "mask", "past")}))
    found = default_profile(m)
    assert found is not None and found.to_json()["mask"] == [[1, 6], [8, 10], [32, 256]]

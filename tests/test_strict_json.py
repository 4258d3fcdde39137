"""JSON as any parser reads it: no NaN and no infinity, whatever stands around it."""

import json
import math

import pytest

from fastres import strict_json
from fastres.errors import FailureError

NONFINITE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [v], lambda v: {"a": [{"b": v}]}])
def test_what_is_not_finite_is_not_written(value, wrap):
    with pytest.raises(FailureError, match="a record is not written: "):
        strict_json.dumps(wrap(value))


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", '{"a": [NaN]}']
)
def test_what_is_not_finite_is_not_read(text):
    with pytest.raises(ValueError, match="is no finite number"):
        strict_json.loads(text)


def test_the_rest_is_pythons_own():
    value = {"a": [1, 2.5, -0.0, 1e308, 10**40, "ü", None, True], "b": {}}
    for options in ({}, {"indent": 2}, {"sort_keys": True}):
        text = strict_json.dumps(value, **options)
        assert text == json.dumps(value, **options)
        assert strict_json.loads(text) == strict_json.loads(text.encode()) == value


def test_too_deep_is_no_other_error():
    with pytest.raises(ValueError, match="recursion"):
        strict_json.loads(100_000 * b"[")

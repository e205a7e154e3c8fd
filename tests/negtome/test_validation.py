"""Checks of numbers that a user gives."""

import math

import numpy as np
import pytest
import torch

from negtome.validation import check_float, check_int


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int64(1), torch.tensor(1), torch.tensor(1.0)])
def test_every_kind_of_one_is_the_same_float(value):
    assert repr(check_float("alpha", value, -1, 1)) == "1.0"


@pytest.mark.parametrize("value", [True, "1", None, math.nan, math.inf, 10**400, [1.0], 1.1, -1.1])
def test_bad_numbers_are_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^alpha must be "):
        check_float("alpha", value, -1, 1)


def test_whole_numbers_keep_to_their_limits():
    assert check_int("steps", 10**400, 1) == 10**400
    for value in (True, 6.0, "6", 0, None):
        with pytest.raises(ValueError, match=r"^steps must be a whole number of at least 1, got "):
            check_int("steps", value, 1)
    with pytest.raises(ValueError, match=r"^steps must be a whole number from 1 to 9, got 10; take fewer"):
        check_int("steps", 10, 1, 9, "; take fewer")

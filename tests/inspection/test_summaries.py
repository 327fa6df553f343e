"""Summaries of attention maps, on maps whose answer is known."""

import math

import pytest
import torch

from regard.inspection import entropy, mean_attention_distance


def test_entropy():
    uniform = torch.full((2, 3, 5, 8), 1 / 8)
    single = torch.eye(8).expand(2, 3, 8, 8)
    torch.testing.assert_close(entropy(uniform), torch.full((2, 3), math.log(8)))
    assert (entropy(single) == 0).all()
    assert entropy(torch.zeros(4, 4)) == 0


def test_distance_of_a_shift():
    """Every query looks two rows below, wrapped: height 4 gives 2 tokens for all."""
    weights = torch.eye(12).roll(2 * 3, dims=1).expand(2, 1, 12, 12)
    torch.testing.assert_close(mean_attention_distance(weights, (4, 3)), torch.full((2, 1), 2.0))


def test_distance_is_euclidean():
    weights = torch.zeros(12, 12)
    weights[:, 0] = 1
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(3.0), indexing="ij")
    torch.testing.assert_close(mean_attention_distance(weights, (4, 3)), torch.hypot(row, column).mean())


def test_prefix_tokens_do_not_count():
    weights = torch.zeros(1, 6, 6)
    weights[:, 2:, 0] = 0.9  # most weight goes to a class token
    weights[:, 2:, 2] = 0.1
    weights[:, :2, 5] = 1.0  # and prefix queries look far
    torch.testing.assert_close(mean_attention_distance(weights, (4,)), torch.tensor([1.5]))
    assert mean_attention_distance(torch.zeros(1, 6, 6), (2, 2)).isnan()


@pytest.mark.parametrize("grid", [(2, 2, 2), (2, 3), (6,)])
def test_any_rank(grid):
    count = math.prod(grid)
    assert mean_attention_distance(torch.eye(count), grid) == 0


def test_bad_input():
    with pytest.raises(ValueError, match="maps: expected"):
        mean_attention_distance(torch.zeros(3, 4), (2, 2))
    with pytest.raises(ValueError, match=r"grid_size: \(3, 3\) is no grid within the 4 tokens"):
        mean_attention_distance(torch.eye(4), (3, 3))
    with pytest.raises(ValueError, match="maps: expected"):
        entropy(torch.zeros(3))

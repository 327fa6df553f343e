"""BlockOrder: where tokens go, padding, the way back, and what it refuses."""

import itertools

import pytest
import torch

from regard import BlockOrder

CASES = [
    ((12,), (4,), (0,)),
    ((13,), (4,), (3,)),
    ((6, 8), (3, 4), (0, 0)),
    ((5, 7), (2, 3), (1, 2)),
    ((13, 17), (7, 7), (0, 0)),
    ((3, 4, 5), (2, 2, 2), (1, 0, 1)),
    ((2, 3), (5, 5), (1, 4)),
]


@pytest.mark.parametrize(("grid", "block", "offset"), CASES)
def test_tokens_stand_block_after_block(grid, block, offset) -> None:
    order = BlockOrder(grid, block, offset)
    count = torch.Size(grid).numel()
    tokens = torch.arange(1, count + 1).view(1, count, 1)
    expected = []
    for corner in itertools.product(*(range(-o, n, b) for n, b, o in zip(grid, block, offset, strict=True))):
        for inside in itertools.product(*(range(b) for b in block)):
            place = [c + i for c, i in zip(corner, inside, strict=True)]
            there = all(0 <= p < n for p, n in zip(place, grid, strict=True))
            number = 0
            for p, n in zip(place, grid, strict=True):
                number = number * n + p
            expected.append(number + 1 if there else 0)
    arranged = order.arrange(tokens)
    assert arranged.flatten().tolist() == expected
    assert order.blocks * order.block_tokens == len(expected)
    assert torch.equal(order.restore(arranged), tokens)
    if order.padded:
        assert order.mask().tolist() == [[t > 0 for t in expected]]
    else:
        assert order.mask() is None and 0 not in expected


def test_any_leading_dimensions_and_gradients() -> None:
    order = BlockOrder((5, 7), 3, offset=1)
    tokens = torch.randn(2, 3, 35, 4, requires_grad=True)
    again = order.restore(order.arrange(tokens))
    assert torch.equal(again, tokens)
    (grad,) = torch.autograd.grad(again.sum(), tokens)
    assert (grad == 1).all()


def test_an_empty_grid_has_no_blocks() -> None:
    order = BlockOrder((0, 4), 2)
    assert order.blocks == 0 and order.arrange(torch.zeros(1, 0, 3)).shape == (1, 0, 3)
    assert order.restore(torch.zeros(1, 0, 3)).shape == (1, 0, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        (((), 2), ValueError, ["grid_size", "()"]),
        (((4, -1), 2), ValueError, ["grid_size", "-1"]),
        (((4.0, 2), 2), TypeError, ["grid_size", "float"]),
        (((4, 4), 0), ValueError, ["block_size", "0"]),
        (((4, 4), (2, 0)), ValueError, ["block_size", "0"]),
        (((4, 4), (2, 2, 2)), ValueError, ["block_size", "(2, 2, 2)", "3 axes", "(4, 4)"]),
        (((4, 4), 2.0), TypeError, ["block_size", "float"]),
        (((4, 4), 2, -1), ValueError, ["offset", "-1"]),
        (((4, 4), 2, (0, 2)), ValueError, ["offset", "(0, 2)", "(2, 2)"]),
        (((4, 4), 2, (0,)), ValueError, ["offset", "1 axes"]),
    ],
)
def test_sizes_that_do_not_fit(arguments, error, names) -> None:
    with pytest.raises(error) as raised:
        BlockOrder(*arguments)
    for name in names:
        assert name in str(raised.value)


@pytest.mark.parametrize("method", ["arrange", "restore"])
@pytest.mark.parametrize("size", [(35,), (2, 34, 3)])
def test_tokens_that_do_not_fit(method: str, size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tokens: expected"):
        getattr(BlockOrder((5, 7), 3), method)(torch.zeros(size))


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()

    def there_and_back(tokens, height, width):
        order = BlockOrder((height, width), (3, 4), (1, 2))
        return order.restore(2 * order.arrange(tokens))

    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=False, backend="aot_eager")
    for height, width in ((5, 7), (6, 8)):
        tokens = torch.randn(2, height * width, 3)
        assert torch.equal(compiled(tokens, height, width), 2 * tokens)

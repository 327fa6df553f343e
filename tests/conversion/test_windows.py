"""Windowed attention: shifted windows attend within the image's own neighbourhoods, biases come before selection."""

import pytest
import torch
from model_families import fresh, images_for
from torch import nn

import regard
from regard.conversion.adapters.torchvision import _beyond_seam

SWINS = ("swin", "swin-v2", "swin-v2-cr", "torchvision-swin", "torchvision-swin-v2")

pytestmark = pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")


class Watching(regard.KNN):
    """k-NN attention that keeps what it was called with."""

    calls: list[dict] = []

    def attend(self, query, key, value, **options):
        output = super().attend(query, key, value, **options)
        self.calls.append({"query": query, "key": key, "value": value, "output": output, **options})
        return output


@pytest.mark.parametrize("name", SWINS)
def test_shifted_windows_keep_allowed_keys_only(name):
    model, images = fresh(name), images_for(name)
    with regard.converted(model, Watching(topk=0.5), example_inputs=images):
        Watching.calls.clear()
        model(images)
    masked = [call for call in Watching.calls if call["attn_mask"].dim() == 4 and len(call["attn_mask"]) > 1]
    assert masked, "no shifted windows were seen"
    for call in masked:
        hidden = (call["attn_mask"] < -50.0).all(dim=1)  # of every head: the bias is nowhere that large
        assert hidden.any() and not hidden.all(dim=-1).any()
        for window, query in hidden.any(dim=-1).nonzero()[::7]:
            value = call["value"].clone()
            value[window, :, hidden[window, query]] = 1e6
            options = {key: call[key] for key in ("attn_mask", "scale")}
            found = regard.knn_attention(call["query"], call["key"], value, topk=0.5, **options)
            assert torch.equal(found[window, :, query], call["output"][window, :, query])


@pytest.mark.parametrize("name", SWINS)
def test_windows_tell_their_grid(name):
    model, images = fresh(name), images_for(name)
    with regard.converted(model, Watching(topk=0.5), example_inputs=images):
        Watching.calls.clear()
        model(images)
    assert {call["grid_size"] for call in Watching.calls} == {(4, 4)}
    assert {call["num_prefix_tokens"] for call in Watching.calls} == {0}


def test_a_bias_moves_the_selection():
    model, images = fresh("swin"), images_for("swin")
    attention = model.get_submodule("layers.0.blocks.0.attn")
    regard.convert(model, "knn(topk=1)", where="layers.0.blocks.0.*", example_inputs=images)
    with torch.no_grad():
        attention.relative_position_bias_table.zero_()
        attention.relative_position_bias_table[attention.relative_position_index[0, 5]] = 1e4
        x = torch.randn(1, 16, attention.dim, dtype=torch.float64)
        values = attention.qkv(x)[..., 2 * attention.dim :]
        torch.testing.assert_close(attention(x)[:, 0], attention.proj(values[:, 5]))


@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
@pytest.mark.parametrize("shift", [(2, 2), (0, 2), (1, 0)])
def test_the_seam_of_a_rolled_map(size, shift):
    """Against pixels that carry their place: rolled neighbours are no neighbours in the image."""
    window = (4, 4)
    rows, columns = (torch.arange(n).roll(-s) for n, s in zip(size, shift, strict=True))
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    place = place.view(size[0] // 4, 4, size[1] // 4, 4, 2).transpose(1, 2).reshape(-1, 16, 2)
    apart = (place.unsqueeze(1) - place.unsqueeze(2)).abs().amax(dim=-1)
    assert torch.equal(_beyond_seam(size, window, shift, torch.device("cpu")), apart >= 4)


def test_feature_maps_tell_their_grid():
    model, images = fresh("pvt-v2"), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with regard.converted(model, Watching(topk=0.5), example_inputs=images):
        Watching.calls.clear()
        model(images)
    assert [call["grid_size"] for call in Watching.calls] == [None, None, None, (2, 3)], "only the last has all keys"


def test_a_grid_that_does_not_fit_is_not_told():
    class Attending(nn.Module):
        def __init__(self, patch_embed):
            super().__init__()
            self.patch_embed = patch_embed

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    embed = nn.Identity()
    embed.grid_size, embed.strict_img_size = (2, 3), True
    Watching.calls.clear()
    for tokens in (6, 8):
        regard.convert(Attending(embed), Watching(topk=2), example_inputs=torch.randn(1, 2, tokens, 8))
    assert [call["grid_size"] for call in Watching.calls] == [(2, 3), None]

"""Adapters fail loudly where a class is not what they were written for."""

import pytest
import timm
import torch
from model_families import fresh, images_for, output_of, randomise
from torch import nn

import regard
from regard.conversion import adapters, recording
from regard.conversion.adapters import Adapter, AdapterError, adapter_for, reason_left
from regard.conversion.seam import seams_of

pytestmark = pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")


def tnt() -> nn.Module:
    return fresh("tnt")


def test_a_missing_attribute_is_named():
    model = tnt()
    del model.blocks[0].attn_in.scale
    with pytest.raises(AdapterError, match=r"timm.models.tnt.Attention is not as .* no attribute 'scale'"):
        regard.convert(model, "knn")
    assert not seams_of(model)
    with pytest.raises(ValueError, match="example_inputs"):  # the model itself cannot run
        regard.convert(model, "knn", where="*.attn_out")


def test_a_changed_signature_is_named(monkeypatch):
    kind = type(tnt().blocks[0].attn_in)
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, mask=None: plain(self, x))
    with pytest.raises(AdapterError, match=r"its forward takes \(x, mask\), not \(x\)"):
        regard.convert(tnt(), "knn")


def test_a_class_that_computes_something_else_is_noticed(monkeypatch):
    """Same attributes, same signature, other equation: the recording run holds the adapter against the class."""
    kind = type(tnt().blocks[0].attn_in)
    plain = kind.forward

    def forward(self, x):
        return plain(self, x) * 1.01

    monkeypatch.setattr(kind, "forward", forward)
    model = tnt()
    with pytest.raises(AdapterError, match="'blocks.0.attn_in' does not compute what this version of regard knows"):
        regard.convert(model, "knn")
    assert not seams_of(model)


def test_images_are_not_mixed_up_with_windows(monkeypatch):
    """The recording run takes two images, so that an adapter with their order wrong is noticed."""
    model, images = fresh("gcvit"), images_for("gcvit")
    wrong = adapters.timm.gcvit

    def mixed(module, attention, x, q_global=None):
        if q_global is not None:
            q_global = q_global.flip(0)
        return wrong(module, attention, x, q_global)

    name = "timm.models.gcvit.WindowAttentionGlobal"
    known = adapters._ADAPTERS[name]
    monkeypatch.setitem(adapters._ADAPTERS, name, Adapter(known.arguments, known.attributes, mixed))
    with pytest.raises(AdapterError, match="does not compute"):
        regard.convert(model, "knn", example_inputs=images)


def test_a_replaced_forward_is_not_passed_over():
    model = tnt()
    plain = model.blocks[0].attn_in.forward
    model.blocks[0].attn_in.forward = lambda x: 2 * plain(x)
    record = regard.convert(model, "knn")
    rows = {row.module: row.reason for row in record.rows}
    assert "`forward` attribute was replaced" in rows["blocks.0.attn_in"] and not rows["blocks.1.attn_in"]


def test_subclasses_are_known_by_the_forward_that_they_run():
    class Plain(nn.MultiheadAttention):
        pass

    class Other(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    assert adapter_for(Plain(8, 2)) is adapter_for(nn.MultiheadAttention(8, 2)) is not None
    assert adapter_for(Other(8, 2)) is None
    with pytest.warns(UserWarning, match="nothing was converted(.|\n)*multi_head_attention_forward"):
        regard.convert(Other(8, 2), "knn", example_inputs=torch.randn(3, 1, 8))


def test_a_softmax_by_hand_without_an_adapter_is_left_with_its_class():
    model = timm.create_model("efficientvit_m0")
    with pytest.warns(UserWarning, match="no adapter for timm.models.efficientvit_msra.CascadedGroupAttention"):
        record = regard.convert(model, "knn")
    assert record.left and not record.converted


def test_transformers_eager_attention_is_left_with_the_way_out():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=16, attn_implementation="eager")
    model = transformers.ViTModel(config)
    with pytest.warns(UserWarning, match=r"set_attn_implementation\('sdpa'\)"):
        regard.convert(model, "knn")
    model.set_attn_implementation("sdpa")
    assert regard.convert(model, "knn").converted


def test_every_named_class_exists():
    """An adapter or a reason for a class that timm no longer has would never be missed."""
    import importlib

    for name in (*adapters._ADAPTERS, *adapters.timm.LEFT):
        module, kind = name.rsplit(".", 1)
        assert isinstance(getattr(importlib.import_module(module), kind), type)
    assert reason_left(nn.Linear(2, 2)) is None


def test_a_class_that_gives_nan_is_no_reason_to_stop():
    model, images = tnt(), images_for("tnt")
    images[:, :, :16, :16] = float("nan")
    assert len(regard.convert(model, "knn", example_inputs=images).converted) == 4


class TestOffsetsAsProducts:
    """SAM and MViTv2 score offsets by the query: folded into the products, so that no mask is left."""

    @pytest.mark.parametrize("name", ["sam", "mvit-v2", "mvit-v2-cls"])
    def test_mechanisms_that_take_no_bias_are_not_refused(self, name):
        model, images = fresh(name), images_for(name)
        with torch.no_grad():
            expected = output_of(model, images)
            record = regard.convert(model, "multipole(num_clusters=3, near=1.0)", example_inputs=images)
            assert not record.left
            torch.testing.assert_close(output_of(model, images), expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("size", [(4, 4), (6, 5), (3, 9)])
    @pytest.mark.parametrize("position", ["offsets", "rotary", "none"])
    def test_sam_on_maps_of_any_size(self, size, position):
        from timm.layers import RotaryEmbeddingCat
        from timm.models.vision_transformer_sam import Attention

        options = {
            "offsets": {"use_rel_pos": True, "input_size": (4, 4)},
            "rotary": {"rope": RotaryEmbeddingCat(8, in_pixels=False, feat_shape=size)},
            "none": {},
        }
        torch.manual_seed(0)
        module = randomise(Attention(16, num_heads=2, qk_norm=True, **options[position])).double()
        x = torch.randn(3, *size, 16, dtype=torch.float64)
        expected = module(x)
        with regard.converted(module, "knn(topk=1.0)", example_inputs=x):
            torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("precision", "error", "agree"), [("highest", 1e-3, False), ("high", 1e-3, True)])
def test_products_in_reduced_precision_are_allowed_their_rounding(precision, error, agree):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        x = torch.ones(4)
        assert recording._agree(x + error, x) is agree
        assert not recording._agree(x * 1.5, x)
    finally:
        torch.set_float32_matmul_precision(before)

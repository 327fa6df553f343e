"""convert, restore and converted: choosing modules, the record, bad input, and the model left as it was found."""

import copy
import threading

import pytest
import timm
import torch
from model_families import randomise
from torch import nn
from torch.nn import functional as F

import regard
from regard.conversion.seam import seams_of
from regard.results import ConversionRecord
from regard.specs import Mechanism

pytestmark = pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")


def small_vit(**options) -> nn.Module:
    torch.manual_seed(0)
    options = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 64, "num_classes": 5} | options
    return randomise(timm.create_model("vit_tiny_patch16_224", **options)).eval()


def images(side: int = 64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def mechanisms_of(record: ConversionRecord) -> list[str | None]:
    return [row.mechanism for row in record.rows]


class TestChoosingModules:
    def test_where_takes_one_pattern_or_several(self):
        model = small_vit()
        with regard.converted(model, "knn(topk=3)", where="blocks.1.*") as record:
            assert mechanisms_of(record) == [None, "knn(topk=3)", None]
            assert record.rows[0].reason == "not selected by `where`"
        with regard.converted(model, regard.KNN(topk=3), where=["blocks.0.attn", "*.2.attn"]) as record:
            assert mechanisms_of(record) == ["knn(topk=3)", None, "knn(topk=3)"]

    def test_the_first_pattern_that_matches_wins(self):
        patterns = {"blocks.0.*": None, "blocks.1.attn": regard.KNN(topk=2), "blocks.*": "knn(topk=0.5)"}
        record = regard.convert(small_vit(), patterns)
        assert mechanisms_of(record) == [None, "knn(topk=2)", "knn(topk=0.5)"]
        assert "'blocks.0.*'" in record.rows[0].reason
        record = regard.convert(small_vit(), {"blocks.2.*": "knn"}, where="blocks.[12].*")
        assert [row.reason for row in record.rows] == ["not selected by `where`", "matched by no pattern", ""]

    def test_unmatched_patterns_are_named_with_the_nearest(self):
        model = small_vit()
        with pytest.raises(
            ValueError, match=r"where: no attention module is named 'block.1.*'; .*'blocks\.[012]\.attn'"
        ):
            regard.convert(model, "knn", where=["blocks.0.*", "block.1.*"])
        with pytest.raises(ValueError, match="mechanism: no attention module is named 'blocks.7.attn'"):
            regard.convert(model, {"blocks.7.attn": "knn", "*": "knn"})
        assert not seams_of(model)

    def test_only_the_chosen_modules_change(self):
        model = small_vit()
        seen = {}
        for index, block in enumerate(model.blocks):
            block.attn.register_forward_hook(lambda _m, _i, output, index=index: seen.__setitem__(index, output))
        model(images())
        before = dict(seen)
        with regard.converted(model, "knn(topk=2)", where="blocks.1.attn"):
            model(images())
        assert torch.equal(seen[0], before[0])
        assert not torch.allclose(seen[1], before[1])


class TestRecord:
    def test_prints_as_an_aligned_table(self):
        model = timm.create_model("vit_base_patch16_siglip_224", depth=1, embed_dim=48, num_heads=3, img_size=64)
        record = regard.convert(model, "knn(topk=0.25)")
        assert str(record) == (
            "VisionTransformer: 1 of 2 attention modules converted "
            "(random images 2 x 3 x 64 x 64, the size from model.patch_embed.img_size)\n"
            "module         class                tokens  keys  heads  mechanism, or why it was left\n"
            "blocks.0.attn  Attention                16    16      3  knn(topk=0.25)\n"
            "attn_pool      AttentionPoolLatent       1    16      3  one query looks at all tokens: a pool"
        )

    def test_survives_json(self):
        record = regard.convert(small_vit(), "knn(topk=0.25)", where="blocks.0.*")
        assert ConversionRecord.from_json(record.to_json()) == record
        with pytest.raises(ValueError, match="ConversionRecord: field 'model' is missing"):
            ConversionRecord.from_json("{}")

    def test_the_text_of_its_mechanisms_converts_again(self):
        model = small_vit()
        record = regard.convert(model, {"blocks.0.*": "knn(topk=3)", "*": "knn(topk=0.25)"})
        expected = model(images())
        regard.restore(model)
        regard.convert(model, {row.module: row.mechanism for row in record.rows})
        assert torch.equal(model(images()), expected)


class TestBadInput:
    def test_converting_twice_says_restore_first(self):
        model = small_vit()
        with regard.converted(model, "knn", where="blocks.0.*"):
            with pytest.raises(ValueError, match=r"converted already .*regard\.restore\(model\) first"):
                regard.convert(model, "knn", where="blocks.1.*")
            with pytest.raises(ValueError, match="converted already"), regard.converted(model, "knn"):
                pass
            assert len(seams_of(model)) == 1, "the outer conversion stands"

    def test_models_without_attention(self):
        with pytest.raises(ValueError, match="model: ResNet has no attention"):
            regard.convert(timm.create_model("resnet10t"), "knn")

    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    def test_scripted_and_traced_models(self):
        model = nn.Sequential(nn.Linear(4, 4))
        for other in (
            torch.jit.script(model),
            torch.jit.trace(model, torch.randn(1, 4)),
            torch.fx.symbolic_trace(model),
        ):
            with pytest.raises(ValueError, match="model: it is .*traced.*before that"):
                regard.convert(other, "knn", example_inputs=torch.randn(1, 4))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"model": "vit"}, TypeError, "model: expected a torch.nn.Module, got str"),
            ({"mechanism": "knnn"}, ValueError, "unknown name 'knnn'"),
            ({"mechanism": {}}, ValueError, "mechanism: the dict of patterns is empty"),
            ({"mechanism": 0.5}, TypeError, "mechanism: expected"),
            ({"mechanism": {0: "knn"}}, TypeError, "mechanism: patterns are texts"),
            ({"where": []}, ValueError, "where: no pattern given"),
            ({"where": [3]}, TypeError, "where: patterns are texts .* got int"),
            ({"example_inputs": 224}, TypeError, "example_inputs: expected a tensor.* got int"),
            ({"example_inputs": torch.randn(1, 3, 65, 64)}, ValueError, "example_inputs: VisionTransformer fails on"),
        ],
    )
    def test_wrong_arguments(self, arguments, error, message):
        model = small_vit()
        with pytest.raises(error, match=message):
            regard.convert(**({"model": model, "mechanism": "knn"} | arguments))
        assert not seams_of(model)

    def test_a_failing_model_is_left_as_it_was_found(self):
        class Moody(nn.Module):
            def __init__(self):
                super().__init__()
                self.attn = nn.MultiheadAttention(8, 2)
                self.norm = nn.BatchNorm1d(8)
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x):
                self.calls += 1
                self.memory = self.attn(x, x, x)[0]
                raise KeyError("mood")

        model = Moody()
        model.norm.eval()
        found = {name: dict(vars(module)) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match="KeyError: 'mood'"):
            regard.convert(model, "knn", example_inputs=torch.randn(4, 1, 8))
        assert {name: dict(vars(module)) for name, module in model.named_modules()} == found
        assert model.training and not model.norm.training and model.calls == 0
        assert not model.attn._forward_hooks and not model.attn._forward_pre_hooks


class TestTheRunLeavesNoTrace:
    def test_training_flags_buffers_random_state_and_plain_attributes(self):
        class Cached(nn.Module):
            def __init__(self):
                super().__init__()
                self.qkv, self.norm, self.drop = nn.Linear(8, 24), nn.BatchNorm1d(5), nn.Dropout(0.5)
                self.cache, self.seen = {"old": 1}, ["old"]

            def forward(self, x):
                self.cache[len(self.cache)] = x
                self.seen.append(x)
                self.new = x
                self.norm.running_mean.add_(torch.rand(5))  # buffers and random numbers, in evaluation too
                query, key, value = self.norm(self.qkv(x)).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
                return self.drop(F.scaled_dot_product_attention(query, key, value))

        model = Cached().train()
        model.norm.eval()
        state, mean = torch.random.get_rng_state(), model.norm.running_mean.clone()
        record = regard.convert(model, "knn", example_inputs=torch.randn(2, 5, 8, generator=torch.Generator()))
        assert [row.module for row in record.converted] == [""] and "(the model)" in str(record)
        assert model.training and model.drop.training and not model.norm.training
        assert model.cache == {"old": 1} and model.seen == ["old"] and not hasattr(model, "new")
        assert torch.equal(model.norm.running_mean, mean) and torch.equal(torch.random.get_rng_state(), state)
        regard.restore(model)
        assert "forward" not in vars(model)

    def test_fused_attention_switched_off_comes_back_off(self):
        model = small_vit()
        for block in model.blocks:
            block.attn.fused_attn = False
        expected = model(images())
        regard.convert(model, "knn(topk=1.0)", where="blocks.0.*")
        assert [block.attn.fused_attn for block in model.blocks] == [True, False, False]
        torch.testing.assert_close(model(images()), expected)
        regard.restore(model)
        assert [block.attn.fused_attn for block in model.blocks] == [False] * 3
        assert torch.equal(model(images()), expected)

    def test_a_forward_of_the_users_own_is_wrapped_and_put_back(self):
        model = small_vit()
        plain = model.blocks[0].attn.forward

        def louder(*args, **kwargs):
            return 2 * plain(*args, **kwargs)

        model.blocks[0].attn.forward = louder
        expected = model(images())
        with regard.converted(model, "knn(topk=1.0)") as record:
            assert len(record.converted) == 3
            torch.testing.assert_close(model(images()), expected)
        assert model.blocks[0].attn.forward is louder

    def test_restoring_what_is_not_converted_does_nothing(self):
        model = small_vit()
        found = copy.copy(vars(model.blocks[0].attn))
        regard.restore(model)
        assert vars(model.blocks[0].attn) == found


class Refusing(Mechanism):
    """Refuses per-query masks, and calls with many tokens."""

    card = regard.Dense.card

    def __str__(self):
        return "refusing"

    def attend(self, query, key, value, *, attn_mask=None, **options):
        if attn_mask is not None:
            raise ValueError("attn_mask: hides keys only, not the same for all queries\nsecond line")
        return regard.KNN(topk=2).attend(query, key, value, **options)


class TestRefusals:
    def test_what_the_mechanism_refuses_is_left_with_the_reason(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.plain, self.masked = Attending(), Attending(mask=True)

            def forward(self, x):
                return self.masked(self.plain(x))

        class Attending(nn.Module):
            def __init__(self, mask=False):
                super().__init__()
                self.mask = torch.rand(6, 6) > 0.3 if mask else None

            def forward(self, x):
                return F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask)

        model, x = Two(), torch.randn(1, 2, 6, 8)
        record = regard.convert(model, Refusing(), example_inputs=x)
        assert mechanisms_of(record) == ["refusing", None]
        assert record.rows[1].reason == "dense refuses: attn_mask: hides keys only, not the same for all queries"
        assert "forward" not in vars(model.masked)

    def test_a_model_that_the_mechanism_refuses_altogether_is_told(self):
        model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(1, 2))
        with pytest.warns(UserWarning, match="nothing was converted(.|\n)*refuses"):
            record = regard.convert(model, Refusing(), example_inputs=torch.randn(1, 3, 224, 224))
        assert not record.converted and not seams_of(model)


class TestRunning:
    def test_sizes_and_batches_may_change(self):
        model = small_vit(dynamic_img_size=True)
        regard.convert(model, "knn(topk=1.0)")
        other = copy.deepcopy(model)
        regard.restore(other)
        for side, batch in ((64, 1), (96, 3), (32, 2)):
            torch.testing.assert_close(model(images(side, batch)), other(images(side, batch)))

    def test_training_draws_dropout_by_the_mechanism(self):
        model = small_vit(attn_drop_rate=0.5).train()
        with regard.converted(model, "knn(topk=4)"):
            torch.manual_seed(0)
            first = model(images())
            torch.manual_seed(1)
            assert not torch.allclose(first, model(images()))
            first.sum().backward()
        assert model.blocks[0].attn.qkv.weight.grad.isfinite().all()

    def test_activation_checkpointing_recomputes_the_same(self):
        model = small_vit()
        regard.convert(model, "knn(topk=4)")
        gradients = []
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            model.zero_grad()
            model.train()(images()).square().sum().backward()
            gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
        torch.testing.assert_close(*gradients)

    def test_autocast(self):
        model = small_vit()
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(images())
            with regard.converted(model, "knn(topk=1.0)"):
                found = model(images())
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.1, atol=0.1)

    def test_one_query_stays_dense_whatever_the_recording_saw(self):
        class Attending(nn.Module):
            def forward(self, x, tokens=6):
                return F.scaled_dot_product_attention(x[:, :, :tokens], x, x)

        model, x = Attending(), torch.randn(1, 2, 6, 8)
        expected = model(x, tokens=1)
        regard.convert(model, "knn(topk=1)", example_inputs=(x, 6))
        assert torch.equal(model(x, tokens=1), expected)
        assert not torch.allclose(model(x, tokens=2)[:, :, :1], expected)

    def test_keys_shared_among_heads_and_images_are_broadcast(self):
        class Attending(nn.Module):
            def forward(self, query, key):
                return F.scaled_dot_product_attention(query, key, key)

        model, inputs = Attending(), (torch.randn(3, 2, 6, 8), torch.randn(1, 1, 7, 8))
        expected = model(*inputs)
        with regard.converted(model, "knn(topk=7)", example_inputs=inputs):
            torch.testing.assert_close(model(*inputs), expected)

    def test_threads_see_only_their_own_model(self):
        one, other = small_vit(), small_vit()
        regard.convert(one, "knn(topk=2)")
        expected = {id(model): model(images()) for model in (one, other)}
        wrong = []

        def run(model):
            for _ in range(20):
                if not torch.equal(model(images()), expected[id(model)]):
                    wrong.append(model)

        threads = [threading.Thread(target=run, args=(model,)) for model in (one, other, one)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_converted_restores_after_an_error(self):
        model = small_vit()
        with pytest.raises(KeyError), regard.converted(model, "knn"):
            raise KeyError
        assert not seams_of(model)


def test_what_torch_compile_wraps_is_converted_within():
    model = small_vit()
    compiled = torch.compile(model, backend="eager")
    record = regard.convert(compiled, "knn(topk=2)")
    assert record.model == "VisionTransformer" and len(seams_of(model)) == 3
    regard.restore(compiled)
    assert not seams_of(model)
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    record = regard.convert(model, "knn(topk=2)")
    assert [row.module for row in record.rows] == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]


@pytest.mark.parametrize("channels", [1, 4])
def test_images_have_the_channels_that_the_model_was_built_for(channels):
    record = regard.convert(small_vit(in_chans=channels), "knn")
    assert f"2 x {channels} x 64 x 64" in record.inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = small_vit().to(dtype), images().to(dtype)
    with torch.no_grad():
        expected = model(x)
        regard.convert(model, "knn(topk=1.0)")
        found = model(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_torch_export_takes_a_converted_model():
    model, x = small_vit(), images()
    regard.convert(model, "knn(topk=4)")
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_parameters_may_be_swapped_for_a_call():
    model, x = small_vit(), images()
    regard.convert(model, "knn(topk=4)")
    doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
    expected = torch.func.functional_call(model, doubled, x)
    model.load_state_dict(doubled)
    torch.testing.assert_close(expected, model(x))


def test_an_attention_that_another_library_put_in_place_is_answered(monkeypatch):
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **options: plain(*args, **options))
    model, x = small_vit(), images()
    with regard.converted(model, "knn(topk=2)") as record:
        assert len(record.converted) == 3
        found = model(x)
    assert not torch.allclose(found, model(x), atol=1e-3)


def test_keywords_alone_reach_an_adapter_that_reads_the_grid():
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)).stages[3].blocks[0].attn.eval()
    inputs = {"x": torch.randn(2, 6, 256), "feat_size": (2, 3)}
    expected = model(**inputs)
    with regard.converted(model, "knn(topk=1.0)", example_inputs=inputs) as record:
        assert len(record.converted) == 1
        torch.testing.assert_close(model(**inputs), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_part_of_a_model_is_run_and_left():
    torch.manual_seed(0)
    model = nn.Sequential(torch.jit.script(nn.Dropout(0.5)), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    record = regard.convert(model.train(), "knn(topk=3)", example_inputs=torch.randn(2, 6, 16))
    assert len(record.converted) == 1 and model[0].training and model[1].training


@pytest.mark.parametrize(
    ("mechanism", "said"),
    [
        ("moh", "'moh' needs trained weights of its own; build a model with its attn_layer"),
        ("knn + gated", r"'knn \+ gated' changes more than attention; convert to 'knn'"),
        ("evit", r"'dense \+ evit' changes more than attention; .* .regard.reorganize"),
    ],
)
def test_what_must_be_trained_or_changes_more_is_refused(mechanism, said):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=said):
        regard.convert(model, mechanism)
    with pytest.raises(ValueError, match=said):
        regard.convert(model, {"blocks.0.*": mechanism})

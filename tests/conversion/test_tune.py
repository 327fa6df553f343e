"""Tuning: what it finds is cheaper, holds when it is put in, and was measured; the model is left as found."""

import copy
import json
import math

import pytest
import timm
import torch
from torch import nn

import regard
from regard.conversion import compare_models, features_of, tuning
from regard.results import Tuning, to_json

LADDER = ("knn(topk=0.5)", "knn(topk=0.25)", "knn(topk=0.1)")


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = timm.create_model("vit_tiny_patch16_224", img_size=112, depth=3, embed_dim=32, num_heads=2, num_classes=5)
    with torch.no_grad():  # attention that is not flat
        for one in made.parameters():
            one.mul_(6 if one.dim() > 1 else 1)
    return made


@pytest.fixture
def images():
    return torch.randn(3, 3, 112, 112, generator=torch.Generator().manual_seed(0))


def tune(model, images, **options):
    return regard.tune(model, images, **{"mechanism": LADDER, "show_progress": False, **options})


def cosine_of(model, pattern, images):
    other = copy.deepcopy(model)
    regard.convert(other, pattern)
    return compare_models(model, other, images).cosine.mean


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_what_is_found_holds_saves_and_was_measured(model, images, share):
    dense_to_least = 1 - cosine_of(model, LADDER[-1], images)
    target = 1 - share * dense_to_least
    found = tune(model, images, fidelity=target)
    assert found.modules == ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn")
    assert 0 < len(found.best.setting) <= 3
    assert found.best.flops < found.dense.flops
    by_hand = cosine_of(model, found.pattern, images)
    assert by_hand == pytest.approx(found.best.value("cosine"), abs=1e-6) and by_hand >= target
    assert found.best in found.curve


def test_a_looser_target_saves_at_least_as_much(model, images):
    saved = [tune(model, images, fidelity=target).best.flops for target in (1.0, 0.9999, 0.999, 0.9)]
    assert saved == sorted(saved, reverse=True) and saved[-1] < saved[0]


def test_the_curve_falls_from_dense_to_the_setting_found_and_holds(model, images):
    found = tune(model, images, fidelity=0.9975)
    assert found.curve[0] == found.dense and found.curve[-1].setting == found.best.setting
    flops = [one.flops for one in found.curve]
    assert flops == sorted(flops, reverse=True) and len(set(flops)) == len(flops) > 2
    assert all(one.value("cosine") >= 0.9975 for one in found.curve)
    assert any(one.value("cosine") < 0.9975 for one in found.steps), "and what did not hold was seen, too"


def test_no_single_change_more_holds(model, images):
    found = tune(model, images, fidelity=0.9975)
    for name, now in found.pattern.items():
        for text in LADDER[LADDER.index(now) + 1 if now else 0 :]:
            assert cosine_of(model, found.pattern | {name: text}, images) < 0.9975


def test_what_holds_everywhere_is_found_at_once(model, images):
    assert len(tune(model, images, fidelity=0.01).steps) == 1


def test_steps_follow_in_the_order_of_loss_for_each_flop_saved():
    cheap, dear = regard.KNN(0.1), regard.KNN(0.5)
    prices = tuning._Prices(
        {("a", dear): 1.0, ("a", cheap): 4.0, ("b", dear): 5.0, ("b", cheap): 7.0, ("c", cheap): 0.0},
        {("a", dear): 10, ("a", cheap): 20, ("b", dear): 10, ("b", cheap): 20, ("c", cheap): -1},
    )
    assert prices.path() == [("a", dear), ("a", cheap), ("b", cheap)]
    assert prices.following({"a": dear}, {"a": 4.0}) == ("b", cheap)
    assert prices.following({"a": cheap, "b": dear}, {"b": 7.0}) is None


def test_all_layers_take_the_cheapest_where_anything_holds(model, images):
    found = tune(model, images, fidelity=0.01)
    assert set(found.pattern.values()) == {"knn(topk=0.1)"}


def test_nothing_is_lowered_where_nothing_holds(model, images):
    found = tune(model, images, fidelity=1.0, mechanism="knn(topk=1)")
    assert set(found.pattern.values()) == {None} and found.best == found.dense and found.steps == ()
    assert found.dense.value("cosine") == pytest.approx(1.0)
    with pytest.warns(UserWarning, match="nothing was converted"):
        regard.convert(model, found.pattern)


def test_a_candidate_that_saves_nothing_is_never_taken(model, images):
    found = tune(model, images, fidelity=0.5, mechanism=["dense", "knn(topk=1.0)"])
    assert all(one.flops >= found.dense.flops for one in found.alone)
    assert set(found.pattern.values()) == {None}


def test_the_measure_named_is_the_one_that_holds(model, images):
    worst = tune(model, images, fidelity=0.999, measure="worst_centred_cosine")
    mean = tune(model, images, fidelity=0.999)
    assert worst.best.value("worst_centred_cosine") >= 0.999 > mean.best.value("worst_centred_cosine")
    assert worst.best.flops > mean.best.flops


def test_modules_not_selected_stay_dense(model, images):
    found = tune(model, images, fidelity=0.01, where="blocks.1.*")
    assert found.pattern == {"blocks.0.attn": None, "blocks.1.attn": "knn(topk=0.1)", "blocks.2.attn": None}
    assert found.left == dict.fromkeys(("blocks.0.attn", "blocks.2.attn"), "not selected by `where`")
    assert "not selected by `where`" in str(found)


def test_batches_of_different_sizes(images):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=1, embed_dim=16, num_heads=2, dynamic_img_size=True
    )
    found = tune(model, iter([images[:2], images[2:, :, :64, :80]]), fidelity=0.01)
    assert [one.patches for one in found.best.pictures] == [49, 49, 20]


def test_the_model_is_left_as_found(model, images):
    model.train()
    model.blocks[0].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attributes = [dict(vars(module)) for module in model.modules()]
    tune(model, images, fidelity=0.99)
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_stopped_midway_it_leaves_the_model_and_resumes(model, images, tmp_path, monkeypatch, stop):
    whole, file = tune(model, images, fidelity=0.99), tmp_path / "measured.json"
    runs = []

    def stopping(*arguments, **options):
        runs.append(1)
        if len(runs) == 8:
            raise stop
        return features_of(*arguments, **options)

    attributes = [dict(vars(module)) for module in model.modules()]
    with monkeypatch.context() as patch, pytest.raises(stop):
        patch.setattr(tuning, "features_of", stopping)
        tune(model, images, fidelity=0.99, file=file)
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert len(json.loads(file.read_text())["measured"]) == 6, "all before the eighth run but the dense features"
    runs[:] = [1] * 100
    monkeypatch.setattr(tuning, "features_of", stopping)
    assert tune(model, images, fidelity=0.99, file=file) == whole
    first = len(runs)
    tune(model, images, fidelity=0.99, file=str(file))
    assert len(runs) - first == 2, "dense features and the last check alone"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_of_other_images_weights_or_nothing_is_refused(model, images, tmp_path):
    file = tmp_path / "measured.json"
    tune(model, images, mechanism="knn", file=file)
    with pytest.raises(ValueError, match=r"measured.json was measured with images other than now; name another file"):
        tune(model, images + 1, mechanism="knn", file=file)
    with torch.no_grad():
        model.cls_token.add_(1)
    with pytest.raises(ValueError, match="with weights other than now"):
        tune(model, images, mechanism="knn", file=file)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"holds no measurements of regard.tune"):
        tune(model, images, mechanism="knn", file=file)
    with pytest.raises(ValueError, match=r"the folder .*missing does not exist"):
        tune(model, images, mechanism="knn", file=tmp_path / "missing" / "measured.json")


def test_a_stored_measurement_is_not_trusted_for_what_is_returned(model, images, tmp_path):
    file = tmp_path / "measured.json"
    tune(model, images, fidelity=0.9999, mechanism="knn(topk=0.1)", file=file)
    content = json.loads(file.read_text())
    for one in content["measured"]:
        for picture in one["pictures"]:
            picture["cosine"] = 1.0
    file.write_text(to_json(content))
    found = tune(model, images, fidelity=0.9999, mechanism="knn(topk=0.1)", file=file)
    claimed = found.curve[-1]
    assert claimed.setting and cosine_of(model, claimed.setting | {"*": None}, images) < 0.9999
    assert found.best == found.dense and set(found.pattern.values()) == {None}


def test_a_tuning_survives_json_and_prints(model, images):
    found = tune(model, images, fidelity=0.99)
    assert Tuning.from_json(found.to_json()) == found
    lines = str(found).splitlines()
    assert lines[0].startswith("VisionTransformer: 3 of 3 attention modules converted; cosine 0.99")
    assert "(asked for 0.99) on 3 pictures" in lines[0] and "% of the model's FLOPs saved" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == list(found.modules)
    assert json.loads(json.dumps(found.pattern)) == found.pattern
    with pytest.raises(ValueError, match="Tuning: field 'model' is missing"):
        Tuning.from_json("{}")


def test_progress_goes_to_standard_error_and_can_be_silenced(model, images, capsys):
    tune(model, images, fidelity=0.01, show_progress=True)
    said = capsys.readouterr()
    assert said.out == "" and "9 of 9 steps: cosine 0." in said.err
    tune(model, images, fidelity=0.01)
    assert capsys.readouterr().err == ""


def test_fused_encoder_layers_are_counted(images):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 32, 14, 14)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2)

        def forward(self, x):
            return self.encoder(self.patches(x).flatten(2).mT)

    model, enabled = Encoder().eval(), torch.backends.mha.get_fastpath_enabled()
    found = tune(model, images, fidelity=0.01)
    attention = 2 * 2 * 64 * 64 * 32 * 2 * 3  # two layers, two products of 64 x 64 x 32, three pictures
    assert found.dense.flops > attention
    assert len(found.best.setting) == 2 and found.best.flops < found.dense.flops
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_compiled_models_are_tuned_within(model, images):
    found = tune(torch.compile(model), images, fidelity=0.01)
    assert found.model == "VisionTransformer" and len(found.best.setting) == 3


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"fidelity": 0.0}, ValueError, r"fidelity: expected a number in \(0, 1\], such as 0.995, got 0.0"),
        ({"fidelity": 99.5}, ValueError, "fidelity: .* got 99.5"),
        ({"fidelity": True}, ValueError, "fidelity: .* got True"),
        ({"fidelity": math.nan}, ValueError, "fidelity: .* got nan"),
        ({"measure": "cosin"}, ValueError, "measure: unknown name 'cosin'; known: cosine"),
        ({"mechanism": []}, ValueError, "mechanism: no candidate given"),
        ({"mechanism": 3}, TypeError, "mechanism: expected a mechanism, its text or a sequence of them"),
        ({"mechanism": "nearest"}, ValueError, "mechanism: unknown name 'nearest'"),
        ({"mechanism": ["knn", "knn(topk=0.5)"]}, ValueError, r"mechanism: knn\(topk=0.5\) is given twice"),
        ({"where": "block.0"}, ValueError, "where: no attention module is named 'block.0'; the nearest: 'blocks.0"),
        ({"images": []}, ValueError, "images: there are none"),
        ({"images": 3}, TypeError, "images: expected a tensor or batches of them, got int"),
        ({"images": ["a.jpg"]}, TypeError, "images: expected tensors, got str"),
        (
            {"images": torch.ones(3, 112, 112)},
            ValueError,
            r"images: expected \(B, channels, height, width\), got shape",
        ),
        ({"images": torch.ones(1, 3, 64, 64)}, ValueError, "images: VisionTransformer fails on images 1 x 3 x 64 x 64"),
        ({"images": torch.full((1, 3, 112, 112), math.nan)}, FloatingPointError, "dense_features: .* NaN or infinite"),
    ],
)
def test_bad_arguments_are_named_and_the_model_is_left(model, images, options, error, says):
    attributes = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(error, match=f"^{says}"):
        tune(model, options.pop("images", images), **options)
    assert [dict(vars(module)) for module in model.modules()] == attributes


def test_models_that_cannot_be_converted_are_refused(model, images):
    with pytest.raises(ValueError, match="model: Conv2d has no attention"):
        tune(nn.Conv2d(3, 4, 1), images)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        tune(3, images)
    regard.convert(model, "knn")
    with pytest.raises(ValueError, match="model: it is converted already"):
        tune(model, images)

"""The study behind `regard convert` on a tiny trained-like model: its figures, page, pattern, and what it refuses."""

import dataclasses
import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import regard
import regard.benchmark
from regard.conversion import compare_models, features_of, record_attention
from regard.mixers import KNN, Dense, Multipole
from regard.results import ConversionStudy
from regard.studies import ConvertSettings, study_conversion
from regard.studies import conversion as room
from regard.studies.converted_maps import attention_of_query, layer_fidelity, square_grid
from regard.studies.photographs import installed_photographs
from regard.studies.pretrained import build_pretrained, copy_sharing_weights, pixels_of, read_picture
from regard.studies.settings import SettingsError

MODEL, SIZE = "vit_tiny_conversion_test", 64
HALF, TENTH = "knn(topk=0.5)", "knn(topk=0.1)"


@timm.models.register_model
def vit_tiny_conversion_test(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **options):
    small = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3, "img_size": 32}
    return timm.models.build_model_with_cfg(
        timm.models.VisionTransformer,
        MODEL,
        pretrained,
        pretrained_cfg={"input_size": (3, 32, 32), "num_classes": 3, "classifier": "head"},
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=timm.models.vision_transformer.checkpoint_filter_fn,
        **{**small, **options},
    )


@timm.models.register_model
def vit_fixed_conversion_test(img_size=None, **options):
    if img_size is not None:
        raise TypeError("got an unexpected keyword argument 'img_size'")
    return vit_tiny_conversion_test(**options)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    weights = {name: 4 * tensor.contiguous() for name, tensor in timm.create_model(MODEL).state_dict().items()}
    save_file(weights, folder / "w.safetensors")
    (folder / "photos").mkdir()
    for i in range(4):
        pixels = torch.randint(0, 256, (80, 100, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(folder / "photos" / f"p{i}.png")
    return folder


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    """A measuring process does not know this file's model; the memory itself is tested in tests/benchmark."""

    def peaks(jobs, **_):
        assert all(room.prepare_forward(**job.arguments)()[0].shape == (1, 3) for job in jobs)
        return [regard.benchmark.Peak(10**6 * (i + 1)) for i in range(len(jobs))]

    monkeypatch.setattr(room, "measure_peaks", peaks)


@pytest.fixture
def settings(inputs, tmp_path):
    def make(**changes):
        given = {"images": inputs / "photos", "checkpoint": inputs / "w.safetensors", "size": SIZE, "pictures": 2}
        given |= {"mechanism": (HALF, TENTH), "seconds": 0.05, "out": tmp_path / "out"}
        return ConvertSettings(MODEL, **{**given, **changes})

    return make


def run(settings):
    return study_conversion(settings, show_progress=False)


def test_every_model_is_measured_beside_the_dense_one(settings, tmp_path):
    study = run(settings(per_layer=True))
    assert [one.name for one in study.models] == ["dense", HALF, TENTH]
    dense, half, tenth = study.models
    assert dense.fidelity is None and dense.record is None and dense.speed == 1.0
    assert half.fidelity.pictures == 2 and half.fidelity.top1_agreement is not None
    assert tenth.fidelity.cosine.mean < half.fidelity.cosine.mean < 1.0
    assert tenth.flops < half.flops < dense.flops
    assert [one.peak_memory for one in study.models] == [10**6, 2 * 10**6, 3 * 10**6]
    assert all(0 < one.seconds_low <= one.seconds <= one.seconds_high for one in study.models)
    assert [len(one.record.converted) for one in study.models[1:]] == [2, 2]
    assert set(half.layers) == {"blocks.0.attn", "blocks.1.attn"}
    assert all(tenth.layers[name] < half.layers[name] < 1 for name in half.layers)
    assert study.settings["tokens"] == 65 and study.settings["num_prefix_tokens"] == 1
    assert ConversionStudy.from_json((tmp_path / "out" / "convert.json").read_text()) == study
    assert not list((tmp_path / "out").glob("*.part"))


def test_the_figures_are_those_of_a_model_converted_by_hand(settings, inputs):
    study = run(settings(mechanism=(HALF,)))
    dense = build_pretrained(MODEL, checkpoint=inputs / "w.safetensors", size=SIZE)
    other = copy_sharing_weights(dense)
    regard.convert(other, HALF)
    pictures = [read_picture(dense, inputs / "photos" / f"p{i}.png", SIZE) for i in (0, 2)]
    assert study.models[1].fidelity == compare_models(dense, other, pictures)


def test_photographs_show_maps_and_losses(settings):
    study = run(settings())
    assert [photo.name for photo in study.photos] == ["p0", "p2"]
    for photo in study.photos:
        assert [one.mechanism for one in photo.maps] == ["dense", HALF, TENTH]
        for one in photo.maps:
            weights = torch.tensor(one.weights)
            assert weights.shape == (8, 8) and 0 < weights.sum() <= 1 + 1e-4
        lost = [torch.tensor(photo.losses[name]).mean() for name in (HALF, TENTH)]
        assert len(photo.losses[HALF]) == 8 and 0 < lost[0] < lost[1]
        assert len(photo.pixels) == SIZE and len(photo.pixels[0][0]) == 3


def test_the_page_is_whole_and_asks_nothing_of_the_network(settings, tmp_path):
    run(settings(tune=0.9, per_layer=True))
    page = (tmp_path / "out" / "convert.html").read_text()
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert links and all(link.startswith(("data:", "#")) for link in links)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[:3] == ["Speed, memory, fidelity", "Tuned, layer by layer", "Who looks at whom"]
    assert headings[3:6] == ["Where the features change", "Each layer alone", "What was converted"]
    assert f"regard convert {MODEL} --images photos --checkpoint w.safetensors --mechanism" in page
    assert str(tmp_path) not in page, "no paths of this machine"


def test_a_tuned_pattern_is_saved_and_gives_the_fidelity_told(settings, inputs, tmp_path):
    study = run(settings(tune=0.99, save=tmp_path / "pattern.json"))
    pattern = json.loads((tmp_path / "pattern.json").read_text())
    assert pattern == study.tuning.pattern and set(pattern) == {"blocks.0.attn", "blocks.1.attn"}
    assert study.models[-1].name == "tuned" and study.models[-1].fidelity == study.tuning.best.fidelity.__class__(
        **{**vars(study.tuning.best.fidelity), "top1_agreement": study.models[-1].fidelity.top1_agreement}
    )
    assert study.models[-1].fidelity.cosine.mean >= 0.99
    assert any("chosen on these very photographs" in note for note in study.notes)
    model = build_pretrained(MODEL, checkpoint=inputs / "w.safetensors", size=SIZE)
    if any(pattern.values()):
        assert len(regard.convert(model, pattern).converted) == len(study.tuning.best.setting)


def test_one_mechanism_is_saved_without_tuning(settings, tmp_path):
    run(settings(mechanism=(HALF,), save=tmp_path / "pattern.json"))
    assert json.loads((tmp_path / "pattern.json").read_text()) == {"blocks.0.attn": HALF, "blocks.1.attn": HALF}


def test_tuning_resumes_in_the_same_folder(settings, tmp_path):
    first = run(settings(tune=0.99))
    file = tmp_path / "out" / "tuning.json"
    written = file.stat().st_mtime_ns
    assert run(settings(tune=0.99)).tuning == first.tuning
    assert file.stat().st_mtime_ns == written, "nothing was measured again"
    with pytest.raises(SettingsError, match=r"^out: file: .*tuning.json was measured with images other than now"):
        run(settings(tune=0.99, pictures=3))


def test_random_weights_and_installed_photographs_are_told(settings):
    study = run(settings(checkpoint=None, random_weights=True, images=None, pictures=1, mechanism=()))
    assert [one.name for one in study.models] == ["dense", "multipole"]
    assert any("weights are random" in note for note in study.notes)
    assert any("pass --images FOLDER" in note for note in study.notes)
    assert study.settings["photographs"] == ["grace_hopper"]
    assert all(path.is_file() for path in installed_photographs())


def test_a_model_keeps_its_own_size(settings):
    assert run(settings(size=None, mechanism=(HALF,))).settings["size"] == 32


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mechanism": ("nearest",)}, "mechanism: unknown name 'nearest'"),
        ({"mechanism": ("knn", HALF)}, r"mechanism: knn\(topk=0.5\) is given twice"),
        ({"mechanism": ("dense",)}, "mechanism: dense attention is always measured"),
        ({"images": "no/such/folder"}, "images: no/such/folder cannot be read"),
        ({"images": "."}, r"images: .* holds no photograph \(.bmp"),
        ({"checkpoint": "no.safetensors"}, "checkpoint: no.safetensors is no file"),
        ({"checkpoint": "photos/p0.png"}, "checkpoint: .*p0.png does not fit"),
        ({"checkpoint": None}, "checkpoint: none are published for vit_tiny_conversion_test that timm could fetch"),
        ({"save": "no/such/folder/pattern.json", "tune": 0.9}, "save: there is no folder no/such/folder"),
        ({"device": "toaster"}, "device: "),
    ],
)
def test_what_cannot_be_obeyed_is_named_before_anything_is_written(
    settings, inputs, tmp_path, changes, says, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, value in changes.items():
        if value is not None and name in ("images", "checkpoint", "save"):
            changes = {**changes, name: type(inputs)(value) if value != "photos/p0.png" else inputs / value}
    with pytest.raises(SettingsError, match=f"^{says}"):
        run(settings(**changes))
    assert not list((tmp_path / "out").glob("*"))


def test_a_size_that_the_model_refuses_is_named(settings):
    with pytest.raises(SettingsError, match=r"^size: Input height \(64\) doesn't match model \(32\)"):
        run(dataclasses.replace(settings(), model="vit_fixed_conversion_test"))


def test_a_model_without_attention_and_an_unknown_one(settings):
    with pytest.raises(SettingsError, match="^model: unknown model 'vit_smal'; nearest known"):
        study_conversion(ConvertSettings("vit_smal"), show_progress=False)
    none = ConvertSettings(
        "resnet18", images=settings().images, random_weights=True, size=32, out=settings().out, pictures=1
    )
    with pytest.raises(SettingsError, match="^model: model: ResNet has no attention|^model: ResNet has no attention"):
        run(none)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tune": 1.5}, r"tune: expected a cosine in \(0, 1\]"),
        ({"size": 0}, "size: expected a whole number of at least 1"),
        ({"pictures": True}, "pictures: "),
        ({"mechanism": "knn"}, "mechanism: expected a sequence"),
        ({"random_weights": True}, "random_weights: a checkpoint is given"),
        ({"save": "p.json"}, "save: which of 2 mechanisms"),
        ({"seconds": 0.0}, "seconds: "),
    ],
)
def test_settings_out_of_range_are_named(settings, changes, says):
    with pytest.raises(SettingsError, match=f"^{says}"):
        settings(**changes)


def test_what_timm_wanted_is_told_without_internet(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("regard.studies.pretrained.create_model", offline)
    with pytest.raises(SettingsError) as told:
        build_pretrained("vit_small_patch14_dinov2")
    assert told.value.setting == "checkpoint"
    for word in ("model.safetensors", "timm/vit_small_patch14_dinov2", "https://", "--checkpoint FILE"):
        assert word in told.value.problem


@pytest.mark.parametrize("mechanism", [Dense(), KNN(0.3), Multipole(num_clusters=8, near=2)])
def test_the_weights_of_a_query_mix_the_values_to_the_mechanisms_output(mechanism, inputs):
    model = build_pretrained(MODEL, checkpoint=inputs / "w.safetensors", size=SIZE)
    picture = read_picture(model, inputs / "photos" / "p1.png", SIZE)
    call = record_attention(model, picture)[-1]
    options = {"num_prefix_tokens": 1, "grid_size": (8, 8)}
    weights = attention_of_query(mechanism, call, 20, **options)
    assert weights.shape == (65,) and weights.sum().item() == pytest.approx(1, abs=1e-5)
    value = torch.randn(1, 1, 65, 1, generator=torch.Generator().manual_seed(0)).expand_as(call.value).contiguous()
    output = mechanism.attend(call.query, call.key, value, **options, **call.options)
    assert (weights @ value[0, 0, :, 0]).item() == pytest.approx(output[0, :, 20, 0].mean().item(), abs=1e-5)


def test_layers_alone_are_perfect_where_all_keys_are_kept(inputs):
    model = build_pretrained(MODEL, checkpoint=inputs / "w.safetensors", size=SIZE)
    picture = read_picture(model, inputs / "photos" / "p1.png", SIZE)
    found = layer_fidelity(model, picture, {"all": {"blocks.1.attn": KNN(1.0)}}, 1)
    assert found == {"all": {"blocks.1.attn": pytest.approx(1.0)}}


def test_pixels_come_back_from_a_picture(inputs):
    model = build_pretrained(MODEL, checkpoint=inputs / "w.safetensors", size=80)
    with Image.open(inputs / "photos" / "p1.png") as image:
        middle = image.crop((10, 0, 90, 80))
        expected = torch.from_numpy(np.array(middle)).permute(2, 0, 1)
    assert torch.equal(pixels_of(model, read_picture(model, inputs / "photos" / "p1.png", 80)), expected)


def test_a_copy_shares_weights_and_converts_by_itself(inputs):
    model = build_pretrained(MODEL, checkpoint=inputs / "w.safetensors", size=SIZE)
    other, picture = copy_sharing_weights(model), torch.randn(1, 3, SIZE, SIZE)
    before = features_of(model, picture).tokens
    regard.convert(other, TENTH)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(features_of(model, picture).tokens, before)
    assert not torch.equal(features_of(other, picture).tokens, before)


def test_squares_alone_have_a_grid():
    assert square_grid(65, 1) == (8, 8)
    assert square_grid(66, 1) is None and square_grid(1, 1) is None

"""Results of whole calls: pixel range, safety verdicts, sizes, missing packages."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.deepfloyd_if.watermark import IFWatermarker
from PIL import Image

from jobs.errors import ImageFailed, ModelUnavailable
from pipelines.families.family import REFUSED
from pipelines.families.whole_call import WholeCall
from pipelines.families.whole_output import pictures, refused
from pipelines.loading.packages import missing_packages
from pipelines.pixels import check_pixels
from pipelines.placements.family_pipeline import FamilyPipeline
from tests.pipelines.classes.guard import check, own
from tests.pipelines.classes.transformers import BUILDERS as TRANSFORMERS
from tests.pipelines.classes.unets import BUILDERS as UNETS
from tests.pipelines.serving import ask, begin

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize(
    ("low", "high", "reason"),
    [
        (-1.0, 1.0, "from -1 to 1"),
        (0.0, 1.01, "from 0 to 1.01"),
        (0.0, 255.0, "from 0 to 255"),
        (0.0, torch.nan, "NaN"),
        (-torch.inf, 1.0, "infinite"),
        (0.0, torch.inf, "infinite"),
    ],
)
def test_pixels_out_of_range_are_refused(low, high, reason):
    pixels = torch.full((3, 8, 8), 0.5)
    pixels[0, 0, 0], pixels[1, 1, 1] = low, high
    with pytest.raises(ImageFailed, match=reason):
        check_pixels(pixels)


def test_pixels_that_round_into_the_range_pass():
    check_pixels(torch.tensor([-0.001, 0.0, 1.0, 1.001]))


class Output:
    def __init__(self, **fields):
        vars(self).update(fields)


BLUE = np.zeros((4, 6, 3), np.float32) + np.array([0, 0, 1], np.float32)
TENSOR = torch.from_numpy(BLUE).permute(2, 0, 1)
PIL_IMAGE = Image.fromarray((BLUE * 255).astype("uint8"))


@pytest.mark.parametrize(
    "output",
    [
        Output(images=[BLUE]),
        Output(images=BLUE[None]),
        Output(image=BLUE[None]),
        Output(images=None, image=[PIL_IMAGE]),
        Output(rgb=[PIL_IMAGE], depth=[None]),
        Output(frames=[[PIL_IMAGE]]),
        Output(frames=BLUE[None, None]),
        Output(images=[PIL_IMAGE.convert("RGBA")]),
        Output(images=(BLUE[None] * 255).astype("uint8")),
        Output(images=TENSOR[None]),
        ([PIL_IMAGE], [False]),
    ],
)
def test_pictures_are_read_from_any_output_format(output):
    [picture] = pictures(output, "Some", 1)
    assert torch.equal(picture, TENSOR)


def test_a_grey_picture_has_three_equal_channels():
    [picture] = pictures(Output(images=[np.full((4, 6), 0.25, np.float32)]), "Some", 1)
    assert torch.equal(picture, torch.full((3, 4, 6), 0.25))


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (Output(audios=[]), "returned no images"),
        (Output(images=[BLUE, BLUE]), "returned 2 images for 1"),
        (Output(frames=[[PIL_IMAGE] * 3]), "returned 3 frames"),
        (Output(images=np.zeros((1, 4, 6, 5))), "not RGB"),
    ],
)
def test_the_error_for_a_non_picture_describes_it(output, reason):
    with pytest.raises(ImageFailed, match=reason):
        pictures(output, "Some", 1)


def test_every_name_of_a_safety_verdict_is_respected():
    assert refused(Output(nsfw_content_detected=[False, True]), 2) == [False, True]
    assert refused(Output(nsfw_detected=[True], watermark_detected=None), 1) == [True]
    assert refused(Output(nsfw_detected=[False], watermark_detected=[True]), 1) == [True]
    assert refused(Output(images=[]), 2) == [False, False]


@pytest.fixture
def deepfloyd():
    return UNETS["IFPipeline"]()


@pytest.mark.parametrize(("nsfw", "watermark"), [(True, False), (False, True)])
def test_ifs_safety_checker_is_respected(deepfloyd, monkeypatch, nsfw, watermark):
    calls = []

    def judge(image, device, dtype):
        calls.append(image.shape)
        return image, [nsfw], [watermark]

    monkeypatch.setattr(deepfloyd, "run_safety_checker", judge)
    pipeline = FamilyPipeline(WholeCall(deepfloyd))
    sample = begin(pipeline, ask(steps=2))
    pipeline.step([sample])
    assert calls == [(1, 64, 64, 3)]
    assert sample.error == REFUSED


def test_if_keeps_its_watermark(deepfloyd):
    plain = own(deepfloyd, ask(seed=3, steps=2))
    deepfloyd.watermarker = IFWatermarker()
    with torch.no_grad():
        deepfloyd.watermarker.watermark_image.fill_(200)
    check(deepfloyd)
    assert not np.array_equal(plain, own(deepfloyd, ask(seed=3, steps=2)))


def test_nan_under_a_watermark_is_an_error_and_not_black(deepfloyd, monkeypatch):
    deepfloyd.watermarker = IFWatermarker()

    def spoil(image, device, dtype):
        return np.full_like(image, np.nan), [False], [False]

    monkeypatch.setattr(deepfloyd, "run_safety_checker", spoil)
    pipeline = FamilyPipeline(WholeCall(deepfloyd))
    with pytest.raises(ImageFailed, match="NaN"):
        pipeline.step([begin(pipeline, ask(steps=2))])


def test_a_pipeline_that_changes_sizes_lists_those_it_makes():
    pipeline = FamilyPipeline(WholeCall(TRANSFORMERS["HiDreamImagePipeline"]()))
    good = begin(pipeline, ask(steps=2))
    pipeline.step([good])
    assert (good.error, pipeline.card.sizes) == (None, None)
    wide = ask(steps=2, width=128)
    sample = begin(pipeline, wide)
    pipeline.step([sample])
    assert "HiDreamImagePipeline returned" in sample.error
    assert "instead of 128x64" in sample.error
    assert pipeline.card.sizes == ((64, 64),)
    with pytest.raises(ImageFailed, match="instead of 128x64"):
        begin(pipeline, wide)


def test_a_missing_package_is_named_with_its_install_command():
    assert missing_packages(ValueError("nothing of that kind")) is None
    assert "`pip install 'imagemill[vision]'`" in missing_packages(
        ImportError("\nFooProcessor requires the Torchvision library but it was not found")
    )
    absent = ModuleNotFoundError("No module named 'peft'", name="peft")
    assert missing_packages(absent) == "this model needs peft: `pip install 'peft'`"


def test_an_unrelated_name_error_is_not_changed(tiny_pipe, monkeypatch):
    pipe = tiny_pipe("SD15")

    def broken(*arguments, **named):
        raise NameError("name 'typo' is not defined")

    monkeypatch.setattr(pipe, "check_inputs", broken)
    pipeline = FamilyPipeline(WholeCall(pipe))
    with pytest.raises(NameError, match="typo"):
        pipeline.step([begin(pipeline, ask(steps=2))])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("WanImageToVideoPipeline", "needs image"),
        ("FluxFillPipeline", "needs image"),
        ("HeliosPipeline", "can't make a single frame"),
        ("StableDiffusionImg2ImgPipeline", "takes no width"),
        ("WuerstchenPriorPipeline", "not images"),
    ],
)
def test_a_class_that_cannot_serve_is_refused_before_it_is_loaded(tmp_path, name, reason):
    from pipelines.load import load_pipeline
    from tests.pipelines.serving import entry

    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{name}"}}')
    with pytest.raises(ModelUnavailable, match=f"model 'tiny': {name} .*{reason}"):
        load_pipeline(entry(tmp_path), "cpu")

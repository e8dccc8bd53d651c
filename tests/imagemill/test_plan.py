"""`imagemill plan`: what it tells of real configurations without weights, and of our model."""

import json
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from imagemill.cli import app
from imagemill.errors import InvalidInput
from imagemill.plan import devices_of
from jobs.catalog import load_catalog
from tests.imagemill.configs import save_configs

DEMO = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return save_configs(tmp_path_factory.mktemp("models") / "FLUX.1-dev")


@cache
def run(*arguments, **variables):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env=variables)


def options(flux, *arguments):
    done = run(flux, *arguments, "--json")
    assert done.exit_code == 0, done.output
    return {option["name"]: option for option in json.loads(done.stdout)["options"]}


def test_sizes_of_flux_come_from_its_configs_alone(flux):
    told = json.loads(run(flux, "--devices", "80GB", "--json").stdout)
    weights = {c["name"]: c["weights"] for c in told["components"]}
    assert weights["transformer"] == 2 * 11_901_408_320  # FLUX.1-dev's parameters, in bfloat16
    assert weights["text_encoder_2"] == 2 * 4_762_310_656  # T5-XXL's encoder
    assert told["image"] == "1024x1024 in bfloat16, 4096 image tokens"


@pytest.mark.parametrize(
    ("devices", "fit", "not_fit"),
    [
        ("80GB", {"replica", "split", "split, unload"}, set()),
        ("2x24GB", {"split", "split, unload", "pipelined, 2 stages"}, {"replica"}),
        ("16GB", {"split", "split, unload"}, {"replica"}),
        (
            "2x80GB",
            {"replica", "context_parallel, ulysses 2", "context_parallel, ring 2"},
            set(),
        ),
        ("1x24GB+1x80GB", {"replica", "split"}, {"context_parallel, ulysses 2"}),
    ],
)
def test_what_fits_which_devices(flux, devices, fit, not_fit):
    found = options(flux, "--devices", devices)
    assert {name for name in fit if not found[name]["fits"]} == set()
    assert {name for name in not_fit if found[name]["fits"]} == set()
    for option in found.values():
        assert option["arithmetic"] and bool(option["catalog"]) == option["fits"]


def test_a_small_device_is_told_what_comes_over_the_link(flux):
    found = options(flux, "--devices", "16GB")
    assert " come for " in found["split, unload"]["speed"]
    assert "loading an image in a backlog of 64" in found["split, unload"]["speed"]


def test_what_comes_from_the_disk_comes_slower(flux):
    memory, disk = (
        options(flux, "--devices", "16GB", "--cpu", cpu)["split, unload"]["speed"]
        for cpu in ("64GB", "1GB")
    )
    assert "of them from the disk" in disk and "disk" not in memory
    assert float(disk.partition("x")[0]) < float(memory.partition("x")[0])


@pytest.mark.parametrize(
    ("devices", "ways"),
    [
        ("2x80GB", {"ulysses 2", "ring 2", "tensor 2"}),
        ("3x80GB", {"ulysses 2", "ring 2", "tensor 2", "ulysses 3", "ring 3", "tensor 3"}),
        ("4x80GB", {"ulysses 4", "ring 4", "tensor 4", "ring 2 x ulysses 2"}),
    ],
)
def test_every_way_to_share_an_image_out_is_listed(flux, devices, ways):
    found = options(flux, "--devices", devices)
    names = {f"context_parallel, {way}" for way in ways}
    assert names <= found.keys()
    assert not any("cfg" in name for name in found)  # one row: guidance is embedded
    for name in names:
        assert found[name]["speed"].startswith("at most ")
        for line in name.removeprefix("context_parallel, ").split(" x "):
            assert line.replace(" ", " = ") in found[name]["catalog"].splitlines()


def test_under_guidance_rows_are_shared_out_too():
    found = options("demo", "--devices", "4x24GB")
    assert "2x for one guided image" in found["context_parallel, cfg 2"]["speed"]
    assert "cfg = 2\nulysses = 2" in found["context_parallel, cfg 2 x ulysses 2"]["catalog"]


def test_tensor_parallelism_is_for_what_is_too_large(flux):
    found = options(flux, "--devices", "4x24GB")
    assert found["context_parallel, tensor 4"]["fits"]
    assert not found["context_parallel, ulysses 4"]["fits"]


def test_what_the_entry_check_refuses_is_not_offered():
    """A ring needs half precision on CUDA; the reason is told once."""
    rings = [o for name, o in options("demo", "--devices", "4x24GB").items() if "ring" in name]
    assert [ring["fits"] for ring in rings] == [False]
    assert "log-sum-exp" in rings[0]["arithmetic"]


def test_a_guided_ring_of_a_model_with_masks_is_offered(tmp_path):
    config = {"_class_name": "QwenImageTransformer2DModel", "num_layers": 2}
    index = {
        "_class_name": "QwenImagePipeline",
        "transformer": ["diffusers", config["_class_name"]],
    }
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    found = options(tmp_path, "--devices", "2x80GB")
    assert found["context_parallel, ring 2"]["fits"] and found["context_parallel, cfg 2"]["fits"]
    kernel = 'attention_backend = "_native_cudnn"'  # torch's own choice cannot merge a ring's parts
    assert kernel in found["context_parallel, ring 2"]["catalog"]
    assert "attention_backend" not in found["context_parallel, cfg 2"]["catalog"]


@pytest.mark.parametrize("devices", ["2x24GB", "4x80GB"])
def test_the_lines_to_paste_are_a_catalog(flux, devices, tmp_path):
    catalog = tmp_path / "models.toml"
    lines = [o["catalog"] for o in options(flux, "--devices", devices).values() if o["catalog"]]
    catalog.write_text("\n\n".join(lines))
    models = load_catalog(catalog)
    assert len(models) == len(lines) > 2
    assert all(model.local and Path(model.path) == flux for model in models)


def test_a_model_of_the_catalog(tmp_path):
    done = run("demo", "--devices", "2x24GB", COLUMNS="120")
    assert done.exit_code == 0, done.output
    assert "[models.demo-replica]" in done.stdout
    assert "max_sequence_length = 77" in done.stdout


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_tables_keep_within_the_terminal(flux, columns):
    done = run(flux, "--devices", "4x80GB", COLUMNS=columns)
    tables = done.stdout.partition("For models.toml")[0]
    assert max(map(len, tables.splitlines())) <= int(columns)
    assert "…" not in tables


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "--devices", "24GB"], "unknown model 'nothing'"),
        (["demo", "--devices", "two"], "--devices 'two' is none such as 2x24GB"),
        (["demo", "--devices", "0x24GB"], "--devices '0x24GB' is none such as"),
        (["demo", "--devices", "24GB", "--cpu", "much"], "'much' is no size such as '16GB'"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, said):
    done = run(*arguments)
    assert done.exit_code == 2
    assert said in done.output
    assert "Traceback" not in done.output


def test_a_model_that_fits_nowhere_is_one_sentence(flux):
    done = run(flux, "--devices", "1GB", "--cpu", "1GB")
    assert done.exit_code == 2
    assert "fits nowhere" in done.output and "23.8 GB" in done.output


def test_devices_as_they_are_written():
    assert devices_of("2x24GB") == [24 * 10**9] * 2
    assert devices_of("1x24GB+1 x 80 GiB") == [24 * 10**9, 80 * 2**30]
    for text in ("", "x", "24", "1e9GB", "99x24GB", "24GB+"):
        with pytest.raises(InvalidInput):
            devices_of(text)

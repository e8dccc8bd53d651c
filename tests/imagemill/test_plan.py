"""`imagemill plan` for real configs without weights, and for the bundled model."""

import json
import math
import shutil
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from typer.testing import CliRunner

from imagemill.cli import app
from imagemill.client.errors import InvalidInput
from imagemill.commands.plan import devices_of
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


def test_flux_sizes_come_from_its_configs_alone(flux):
    survey = json.loads(run(flux, "--devices", "80GB", "--json").stdout)
    weights = {c["name"]: c["weights"] for c in survey["components"]}
    assert weights["transformer"] == 2 * 11_901_408_320  # FLUX.1-dev's parameters, in bfloat16
    assert weights["text_encoder_2"] == 2 * 4_762_310_656  # T5-XXL's encoder
    assert survey["image"] == "1024x1024 in bfloat16, 4096 image tokens"


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


def test_a_small_device_shows_the_transfer_time(flux):
    found = options(flux, "--devices", "16GB")
    assert " copied for " in found["split, unload"]["speed"]
    assert "per image with a backlog of 64" in found["split, unload"]["speed"]


def test_weights_from_the_disk_are_slower(flux):
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
def test_every_way_to_parallelize_an_image_is_listed(flux, devices, ways):
    found = options(flux, "--devices", devices)
    names = {f"context_parallel, {way}" for way in ways}
    assert names <= found.keys()
    assert not any("cfg" in name for name in found)  # one row: guidance is embedded
    for name in names:
        assert found[name]["speed"].startswith("at most ")
        for line in name.removeprefix("context_parallel, ").split(" x "):
            assert line.replace(" ", " = ") in found[name]["catalog"].splitlines()


def test_guidance_rows_can_be_parallelized():
    found = options("demo", "--devices", "4x24GB")
    assert "2x for one guided image" in found["context_parallel, cfg 2"]["speed"]
    assert "cfg = 2\nulysses = 2" in found["context_parallel, cfg 2 x ulysses 2"]["catalog"]


def test_tensor_parallelism_fits_larger_models(flux):
    found = options(flux, "--devices", "4x24GB")
    assert found["context_parallel, tensor 4"]["fits"]
    assert not found["context_parallel, ulysses 4"]["fits"]


def test_what_the_entry_check_refuses_does_not_fit():
    """A ring needs half precision on CUDA; the reason is given once."""
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
    kernel = 'attention_backend = "_native_cudnn"'  # torch's own choice can't merge a ring's parts
    assert kernel in found["context_parallel, ring 2"]["catalog"]
    assert "attention_backend" not in found["context_parallel, cfg 2"]["catalog"]


@pytest.mark.parametrize("devices", ["2x24GB", "4x80GB"])
def test_the_printed_lines_are_a_valid_catalog(flux, devices, tmp_path):
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
def test_the_tables_fit_the_terminal(flux, columns):
    done = run(flux, "--devices", "4x80GB", COLUMNS=columns)
    tables = done.stdout.partition("For models.toml")[0]
    assert max(map(len, tables.splitlines())) <= int(columns)
    assert "…" not in tables


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "--devices", "24GB"], "unknown model 'nothing'"),
        (["no/where", "--devices", "24GB"], "'no/where' isn't in the local cache, and the hub"),
        (["demo", "--devices", "two"], "invalid --devices 'two': expected something like 2x24GB"),
        (["demo", "--devices", "0x24GB"], "invalid --devices '0x24GB': expected"),
        (["demo", "--devices", "24GB", "--cpu", "much"], "invalid size 'much'"),
    ],
)
def test_an_error_is_one_sentence(arguments, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = run(*arguments)
    assert done.exit_code == 2
    assert said in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("devices", "use"),
    [
        ("2x80GB", "Use replica: the whole model fits on one device"),
        ("2x24GB", "Use split: "),
        ("32GB", "Use split, unload: the model fits if its stages are loaded in turn"),
        ("16GB", "Use split, unload: every option that fits copies weights to the device"),
    ],
)
def test_the_last_line_says_what_to_use(flux, devices, use):
    done = run(flux, "--devices", devices)
    assert done.stdout.splitlines()[-1].startswith(use)


@pytest.mark.parametrize(("scheme", "rows"), [("int8", 5), ("fp8", 4)])
def test_quantization_is_counted_and_printed(flux, tmp_path, monkeypatch, scheme, rows):
    monkeypatch.setattr("pipelines.loading.quantization.find_spec", lambda name: name)
    catalog = tmp_path / "models.toml"
    lines = (f'path = "{flux}"', f'quantization = "{scheme}"', 'attention_backend = "native"')
    catalog.write_text("\n".join(["[models.flux]", *lines]))
    survey = json.loads(run("flux", "--devices", "24GB", "--models", catalog, "--json").stdout)
    [denoiser] = [c for c in survey["components"] if c["name"] == "transformer"]
    with torch.device("meta"):
        config = FluxTransformer2DModel.load_config(flux / "transformer")
        module = FluxTransformer2DModel.from_config(config)
    linear = [m.weight for m in module.modules() if isinstance(m, torch.nn.Linear)]
    whole = 2 * 11_901_408_320
    expected = whole - sum(w.numel() - rows * w.shape[0] for w in linear)
    assert (denoiser["kind"], denoiser["weights"]) == (scheme, expected)
    printed = run("flux", "--devices", "24GB", "--models", catalog).stdout
    assert f"transformer     {scheme}" in printed
    assert f'quantization = "{scheme}"' in printed


def test_what_a_worker_refuses_is_refused(flux, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.loading.quantization.find_spec", lambda name: None)
    catalog = tmp_path / "models.toml"
    catalog.write_text(f'[models.flux]\npath = "{flux}"\nquantization = "int8"')
    done = run("flux", "--devices", "80GB", "--models", catalog)
    assert done.exit_code == 2
    assert "quantization 'int8' needs the package torchao: pip install torchao" in done.output
    catalog = tmp_path / "cache.toml"
    catalog.write_text(f'[models.flux]\npath = "{flux}"\ncache = "taylorseer"')
    done = run("flux", "--devices", "80GB", "--models", catalog)
    assert "cache requires a model that's called whole, but FluxPipeline is stepped" in done.output


def test_a_hub_id_is_planned_from_its_configs_alone(flux, monkeypatch):
    asked = []

    def snapshot(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(flux)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    done = run("labs/FLUX.1-dev", "--devices", "80GB")
    assert done.exit_code == 0, done.output
    assert 'path = "labs/FLUX.1-dev"' in done.stdout
    [(repository, revision, patterns)] = asked
    assert (repository, revision) == ("labs/FLUX.1-dev", None)
    weights = ("model.safetensors", "vae/model.bin", "flux1-dev.gguf")
    assert not any(fnmatch(name, pattern) for name in weights for pattern in patterns)


@pytest.fixture
def flux_file(flux, tmp_path):
    """FLUX.1-dev's transformer as a sparse single file in its authors' format, and its configs."""
    folder = Path(shutil.copytree(flux, tmp_path / "configs"))
    for name in ("text_encoder", "text_encoder_2", "vae"):
        save_file({"weight": torch.zeros(1)}, folder / name / "model.safetensors")
    return folder, sparse(flux_names(), tmp_path / "flux1-dev.safetensors")


def flux_names() -> dict[str, list[int]]:
    """Names and shapes of the file that Black Forest Labs publish, from their flux/model.py."""
    hidden, mlp = 3072, 12288
    shapes = {"img_in": [hidden, 64], "txt_in": [hidden, 4096], "final_layer.linear": [64, hidden]}
    shapes["final_layer.adaLN_modulation.1"] = [2 * hidden, hidden]
    for name, width in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        shapes |= {f"{name}.in_layer": [hidden, width], f"{name}.out_layer": [hidden, hidden]}
    scales = {}
    for block in range(19):
        for side in ("img", "txt"):
            at = f"double_blocks.{block}.{side}"
            shapes |= {f"{at}_mod.lin": [6 * hidden, hidden]}
            shapes |= {f"{at}_attn.qkv": [3 * hidden, hidden], f"{at}_attn.proj": [hidden, hidden]}
            shapes |= {f"{at}_mlp.0": [mlp, hidden], f"{at}_mlp.2": [hidden, mlp]}
            scales |= {f"{at}_attn.norm.{each}_norm.scale": [128] for each in ("query", "key")}
    for block in range(38):
        at = f"single_blocks.{block}"
        shapes |= {f"{at}.linear1": [3 * hidden + mlp, hidden]}
        shapes |= {f"{at}.linear2": [hidden, hidden + mlp], f"{at}.modulation.lin": [9216, hidden]}
        scales |= {f"{at}.norm.{each}_norm.scale": [128] for each in ("query", "key")}
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in shapes.items()} | scales


def sparse(shapes: dict[str, list[int]], path: Path) -> Path:
    """A sparse safetensors file in bfloat16, which takes up no disk space."""
    document, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        document[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(document).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path


def test_a_single_file_is_planned_from_its_header(flux_file, tmp_path):
    folder, file = flux_file
    catalog = tmp_path / "models.toml"
    catalog.write_text(f'[models.f]\npath = "{file.name}"\nconfig = "configs"\n')
    done = run("f", "--devices", "80GB", "--models", catalog, "--json")
    assert done.exit_code == 0, done.output
    survey = json.loads(done.stdout)
    assert {c["name"]: c["weights"] for c in survey["components"]}[
        "transformer"
    ] == 2 * 11_901_408_320
    refused = {o["name"]: o["arithmetic"] for o in survey["options"] if not o["fits"]}
    assert refused == {}
    replica = next(o["catalog"] for o in survey["options"] if o["name"] == "replica")
    assert f'config = "{folder}"' in replica
    survey = json.loads(run("f", "--devices", "2x80GB", "--models", catalog, "--json").stdout)
    refused = {o["name"]: o["arithmetic"] for o in survey["options"] if not o["fits"]}
    assert "is a single file, but pipelined needs" in refused["pipelined"]


def test_a_file_without_configs_names_the_field_for_them(flux_file, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = run(flux_file[1], "--devices", "80GB")
    assert done.exit_code == 2
    assert "those of black-forest-labs/FLUX.1-dev, which it seems to be" in done.output
    assert 'config = "..."' in done.output


def test_a_model_that_fits_nowhere_is_one_sentence(flux):
    done = run(flux, "--devices", "1GB", "--cpu", "1GB")
    assert done.exit_code == 2
    assert "doesn't fit" in done.output and "23.8 GB" in done.output


def test_devices_of():
    assert devices_of("2x24GB") == [24 * 10**9] * 2
    assert devices_of("1x24GB+1 x 80 GiB") == [24 * 10**9, 80 * 2**30]
    for text in ("", "x", "24", "1e9GB", "99x24GB", "24GB+"):
        with pytest.raises(InvalidInput):
            devices_of(text)

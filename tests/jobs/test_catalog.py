"""models.toml: what it may contain, and that every mistake names the entry and the field."""

from pathlib import Path

import pytest

from jobs.catalog import Catalog, Defaults, Limits, Model, load_catalog, problems
from jobs.errors import ConfigurationError, UnknownModel
from jobs.request import MAX_SEED
from tests.jobs.bench import request


def load(folder: Path, text: str) -> Catalog:
    path = folder / "models.toml"
    path.write_text(text)
    return load_catalog(path)


def entry(folder: Path, fields: str) -> Model:
    return load(folder, f'[models.m]\npath = "owner/model"\n{fields}').get("m")


def test_a_minimal_entry_gets_the_defaults(tmp_path: Path) -> None:
    model = entry(tmp_path, "")
    unset = ("width", "height", "steps", "guidance_scale")
    assert model == Model(name="m", path="owner/model", unset=unset)
    assert model.defaults == Defaults(1024, 1024, 28, 3.5, None)
    assert model.limits == Limits(4 * 2**20, 200, 10_000, 30.0, 16, ())
    assert (model.dtype, model.placement, model.workers) == ("bfloat16", "replica", None)


def test_an_entry_can_set_every_field(tmp_path: Path) -> None:
    catalog = load(
        tmp_path,
        """
[models.demo]
path = "./weights"
dtype = "float32"
workers = 2
defaults = { width = 128, height = 64, steps = 8, guidance_scale = 2, negative_prompt = "blur" }
limits = { max_pixels = 65536, max_steps = 100, max_prompts = 9, max_guidance_scale = 7.5, \
multiple = 8, sizes = ["128x64", "64x128"] }
max_sequence_length = 256
compile = true
cuda_graphs = true
quantization = "fp8"
cache = "taylorseer"

[models.flux]
path = "black-forest-labs/FLUX.1-dev"
revision = "main"
variant = "fp16"
placement = "context_parallel"
ring = 2
ulysses = 2
attention_backend = "_native_cudnn"

[models.small]
path = "black-forest-labs/FLUX.1-dev"
placement = "split"
devices = ["cuda:0", "cuda:1"]
max_memory = { "cuda:0" = "16GB", cpu = 1000000 }
unload = true

[models.piped]
path = "x"
placement = "pipelined"
stages = 2
chunks = 3
""",
    )
    assert [model.name for model in catalog] == ["demo", "flux", "small", "piped"]
    demo = catalog.get("demo")
    assert (demo.path, demo.local) == (str(tmp_path / "weights"), True)
    assert demo.defaults == Defaults(128, 64, 8, 2.0, "blur")
    assert demo.limits.sizes == ((128, 64), (64, 128))
    assert (demo.compile, demo.quantization, demo.cache) == (True, "fp8", "taylorseer")
    flux = catalog.get("flux")
    assert (flux.ranks, flux.attention_backend) == (4, "_native_cudnn")
    assert catalog.get("small").max_memory == {"cuda:0": "16GB", "cpu": 1000000}
    assert (catalog.get("piped").stages, catalog.get("piped").chunks) == (2, 3)


def test_a_folder_next_to_the_catalog_is_local(tmp_path: Path) -> None:
    (tmp_path / "demo" / "model").mkdir(parents=True)
    catalog = load(tmp_path, '[models.a]\npath="demo/model"\n[models.b]\npath="demo/other"')
    assert catalog.get("a").path == str(tmp_path / "demo" / "model")
    assert (catalog.get("b").path, catalog.get("b").local) == ("demo/other", False)


def test_files_configs_and_components_are_paths_or_hub_ids(tmp_path: Path) -> None:
    (tmp_path / "flux").mkdir()
    (tmp_path / "ae.safetensors").touch()
    catalog = load(
        tmp_path,
        """
[models.a]
path = "./flux.gguf"
config = "flux"
components = { vae = "ae.safetensors", text_encoder = "a/b/sub", text_encoder_2 = false }
quantization = { text_encoder = "int8", transformer = "fp8" }

[models.b]
path = "city/flux-gguf/flux-Q8_0.gguf"
config = "city/flux"
""",
    )
    a, b = catalog
    assert (a.path, a.local, a.config) == (f"{tmp_path}/flux.gguf", True, f"{tmp_path}/flux")
    assert a.components == {
        "vae": f"{tmp_path}/ae.safetensors",
        "text_encoder": "a/b/sub",
        "text_encoder_2": None,
    }
    assert a.quantization == {"text_encoder": "int8", "transformer": "fp8"}
    assert a.quantization_text == "text_encoder=int8, transformer=fp8"
    assert (b.path, b.local, b.config) == ("city/flux-gguf/flux-Q8_0.gguf", False, "city/flux")
    assert b.quantization_text is None
    assert len({a, b}) == 2  # models are keys


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            "stpes = 1",
            r"models\.m\.stpes is not a known field; expected one of aliases, attention_backend",
        ),
        ("defaults = { step = 1 }", r"models\.m\.defaults\.step is not a known field"),
        ("limits = { size = 1 }", r"models\.m\.limits\.size is not a known field"),
        ('dtype = "int8"', r"models\.m\.dtype must be one of float32, bfloat16, float16"),
        ('compile = "yes"', r"models\.m\.compile must be true or false"),
        ('quantization = "int4"', r"models\.m\.quantization must be one of fp8, int8"),
        ('quantization = { vae = "int4" }', r"models\.m\.quantization\.vae must be one of fp8"),
        ('config = "a/b"', r"models\.m\.config is only allowed if path is a single file"),
        ("components = 1", r"models\.m\.components must be a table such as"),
        ("components = { vae = true }", r"models\.m\.components\.vae must be a string, or false"),
        (
            'components = { vae = "vae" }',
            r"models\.m\.components\.vae 'vae' is neither a folder next",
        ),
        (
            'components = { vae = "a.gguf" }',
            r"models\.m\.components\.vae 'a.gguf' is neither a file",
        ),
        ('cache = "first_block"', r"models\.m\.cache must be one of taylorseer$"),
        ('placement = "cloud"', r"models\.m\.placement must be one of replica"),
        ("workers = 0", r"models\.m\.workers must be an integer of at least 1"),
        ("workers = true", r"models\.m\.workers must be an integer"),
        ("revision = 1", r"models\.m\.revision must be a non-blank string"),
        ("unload = 1", r"models\.m\.unload must be true or false"),
        ('devices = "cuda"', r"models\.m\.devices must be a list"),
        ("defaults = 1", r"models\.m\.defaults must be a table"),
        ("defaults = { guidance_scale = nan }", r"models\.m\.defaults\.guidance_scale must be"),
        ("max_memory = 1", r"models\.m\.max_memory must be a table"),
        (
            'max_memory = { cpu = "lots" }',
            r"models\.m\.max_memory\.cpu must be a number of bytes or",
        ),
        ('limits = { sizes = ["big"] }', r"models\.m\.limits\.sizes has an invalid size 'big'"),
        ("defaults = { steps = 300 }", r"models\.m\.defaults\.steps must be between 1 and 200"),
        ("defaults = { width = 1000 }", r"models\.m\.defaults\.width must be a multiple of 16"),
        (
            "limits = { max_pixels = 256 }\ndefaults = { width = 32, height = 32 }",
            r"models\.m\.defaults\.width and height make 32x32",
        ),
        ("ring = 2", r"models\.m\.ring requires placement 'context_parallel'"),
        ("stages = 2", r"models\.m\.stages requires placement 'pipelined'"),
        ('placement = "context_parallel"', r"models\.m\.ring or ulysses, cfg or tensor must be"),
        ('placement = "pipelined"', r"models\.m\.stages must be 2 or more"),
        (
            'placement = "context_parallel"\ncfg = 2\ndevices = ["cuda:0", "cuda:1", "cuda:2"]',
            r"models\.m\.cfg does not divide the 3 devices",
        ),
    ],
)
def test_a_mistake_names_the_entry_and_the_field(
    tmp_path: Path, fields: str, sentence: str
) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        entry(tmp_path, fields)


@pytest.mark.parametrize(
    ("fields", "degrees"),
    [
        ('devices = ["cuda:0", "cuda:1"]', (1, 2, 1)),
        ('devices = ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]\ncfg = 2', (1, 2, 2)),
        ('devices = ["cuda:0", "cuda:1"]\ncfg = 2', (1, 1, 2)),
        ('devices = ["cuda:0", "cuda:1"]\nring = 2', (2, 1, 1)),
        ("cfg = 2", (1, 1, 2)),
    ],
)
def test_ulysses_is_the_default_way_to_split(
    tmp_path: Path, fields: str, degrees: tuple[int, int, int]
) -> None:
    model = entry(tmp_path, f'placement = "context_parallel"\n{fields}')
    assert (model.ring, model.ulysses, model.cfg) == degrees


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no \\[models.NAME\\] entry"),
        ("[models]", "no \\[models.NAME\\] entry"),
        ("[model.x]", "model is not a known field"),
        ("[models.x", "models.toml: "),
        ("[models.x]", r"models\.x\.path is missing"),
        (
            '[models.x]\npath="a b"',
            r"models\.x\.path 'a b' is neither a folder next to the catalog",
        ),
        ('[models."a:b"]\npath="x"', r"models\.a:b is an invalid name"),
        ("models = 1", "models must be a table"),
    ],
)
def test_an_invalid_file_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        load(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no catalog at .*none\.toml"):
        load_catalog(tmp_path / "none.toml")


def test_an_unknown_model_lists_the_known_ones(tmp_path: Path) -> None:
    catalog = load(tmp_path, '[models.a]\npath="x"\n[models.b]\npath="x"')
    with pytest.raises(UnknownModel, match="known models: a, b"):
        catalog.get("c")
    assert len(catalog) == 2


@pytest.mark.parametrize(
    ("wrong", "pointers"),
    [
        ({}, []),
        ({"width": 100}, ["/width"]),
        ({"width": 8, "height": 0}, ["/width", "/height"]),
        ({"width": 4096}, ["/width"]),
        ({"width": 64, "height": 64}, ["/width"]),
        ({"steps": 0}, ["/steps"]),
        ({"steps": 51}, ["/steps"]),
        ({"guidance_scale": -0.1}, ["/guidance_scale"]),
        ({"guidance_scale": float("nan")}, ["/guidance_scale"]),
        ({"seed": -1}, ["/seed"]),
        ({"seed": MAX_SEED + 1}, ["/seed"]),
        ({"prompt": "x" * 10_001}, ["/prompt"]),
        ({"prompt": "half \ud83d"}, ["/prompt"]),
        ({"negative_prompt": "x" * 10_001}, ["/negative_prompt"]),
        ({"format": "gif"}, ["/format"]),
        ({"steps": 0, "seed": -1, "prompt": "\ud83d"}, ["/prompt", "/steps", "/seed"]),
    ],
)
def test_every_problem_has_a_pointer(wrong: dict, pointers: list[str]) -> None:
    limits = Limits(max_pixels=65536, max_steps=50, sizes=((128, 128), (100, 128), (8, 0)))
    listed = problems(Model("m", "x", limits=limits), request(**wrong), "/prompts/3")
    assert [problem.pointer for problem in listed] == [f"/prompts/3{name}" for name in pointers]


def test_aliases_are_further_names(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(
        '[models.a]\npath = "x/y"\naliases = ["gpt-image-1"]\n[models.b]\npath = "x/z"\n'
    )
    catalog = load_catalog(path)
    assert catalog.get("gpt-image-1").name == "a"
    assert [model.name for model in catalog] == ["a", "b"]


@pytest.mark.parametrize("alias", ["a", "b", "c", "dall-e", "white space"])
def test_ambiguous_and_invalid_aliases_are_refused(tmp_path: Path, alias: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(
        f'[models.a]\npath = "x/y"\naliases = ["{alias}"]\n'
        '[models.b]\npath = "x/z"\naliases = ["c", "dall-e"]\n'
    )
    with pytest.raises(ConfigurationError, match=r"models\.[ab]\.aliases has"):
        load_catalog(path)


def test_a_size_that_is_too_large_names_one_that_fits() -> None:
    (problem,) = problems(
        Model("m", "x", limits=Limits(max_pixels=65536)), request(width=512, height=512), ""
    )
    assert "512x512, more than 65536 pixels; the largest square is 256x256" in problem.detail

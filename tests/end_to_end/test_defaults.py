"""A catalog entry with only a path uses the model's own size, steps and guidance.

The model is SDXL Turbo with a UNet for 128x128 pixels, a size at which warm-up takes seconds.
"""

import io
import json
from pathlib import Path

from PIL import Image

from imagemill.client.clients import Client
from tests import web
from tests.end_to_end.deployment import run, up
from tests.pipelines.published import PUBLISHED, save_published
from tests.pipelines.tiny import save_tiny
from tests.waiting import PATIENCE, wait_until

OWN = {"width": 128, "height": 128, "steps": 4, "guidance_scale": 0.0}


def test_an_entry_with_only_a_path(tmp_path: Path) -> None:
    published = PUBLISHED["sdxl-turbo"]
    tiny = save_tiny(published.builder, tmp_path / "tiny")
    unet = save_published("sdxl-turbo", tiny, tmp_path / "turbo") / "unet" / "config.json"
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"sample_size": 16}))
    models = tmp_path / "models.toml"
    models.write_text('[models.turbo]\npath = "./turbo"\n')
    with up(tmp_path / "data", models) as deployment, Client(deployment.url) as client:

        def defaults() -> dict[str, object]:
            document = web.get(f"{deployment.url}/v1/models/turbo").json()["defaults"]
            return {name: document[name] for name in OWN}

        wait_until(lambda: None not in defaults().values())
        assert defaults() == OWN
        done = run("models", "--server", deployment.url)
        assert "128x128" in done.stdout and "4 steps" in done.stdout
        job = client.submit("turbo", ["a red cat"]).wait(timeout=PATIENCE)
        picture = Image.open(io.BytesIO(job.download(0)))
    assert picture.size == (128, 128)
    recipe = json.loads(picture.info["imagemill"])
    assert {name: recipe[name] for name in OWN} == OWN

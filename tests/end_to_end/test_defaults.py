"""A catalog of nothing but a path: the model's own size, steps and guidance, all the way."""

import io
import json
from pathlib import Path

from PIL import Image

from imagemill.client.clients import Client
from tests import web
from tests.end_to_end import mill as mills
from tests.pipelines.published import PUBLISHED, save_published
from tests.pipelines.tiny import save_tiny
from tests.waiting import PATIENCE, wait_until

OWN = ("width", "height", "steps", "guidance_scale")


def test_an_entry_of_nothing_but_a_path(tmp_path: Path) -> None:
    published = PUBLISHED["sdxl-turbo"]
    tiny = save_tiny(published.builder, tmp_path / "tiny")
    save_published("sdxl-turbo", tiny, tmp_path / "turbo")
    models = tmp_path / "models.toml"
    models.write_text('[models.turbo]\npath = "./turbo"\n')
    expected = {name: getattr(published.expected, name) for name in OWN}
    with mills.up(tmp_path / "data", models) as mill, Client(mill.url) as client:

        def defaults() -> dict[str, object]:
            shown = web.get(f"{mill.url}/v1/models/turbo").json()["defaults"]
            return {name: shown[name] for name in OWN}

        wait_until(lambda: None not in defaults().values())
        assert defaults() == expected
        done = mills.run("models", "--server", mill.url)
        assert "512x512" in done.stdout and "1 step" in done.stdout
        job = client.submit("turbo", ["a red cat"]).wait(timeout=PATIENCE)
        picture = Image.open(io.BytesIO(job.download(0)))
    assert picture.size == (512, 512)
    recipe = json.loads(picture.info["imagemill"])
    assert {name: recipe[name] for name in OWN} == expected

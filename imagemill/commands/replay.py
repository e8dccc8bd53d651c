"""`imagemill replay`: generates an image again from its recipe and compares the pixels.

Compares decoded pixels, because two files may differ in their bytes (for example, in the recipe's
bucket) and still show the same image.
"""

import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops
from rich.console import Console

from imagemill.client import protocol
from imagemill.client.clients import Client
from imagemill.client.errors import InvalidInput
from imagemill.client.file_names import write_file
from imagemill.commands.follow import CANCEL_PATIENCE, Saved, follow
from imagemill.commands.options import catalog_path
from imagemill.local.find_server import server_for
from imagemill.terminal import show
from imagemill.terminal.interrupts import Interrupted, Interrupts
from imagemill.terminal.progress import Bar, Lines
from jobs.errors import ImageFailed, ImagemillError, NoRecipe
from jobs.fields import PER_JOB
from jobs.job import State
from jobs.recipe import Recipe, read_recipe


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of the comparison.

    `largest` is the largest difference in any channel of any pixel, None if the sizes differ.
    `differences` maps values of the recipe to their old and new value.
    """

    file: Path
    largest: int | None
    differing: int
    pixels: int
    differences: dict[str, tuple[Any, Any]]
    reproducible: bool
    out: Path | None

    @property
    def is_equal(self) -> bool:
        """Whether every pixel is the same."""
        return self.largest == 0

    def sentences(self) -> list[str]:
        """The result in words, starting with the verdict."""
        if self.is_equal:
            lines = [f"bit-equal: all {self.pixels} pixels of {self.file} are identical"]
        elif self.largest is None:
            lines = [f"not equal: the new image and {self.file} have different sizes"]
        else:
            share = f"{self.differing} of {self.pixels} pixels"
            lines = [f"not equal: {share} differ, by at most {self.largest} of 255"]
        for name, (then, now) in self.differences.items():
            lines.append(f"  {show.printable(f'{name}: was {then}, now {now}')}")
        if not self.is_equal and not self.differences:
            lines.append("  the recipes match, so the device or the file itself has changed")
        if not self.is_equal and not self.reproducible:
            lines.append(
                "  it wasn't `reproducible`, so other images in its batch affected the result"
            )
        return [*lines, *([f"the new image is {self.out}"] if self.out else [])]

    def document(self) -> dict[str, Any]:
        """The result as JSON."""
        pairs = {name: {"then": a, "now": b} for name, (a, b) in self.differences.items()}
        own = {"file": str(self.file), "equal": self.is_equal, "largest": self.largest}
        counted = {"differing_pixels": self.differing, "pixels": self.pixels}
        return {**own, **counted, "differences": pairs, "out": self.out and str(self.out)}


class Replay:
    """One run of the command; `run` returns None if the user stopped it."""

    def __init__(
        self,
        file: Path,
        out: Path | None,
        server: str | None,
        data: Path,
        models: Path | None,
        console: Console,
    ) -> None:
        self._file, self._out = file, out
        self._server, self._data, self._models = server, data, catalog_path(models)
        self._view = Bar(console) if console.is_interactive else Lines(console)
        self._began = time.time()

    def run(self) -> Verdict | None:
        """Read the recipe, generate the image and compare. Raises NoRecipe, ImageFailed, ..."""
        recipe = read_recipe(self._file)
        if self._out is not None and not self._out.absolute().parent.is_dir():
            raise InvalidInput(f"--out {self._out}: folder not found")
        with (
            tempfile.TemporaryDirectory(prefix="imagemill-replay-") as folder,
            Interrupts() as interrupts,
        ):
            try:
                image = self._make(recipe, Path(folder), interrupts)
            except (Interrupted, KeyboardInterrupt):
                image = None
            if image is None:
                self._view.say("stopped")
                return None
            if self._out is not None:
                write_file(self._out, image.read_bytes())
            return compare(self._file, recipe, image, self._out)

    def _make(self, recipe: Recipe, folder: Path, interrupts: Interrupts) -> Path | None:
        """The new image's file; None if stopped."""
        where = (self._server, self._data, self._models)
        view = self._view
        with server_for(*where, view.say, view.note, interrupts) as (client, is_private):
            fields = {k: v for k, v in asdict(recipe.request).items() if v is not None}
            model = fields.pop("model")
            per_job = {name: fields.pop(name) for name in PER_JOB if name in fields}
            job = client.submit(model, [fields], **per_job).raw
            self._view.say(f"job {job['id']}: replaying {self._file}")
            saved = Saved(folder)
            job = self._follow(client, job, saved, interrupts, is_private)
            if State(job["state"]) is State.SUCCEEDED:
                return saved.paths[0]
            if interrupts.asked():
                return None
            reason = job["images"][0]["error"] or f"its job is {job['state']}"
            raise ImageFailed(f"couldn't generate it again: {reason}")

    def _follow(
        self,
        client: Client,
        job: dict[str, Any],
        saved: Saved,
        interrupts: Interrupts,
        is_private: bool,
    ) -> dict[str, Any]:
        """Follow the job to its end; cancel it if the wait ends for any other reason."""
        log = self._data / "workers.log"
        advice = f"see {log}" if is_private else "start one with `imagemill worker`"
        try:
            with self._view as view:
                job = follow(
                    client,
                    job,
                    saved,
                    view,
                    interrupts=interrupts,
                    give_up=is_private,
                    since=self._began,
                    advice=advice,
                )
        finally:
            if not State(job["state"]).finished:
                with (
                    suppress(ImagemillError),
                    Client(client.server, patience=CANCEL_PATIENCE) as patient,
                ):
                    patient.say(protocol.act(job["id"], "cancel", CANCEL_PATIENCE))
        return job


def compare(file: Path, recipe: Recipe, image: Path, out: Path | None) -> Verdict:
    """Compare the image in `file`, which has that recipe, with the new one in `image`."""
    then, now = _pixels(file), _pixels(image)
    largest, differing = None, 0
    if then.size == now.size:
        bands = ImageChops.difference(then, now).split()
        worst = bands[0]
        for band in bands[1:]:
            worst = ImageChops.lighter(worst, band)
        counts = worst.histogram()
        differing = sum(counts[1:])
        largest = max(value for value, count in enumerate(counts) if count)
    return Verdict(
        file=file,
        largest=largest,
        differing=differing,
        pixels=now.width * now.height,
        differences=recipe.differences(read_recipe(image)),
        reproducible=recipe.request.reproducible,
        out=out,
    )


def _pixels(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NoRecipe(f"{path}: couldn't read its pixels: {error}") from error

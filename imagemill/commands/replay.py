"""`imagemill replay`: a picture's recipe followed once more, and the pixels of both compared.

What counts is what a viewer decodes: two files may differ in their bytes (the bucket in the
recipe, say) and be the same picture. Knows nothing of how pictures are made.
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
from imagemill.client.errors import InvalidInput, NoRecipe
from imagemill.client.file_names import write_file
from imagemill.commands.follow import Saved, follow
from imagemill.commands.options import catalog_path
from imagemill.commands.recipe import Recipe, read_recipe
from imagemill.local.find_server import server_for
from imagemill.terminal import show
from imagemill.terminal.interrupts import Interrupted, Interrupts
from imagemill.terminal.progress import Bar, Lines
from jobs.errors import ImageFailed, ImagemillError
from jobs.fields import PER_JOB
from jobs.job import State

CANCEL_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the new picture compares; `largest` is the largest difference of a pixel's channel.

    `largest` is None when the sizes differ; `differences` are facts then and now.
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
        """What to tell people, the verdict first."""
        if self.is_equal:
            said = [f"bit-equal: all {self.pixels} pixels of {self.file} are the same again"]
        elif self.largest is None:
            said = [f"not equal: the new picture has another size than {self.file}"]
        else:
            share = f"{self.differing} of {self.pixels} pixels"
            said = [f"not equal: {share} differ, by {self.largest} of 255 at most"]
        for name, (then, now) in self.differences.items():
            said.append(f"  {show.printable(f'{name}: {then} then, {now} now')}")
        if not self.is_equal and not self.differences:
            said.append("  the recipes are the same: the device, or the file itself, has changed")
        if not self.is_equal and not self.reproducible:
            said.append("  it was not made as `reproducible`, so what ran beside it had a say")
        return [*said, *([f"the new picture is {self.out}"] if self.out else [])]

    def document(self) -> dict[str, Any]:
        """The same as JSON."""
        pairs = {name: {"then": a, "now": b} for name, (a, b) in self.differences.items()}
        own = {"file": str(self.file), "equal": self.is_equal, "largest": self.largest}
        counted = {"differing_pixels": self.differing, "pixels": self.pixels}
        return {**own, **counted, "differences": pairs, "out": self.out and str(self.out)}


class Replay:
    """One run of the command; `run` returns None when the user stopped it."""

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
        """Read, make again, compare. Raises NoRecipe, or whatever making it raises."""
        recipe = read_recipe(self._file)
        if self._out is not None and not self._out.absolute().parent.is_dir():
            raise InvalidInput(f"--out {self._out}: there is no such folder")
        with (
            tempfile.TemporaryDirectory(prefix="imagemill-replay-") as folder,
            Interrupts() as interrupts,
        ):
            try:
                made = self._make(recipe, Path(folder), interrupts)
            except (Interrupted, KeyboardInterrupt):
                made = None
            if made is None:
                self._view.say("stopped")
                return None
            if self._out is not None:
                write_file(self._out, made.read_bytes())
            return compare(self._file, recipe, made, self._out)

    def _make(self, recipe: Recipe, folder: Path, interrupts: Interrupts) -> Path | None:
        """The new picture's file; None when stopped."""
        where = (self._server, self._data, self._models)
        view = self._view
        with server_for(*where, view.say, view.note, interrupts) as (client, is_private):
            fields = {k: v for k, v in asdict(recipe.request).items() if v is not None}
            model = fields.pop("model")
            per_job = {name: fields.pop(name) for name in PER_JOB if name in fields}
            job = client.submit(model, [fields], **per_job).raw
            self._view.say(f"job {job['id']}: {self._file} once more")
            saved = Saved(folder)
            job = self._follow(client, job, saved, interrupts, is_private)
            if State(job["state"]) is State.SUCCEEDED:
                return saved.paths[0]
            if interrupts.asked():
                return None
            reason = job["images"][0]["error"] or f"its job is {job['state']}"
            raise ImageFailed(f"it could not be made again: {reason}")

    def _follow(
        self,
        client: Client,
        job: dict[str, Any],
        saved: Saved,
        interrupts: Interrupts,
        is_private: bool,
    ) -> dict[str, Any]:
        """The job at its end, or cancelled when the wait for it ends otherwise."""
        log = self._data / "workers.log"
        advice = f"{log} may tell why" if is_private else "start one with `imagemill worker`"
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


def compare(file: Path, recipe: Recipe, made: Path, out: Path | None) -> Verdict:
    """The picture in `file`, of that recipe, against the one in `made`."""
    then, now = _pixels(file), _pixels(made)
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
        differences=recipe.differences(read_recipe(made)),
        reproducible=recipe.request.reproducible,
        out=out,
    )


def _pixels(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NoRecipe(f"{path}: its pixels cannot be read: {error}") from error

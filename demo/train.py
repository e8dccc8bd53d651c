"""From nothing to the bundled folder: `python -m demo.train --out demo/model`.

Five stages, vae, text, data, transformer and save, each kept in the work folder.
Run the command again after a kill and it goes on where it stopped. Knows the order
of the stages and how scores are logged; each stage's work is in its own module.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from demo import data, flow, folder, reading, vae
from demo.flow import Model
from demo.progress import Log
from demo.score import ROWS, Drawing, shares, verdicts

STAGES = ("vae", "text", "data", "transformer", "save")


def trained_vae(work: Path, log: Log) -> Any:
    """The codec, trained unless `work/vae` holds it."""
    kept = work / "vae"
    if not kept.exists():
        beside = work / "vae.part"
        vae.train(work, log).save_pretrained(beside)
        beside.rename(kept)
    return AutoencoderKL.from_pretrained(kept, dtype=torch.float32).eval()


def logged_scores(codec: Any, model: Model) -> str:
    """Shares of right pictures of held-out single things and of seen pairs of things."""
    pipeline = folder.assemble(codec, model)
    said = []
    for row in (ROWS[0], ROWS[2]):
        with torch.no_grad():
            found = shares(verdicts(pipeline, row, count=32, seed=900, how=Drawing()))
        said.append(f"{row.title}: " + ", ".join(f"{k} {v:.0f}%" for k, v in found.items()))
    return "; ".join(said)


def train(work: Path, out: Path, until: str, steps: int, log: Log) -> None:
    """Runs the stages in order, up to and with `until`."""
    codec = trained_vae(work, log)
    if until == "vae":
        return
    text = reading.train(work, log)
    if until == "text":
        return
    shelves = data.make(work, log)
    if until == "data":
        return
    model = flow.train(
        work, log, text, shelves, steps=steps, score=lambda model: logged_scores(codec, model)
    )
    log(f"trained: {logged_scores(codec, model)}")
    if until == "save":
        size = folder.save(codec, model, out)
        log(f"saved {out}, {size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled model from nothing.")
    parser.add_argument("--out", type=Path, default=Path("demo/model"))
    parser.add_argument("--work", type=Path, default=Path("demo/work"))
    parser.add_argument("--until", choices=STAGES, default="save", help="the last stage to run")
    parser.add_argument("--steps", type=int, default=flow.STEPS, help="of the transformer")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    log = Log(arguments.work / "train.log")
    train(arguments.work, arguments.out, arguments.until, arguments.steps, log)


if __name__ == "__main__":
    main()

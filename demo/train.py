"""Train the bundled model from scratch: `python -m demo.train --out demo/model`.

There are five stages: vae, text, data, transformer and save. Each stores its results in
the work folder. After a kill, run the command again to resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from demo import data, export, train_text, train_transformer, vae
from demo.progress import Log
from demo.score import ROWS, Drawing, shares, verdicts
from demo.train_transformer import Model

STAGES = ("vae", "text", "data", "transformer", "save")


def trained_vae(work: Path, log: Log) -> Any:
    """The codec from `work/vae`, trained if it isn't there."""
    path = work / "vae"
    if not path.exists():
        partial = work / "vae.part"
        vae.train(work, log).save_pretrained(partial)
        partial.rename(path)
    return AutoencoderKL.from_pretrained(path, dtype=torch.float32).eval()


def logged_scores(codec: Any, model: Model) -> str:
    """A line with the scores of single held-out things and of two seen things."""
    pipeline = export.assemble(codec, model)
    lines = []
    for row in (ROWS[0], ROWS[2]):
        with torch.no_grad():
            scores = shares(verdicts(pipeline, row, count=32, seed=900, how=Drawing()))
        lines.append(f"{row.title}: " + ", ".join(f"{k} {v:.0f}%" for k, v in scores.items()))
    return "; ".join(lines)


def train(work: Path, out: Path, until: str, steps: int, log: Log) -> None:
    """Run the stages in order, up to and including `until`."""
    codec = trained_vae(work, log)
    if until == "vae":
        return
    text = train_text.train(work, log)
    if until == "text":
        return
    resolutions = data.make(work, log)
    if until == "data":
        return
    model = train_transformer.train(
        work, log, text, resolutions, steps=steps, score=lambda model: logged_scores(codec, model)
    )
    log(f"trained: {logged_scores(codec, model)}")
    if until == "save":
        size = export.save(codec, model, out)
        log(f"saved {out}, {size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled model from nothing.")
    parser.add_argument("--out", type=Path, default=Path("demo/model"))
    parser.add_argument("--work", type=Path, default=Path("demo/work"))
    parser.add_argument("--until", choices=STAGES, default="save", help="the last stage to run")
    parser.add_argument(
        "--steps", type=int, default=train_transformer.STEPS, help="of the transformer"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    log = Log(arguments.work / "train.log")
    train(arguments.work, arguments.out, arguments.until, arguments.steps, log)


if __name__ == "__main__":
    main()

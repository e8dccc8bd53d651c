"""One rank of a group without a model.

The leader makes all ranks sum tensors and prints a line each time. Exits with 71 if the group is
lost, as a worker does. Modes: "work" sums forever; "twice" sums twice; "idle" pauses for longer
than a collective may take, sums once more, then ends; "raise" makes rank 1 raise; "wait" sums once
and waits forever; "hurry" sums forever, with a timeout of a few seconds after the first time. In
other modes a collective may take longer than any test waits.
"""

import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from jobs.catalog import Model
from jobs.errors import GroupLost
from pipelines.placements import group
from pipelines.placements.group import Group, follow, join
from tests.pipelines.placements.launch import NEVER
from tests.waiting import PATIENCE

ARGUMENTS = {
    "numbers": torch.arange(6.0).view(2, 3),
    "halves": [torch.tensor([1.5, -2.25], dtype=torch.bfloat16), (torch.tensor(True), "text")],
    "nothing": None,
    "empty": torch.empty(0, 4),
    "across": torch.arange(6).view(2, 3).t(),
}


IDLE = 20.0
"""Seconds that "idle" pauses; a collective of working ranks takes far less."""


def main(mode: str) -> int:
    torch.set_num_threads(1)
    group.GROUP_SECONDS = IDLE if mode == "idle" else NEVER
    if mode != "hurry":
        group.GRACE_SECONDS = PATIENCE
    ring = int(os.environ["WORLD_SIZE"])
    member = join(Model("m", "", placement="context_parallel", ring=ring), "cpu")
    member.steady()
    try:
        if member.leads:
            lead(member, mode)
        else:
            follow(member, {"add": lambda value: add(member, value, mode)})
    except GroupLost as error:
        say(f"lost: {error}")
        return 71
    say("ended")
    return 0


def lead(member: Group, mode: str) -> None:
    turns = 0
    while mode in ("work", "raise", "hurry") or turns < 2:
        with member.together():
            member.send("add", ARGUMENTS)
            add(member, ARGUMENTS, "")
        turns += 1
        say(f"turn {turns}")
        if mode == "hurry" and turns == 1:
            group.GROUP_SECONDS = 3.0
            member.steady()
            say("in a hurry")
        time.sleep(IDLE + 1 if mode == "idle" else 0.02)
        while mode == "wait":
            time.sleep(0.1)
            member.check()
    member.dismiss()
    member.dismiss()


def add(member: Group, value: Any, mode: str) -> None:
    if mode == "raise":
        raise ValueError("no such luck")
    flat = (*(value[name] for name in ("numbers", "empty", "across")), value["halves"][0])
    expected = (
        *(ARGUMENTS[name] for name in ("numbers", "empty", "across")),
        ARGUMENTS["halves"][0],
    )
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(flat, expected, strict=True)
    )
    assert value["nothing"] is None and value["halves"][1] == (torch.tensor(True), "text")
    total = value["numbers"].clone()
    dist.all_reduce(total)
    assert torch.equal(total, ARGUMENTS["numbers"] * member.size)


def say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()

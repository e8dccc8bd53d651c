"""Selection of webhooks: tenants take turns, whatever their receivers do."""

import json
from pathlib import Path

from service.webhooks import selection
from service.webhooks.outbox import Message, Outbox
from service.webhooks.selection import chosen


def message(number: int, tenant: str, host: str, due: float = 0.0) -> Message:
    return Message(f"msg_{number}", f"http://{host}/hook", "{}", 0.0, 0, due, tenant)


def test_dead_receivers_do_not_block_other_tenants() -> None:
    dead = [message(number, "bad", f"10.0.0.1:{number // 9}") for number in range(90)]
    going = chosen(dead, [], now=1.0)
    assert len(going) == selection.PER_TENANT
    late = message(99, "good", "good.test", due=0.5)
    assert chosen([*dead[8:], late], going, now=1.0) == [late]


def test_tenants_take_turns() -> None:
    waiting = [message(n, f"t{n % 6}", f"h{n}", due=n % 6) for n in range(24)]
    tenants = [message.tenant for message in chosen(waiting, [], now=9.0)]
    assert tenants[:12] == [f"t{n % 6}" for n in range(12)]
    assert len(tenants) == selection.THREADS
    later = chosen(waiting, [message(50, "t0", "x"), message(51, "t1", "x")], now=9.0)
    assert [message.tenant for message in later[:6]] == ["t2", "t3", "t4", "t5", "t0", "t1"]


def test_early_duplicate_and_busy_host_messages_wait() -> None:
    first, second, third = (message(n, f"t{n}", "same") for n in range(3))
    early = message(4, "t4", "other", due=2.0)
    assert chosen([first, second, third, early], [], now=1.0) == [first, second]
    assert chosen([first, third], [first], now=1.0) == [third]


def test_message_without_tenant_is_still_sent(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    box.put(message(1, "", "h"))
    (path,) = tmp_path.glob("*/msg_1.json")
    document = json.loads(path.read_text())
    del document["tenant"]
    path.write_text(json.dumps(document))
    assert box.pending() == [message(1, "", "h")]

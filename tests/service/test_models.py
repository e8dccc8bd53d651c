"""The catalog and the workers over HTTP, in OpenAI's shape where there is one."""

from tests.service.conftest import Deployment


def test_the_catalog_in_its_order(fresh: Deployment) -> None:
    fresh.submit("a", n=3)
    answer = fresh.client.get("/v1/models").json()
    assert answer["object"] == "list"
    assert [model["id"] for model in answer["data"]] == ["demo", "distilled", "idle"]
    demo = answer["data"][0]
    assert (demo["object"], type(demo["created"]), demo["owned_by"]) == ("model", int, "imagemill")
    assert demo["defaults"]["steps"] == 8 and demo["limits"]["max_pixels"] == 65536
    assert (demo["ready_workers"], demo["queued"], demo["card"]) == (0, 3, None)


def test_one_model_with_what_a_worker_found(fresh: Deployment) -> None:
    fresh.store.publish_card("demo", {"family": "flux", "multiple": 16})
    fresh.store.register("w1", {"model": "demo", "state": "ready"}, 60)
    demo = fresh.client.get("/v1/models/demo").json()
    assert (demo["card"]["family"], demo["ready_workers"]) == ("flux", 1)


def test_an_unknown_model_is_404(mill: Deployment) -> None:
    answer = mill.client.get("/v1/models/nope")
    assert (answer.status_code, answer.json()["known"]) == (404, ["demo", "distilled", "idle"])


def test_the_workers_as_they_report(fresh: Deployment) -> None:
    assert fresh.client.get("/v1/workers").json() == {"data": []}
    info = {"model": "demo", "state": "ready", "device": "cuda:0", "steps_per_second": 3.5}
    fresh.store.register("w1", info, 60)
    (worker,) = fresh.client.get("/v1/workers").json()["data"]
    assert worker["id"] == "w1"
    assert {name: worker[name] for name in info} == info

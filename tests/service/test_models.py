"""Models and workers over HTTP."""

from jobs.reports import WorkerReport
from tests.service.conftest import Deployment, card


def test_models_are_in_catalog_order(fresh: Deployment) -> None:
    fresh.submit("a", n=3)
    response = fresh.client.get("/v1/models").json()
    assert response["object"] == "list"
    assert [model["id"] for model in response["data"]] == ["demo", "distilled", "idle"]
    demo = response["data"][0]
    assert (demo["object"], type(demo["created"]), demo["owned_by"]) == ("model", int, "imagemill")
    assert demo["defaults"]["steps"] == 8 and demo["limits"]["max_pixels"] == 65536
    assert (demo["ready_workers"], demo["queued"], demo["card"]) == (0, 3, None)


def test_model_view_has_the_card(fresh: Deployment) -> None:
    fresh.store.publish_card("demo", card(family="flux"))
    fresh.store.register("w1", WorkerReport("demo", "ready"), 60)
    demo = fresh.client.get("/v1/models/demo").json()
    assert (demo["card"]["family"], demo["ready_workers"]) == ("flux", 1)


def test_unknown_model_is_404(deployment: Deployment) -> None:
    response = deployment.client.get("/v1/models/nope")
    assert (response.status_code, response.json()["known"]) == (404, ["demo", "distilled", "idle"])


def test_workers_as_reported(fresh: Deployment) -> None:
    assert fresh.client.get("/v1/workers").json() == {"data": []}
    info = {"model": "demo", "state": "ready", "device": "cuda:0", "steps_per_second": 3.5}
    fresh.store.register("w1", WorkerReport.from_dict(info), 60)
    (worker,) = fresh.client.get("/v1/workers").json()["data"]
    assert worker["id"] == "w1"
    assert {name: worker[name] for name in info} == info

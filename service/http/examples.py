"""Examples for the OpenAPI document: bodies, responses and path parameters.

Without them, interfaces such as Swagger make up values from patterns, which no service accepts. The
tests check that every operation has its examples and that they match their schemas.
"""

from typing import Any

_JOB = "6614bb6ef0bb9b97c9b0a63"
_FILE = "file-b5b9ddb60d5e490f57f50dc2"
_BATCH = "batch_076907aa021d443ca5775e23"
_PROMPT = "a green star on a black background"
_DIGEST = "583174b9ffd2709f85b7ef9b9c506ba7fcc8cb9e5ef1105521908f0731135ea9"
_PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPj/HwADBwIAMCbHYQAAAABJRU5ErkJg"
    "gg=="
)

_SUMMARY: dict[str, Any] = {
    "id": _JOB,
    "model": "demo",
    "state": "succeeded",
    "progress": 1.0,
    "priority": 5,
    "counts": {
        "total": 1,
        "queued": 0,
        "running": 0,
        "succeeded": 1,
        "failed": 0,
        "cancelled": 0,
    },
    "created": 1795827679.824,
    "started": 1795827679.836,
    "finished": 1795827680.845,
    "expires": 1796432480.845,
    "metadata": {},
    "urls": {
        "self": f"/v1/jobs/{_JOB}",
        "events": f"/v1/jobs/{_JOB}/events",
        "cancel": f"/v1/jobs/{_JOB}/cancel",
        "retry": f"/v1/jobs/{_JOB}/retry",
        "zip": f"/v1/jobs/{_JOB}/images.zip",
        "sheet": f"/v1/jobs/{_JOB}/sheet.png",
    },
}
_IMAGE: dict[str, Any] = {
    "index": 0,
    "state": "succeeded",
    "prompt": _PROMPT,
    "negative_prompt": None,
    "seed": 7,
    "width": 128,
    "height": 128,
    "steps": 10,
    "guidance_scale": 2.5,
    "format": "png",
    "reproducible": True,
    "step": 10,
    "attempts": 1,
    "error": None,
    "url": f"/v1/jobs/{_JOB}/images/0",
    "sha256": _DIGEST,
    "size": 3610,
    "media_type": "image/png",
    "seconds": 0.5,
    "warnings": [],
}
_MODEL: dict[str, Any] = {
    "id": "demo",
    "object": "model",
    "created": 1795827679,
    "owned_by": "imagemill",
    "dtype": "float32",
    "placement": "replica",
    "defaults": {"width": 128, "height": 128, "steps": 8, "guidance_scale": 2.5},
    "limits": {"max_pixels": 65536, "max_steps": 100, "max_prompts": 5000, "multiple": 16},
    "card": None,
    "ready_workers": 1,
    "queued": 0,
}
_STORED_FILE: dict[str, Any] = {
    "id": _FILE,
    "object": "file",
    "bytes": 94,
    "created_at": 1795827679,
    "expires_at": 1798419679,
    "filename": "in.jsonl",
    "purpose": "batch",
    "status": "processed",
}
_BATCH_VIEW: dict[str, Any] = {
    "id": _BATCH,
    "object": "batch",
    "endpoint": "/v1/images/generations",
    "errors": None,
    "input_file_id": _FILE,
    "completion_window": "24h",
    "status": "in_progress",
    "output_file_id": None,
    "error_file_id": None,
    "created_at": 1795827679,
    "in_progress_at": 1795827679,
    "expires_at": 1795914079,
    "finalizing_at": None,
    "completed_at": None,
    "failed_at": None,
    "expired_at": None,
    "cancelling_at": None,
    "cancelled_at": None,
    "request_counts": {"total": 1, "completed": 0, "failed": 0},
    "metadata": None,
    "jobs": [_JOB],
}
_PAGE = {"object": "list", "has_more": False}
_CHECKPOINT = {"title": "demo", "model_name": "demo", "filename": "demo/model"}

BY_SCHEMA: dict[str, Any] = {
    "SubmitJob": {
        "model": "demo",
        "prompts": [
            "a large red circle on a white background",
            {"prompt": "a blue heart on a red background", "n": 2, "seed": 7},
        ],
        "steps": 8,
    },
    "GenerateImages": {"prompt": _PROMPT, "response_format": "url"},
    "CreateBatch": {
        "input_file_id": _FILE,
        "endpoint": "/v1/images/generations",
        "completion_window": "24h",
    },
    "TextToImage": {"prompt": "a gray ring", "steps": 10, "seed": 5},
    "PngToRead": {"image": _PIXEL},
    "JobView": {
        **_SUMMARY,
        "queue_position": None,
        "eta_seconds": 0.0,
        "warnings": [],
        "webhook": None,
        "images": [_IMAGE],
    },
    "JobPage": {"data": [_SUMMARY], "next": None},
    "ModelView": _MODEL,
    "ModelList": {"object": "list", "data": [_MODEL]},
    "WorkerList": {"data": [{"id": "gpu0", "model": "demo", "state": "ready"}]},
    "Health": {"status": "ok"},
    "Readiness": {"status": "ready", "models": {"demo": 1}},
    "GeneratedImages": {
        "created": 1795827679,
        "data": [
            {
                "b64_json": None,
                "url": f"http://localhost:8000/v1/jobs/{_JOB}/images/0",
                "revised_prompt": None,
                "seed": 7,
                "index": 0,
            }
        ],
        "size": "128x128",
        "output_format": "png",
        "usage": None,
        "job": _JOB,
        "warnings": [],
    },
    "FileView": _STORED_FILE,
    "FileList": {**_PAGE, "data": [_STORED_FILE], "first_id": _FILE, "last_id": _FILE},
    "FileDeleted": {"id": _FILE, "object": "file", "deleted": True},
    "BatchView": _BATCH_VIEW,
    "BatchList": {**_PAGE, "data": [_BATCH_VIEW], "first_id": _BATCH, "last_id": _BATCH},
    "Pictures": {"images": [_PIXEL], "parameters": {"prompt": "a gray ring"}, "info": "{}"},
    "Progress": {
        "progress": 0.4,
        "eta_relative": 1.5,
        "state": {
            "skipped": False,
            "interrupted": False,
            "job": _JOB,
            "job_count": 1,
            "job_no": 0,
            "job_timestamp": "20261128010119",
            "sampling_step": 4,
            "sampling_steps": 10,
        },
        "current_image": None,
        "textinfo": None,
    },
    "TaskToFollow": {"id_task": "my-task"},
    "TaskProgress": {
        "active": True,
        "queued": False,
        "completed": False,
        "progress": 0.4,
        "eta": 1.5,
        "live_preview": None,
        "id_live_preview": -1,
        "textinfo": None,
    },
    "ChosenOptions": {"sd_model_checkpoint": "demo"},
    "Options": {
        "sd_model_checkpoint": "demo",
        "sd_checkpoint_hash": "",
        "sd_vae": "Automatic",
        "samples_format": "png",
        "CLIP_stop_at_last_layers": 1,
    },
    "OptionsSet": {"ignored": ["CLIP_stop_at_last_layers"]},
    "PngInfo": {
        "info": "a gray ring\nSteps: 10, Seed: 5",
        "items": {},
        "parameters": {"Steps": 10, "Seed": 5},
    },
}
"""Examples of bodies and responses by the name of their schema."""

BY_OPERATION: dict[str, Any] = {
    "followJob": 'event: deleted\nid: 1795827680845-0\ndata: {"id": "' + _JOB + '"}\n\n',
    "getRecipe": {"prompt": _PROMPT, "seed": 7, "steps": 10, "model_path": "demo/model"},
    "interrupt": {},
    "skip": {},
    "listCheckpoints": [_CHECKPOINT],
    "getMetrics": 'imagemill_images_finished_total{state="succeeded"} 5.0\n',
}
"""Examples of responses that have no named schema, by operation."""

BY_PARAMETER: dict[str, Any] = {
    "job_id": _JOB,
    "index": 0,
    "name": "demo",
    "file_id": _FILE,
    "batch_id": _BATCH,
}
"""Examples of path parameters."""

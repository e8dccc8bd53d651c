"""A1111's options: read before almost every request, and written to choose the model."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from service.context import Context, ServiceContext
from service.http.auth import Caller, CallerByPassword
from service.http.body import json_body, json_body_schema
from service.http.openapi import problems
from service.sdapi.schemas import ChosenOptions, Options, OptionsSet
from service.sdapi.sessions import session_of

router = APIRouter(prefix="/sdapi/v1", tags=["sdapi"])


@router.get("/options", response_model=Options, responses=problems(422, 503))
def get_options(request: Request, context: Context, caller: CallerByPassword) -> Options:
    """The caller's options."""
    return Options(sd_model_checkpoint=model_of(request, context, caller))


@router.post(
    "/options",
    response_model=OptionsSet,
    responses=problems(400, 404, 413, 415, 422, 503),
    openapi_extra=json_body_schema(ChosenOptions),
)
def set_options(
    request: Request,
    body: Annotated[ChosenOptions, Depends(json_body(ChosenOptions))],
    context: Context,
    caller: CallerByPassword,
) -> OptionsSet:
    """Choose the caller's model, until it chooses another one."""
    if body.sd_model_checkpoint is not None:
        model = context.catalog.get(body.sd_model_checkpoint)
        context.sessions.choose(caller, session_of(request, caller), model.name)
    current: dict[str, Any] = get_options(request, context, caller).model_dump()
    extra = body.model_extra or {}
    return OptionsSet(ignored=sorted(n for n, v in extra.items() if v != current.get(n, _NEVER)))


_NEVER = object()


def model_of(request: Request, context: ServiceContext, caller: Caller) -> str:
    """The caller's model: the one it chose, if the catalog has it, else the catalog's first."""
    chosen = context.sessions.chosen(caller, session_of(request, caller))
    names = [model.name for model in context.catalog]
    return chosen if chosen in names else names[0]

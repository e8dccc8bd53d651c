"""Fields of other diffusion servers that some of our models can honour. Pure."""

from jobs.errors import FieldProblem, InvalidRequest
from jobs.reports import ModelCard
from service.openai.schemas import GenerateImages


def as_served(body: GenerateImages, card: ModelCard | None) -> GenerateImages:
    """The request in our own fields, for a model with this card.

    A `true_cfg_scale` is the `guidance_scale` of a model with classifier-free guidance; for others,
    and before a worker has read the model, it must be off (at most 1). A `max_sequence_length` must
    be the model's. Raises InvalidRequest.
    """
    properties = card.properties if card else None
    problems = []
    scale, length = body.true_cfg_scale, body.max_sequence_length
    is_guided = properties is not None and properties.guidance == "classifier-free"
    if scale is not None and scale > 1 and not is_guided:
        detail = f"{scale:g} isn't supported by this model: send guidance_scale, or at most 1"
        problems.append(FieldProblem("/true_cfg_scale", detail))
    most = properties.max_prompt_tokens if properties else None
    if length is not None and length != most:
        known = f"; this model's is {most}" if most else ""
        detail = f"{length} isn't supported: the model's entry in the catalog sets it{known}"
        problems.append(FieldProblem("/max_sequence_length", detail))
    if problems:
        raise InvalidRequest("; ".join(item.detail for item in problems), tuple(problems))
    if scale is None or not is_guided:
        return body
    return body.model_copy(update={"guidance_scale": scale})

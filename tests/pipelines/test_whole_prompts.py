"""Which requests share a whole call: only prompts of the same, known length."""

import pytest
import torch
from structlog.testing import capture_logs

from jobs.errors import OutOfMemory
from pipelines.families.whole_call import WholeCall
from pipelines.families.whole_text import PromptTexts
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.seam import PromptForm
from tests.pipelines.rounding import served_alone
from tests.pipelines.serving import alone, ask, begin, difference, serve
from tests.pipelines.tiny_whole import cogview4

SHORT = ask("a red cat", seed=1)
EQUAL = ask("a bad dog", seed=2)
LONG = ask("a blue dog that runs on a beach at dawn", seed=3)


@pytest.fixture(scope="module")
def cogview():
    return cogview4()


@pytest.fixture
def pipeline(cogview):
    return FamilyPipeline(WholeCall(cogview))


def together(pipeline, requests, bucket=0):
    """Pictures by seed from one call for all requests, regardless of batch keys."""
    samples = [begin(pipeline, request) for request in requests]
    pipeline.step(samples, bucket)
    return {s.request.seed: pipeline.decode([s])[0] for s in samples}


def test_a_longer_prompt_in_the_batch_would_change_the_picture(pipeline):
    batched = together(pipeline, [SHORT, LONG])
    assert difference(batched[1], alone(pipeline, SHORT)) > 1e-2


@pytest.mark.parametrize("bucket", [0, 4])
def test_the_picture_does_not_depend_on_other_requests(pipeline, bucket):
    pictures, calls = serve(pipeline, {0: [SHORT, LONG, EQUAL]}, bucket=bucket)
    assert calls == 2
    for request in (SHORT, EQUAL, LONG):
        lonely = served_alone(pipeline, request, bucket)
        assert lonely.miss(pictures[request.seed]) <= 1
        assert bucket == 0 or torch.equal(pictures[request.seed], lonely.picture)


def test_the_lengths_of_both_prompts_are_in_the_batch_key(pipeline):
    base = ask("a red cat", negative_prompt="ugly")
    key = pipeline.batch_key(base)
    assert pipeline.batch_key(ask("a bad dog", negative_prompt="dull")) == key
    assert pipeline.batch_key(ask("a bad dogs", negative_prompt="dull")) != key
    assert pipeline.batch_key(ask("a bad dog", negative_prompt="uglier")) != key


def test_prompt_lengths_count_for_all_tokenizers_but_clips(tiny_pipe):
    clip = PromptTexts(tiny_pipe("SDXL"), None)
    assert clip.key(SHORT) == clip.key(LONG)
    flux = PromptTexts(tiny_pipe("Flux"), None)
    assert flux.key(SHORT) == flux.key(EQUAL) != flux.key(LONG)
    pixart = PromptTexts(tiny_pipe("PixArtSigma"), None)  # it strips captions
    assert pixart.key(SHORT) == pixart.key(ask("  A RED CAT  "))


def test_every_image_has_its_own_call_if_a_processor_reads_the_prompt(cogview, monkeypatch):
    class Processor:
        tokenizer = None

    whole = {**cogview.components, "processor": Processor()}
    monkeypatch.setattr(type(cogview), "components", property(lambda _: whole))
    pipeline = FamilyPipeline(WholeCall(cogview))
    assert pipeline.batch_key(SHORT) != pipeline.batch_key(EQUAL)
    assert pipeline.card.max_prompt_tokens is None
    pictures, calls = serve(pipeline, {0: [SHORT, EQUAL]}, bucket=4)
    assert calls == 2
    assert torch.equal(pictures[1], alone(pipeline, SHORT))


# Pipelines that don't support batches.


@pytest.fixture
def refusing(cogview, monkeypatch):
    """CogView4 that raises for several prompts and for "poison"; and its calls' sizes."""
    calls = []
    check = cogview.check_inputs

    def one_only(prompt, *arguments, **named):
        calls.append(1 if isinstance(prompt, str) else len(prompt))
        if calls[-1] > 1:
            raise ValueError("one prompt at a time")
        if "poison" in prompt:
            raise ValueError("poison")
        return check(prompt, *arguments, **named)

    monkeypatch.setattr(cogview, "check_inputs", one_only)
    return FamilyPipeline(WholeCall(cogview)), calls


def test_a_pipeline_that_refuses_batches_is_called_per_image(refusing):
    pipeline, calls = refusing
    with capture_logs() as logs:
        pictures = together(pipeline, [SHORT, EQUAL], bucket=4)
    assert calls == [4, 1, 1]
    assert [log["event"] for log in logs] == ["no batches"]
    calls.clear()
    again, _ = serve(pipeline, {0: [SHORT, EQUAL]}, bucket=4)
    assert calls == [1, 1]
    for seed in (1, 2):
        assert torch.equal(pictures[seed], again[seed])


def test_a_pipeline_that_returns_one_image_per_batch_is_called_per_image(cogview, monkeypatch):
    pipeline = FamilyPipeline(WholeCall(cogview))
    postprocess = cogview.image_processor.postprocess
    monkeypatch.setattr(
        cogview.image_processor,
        "postprocess",
        lambda image, **named: postprocess(image[:1], **named),
    )
    pictures = together(pipeline, [SHORT, EQUAL])
    assert pipeline.family.batches is False
    assert torch.equal(pictures[2], alone(pipeline, EQUAL))


def test_a_failing_prompt_is_not_mistaken_for_a_refusal_of_batches(cogview, monkeypatch):
    pipeline = FamilyPipeline(WholeCall(cogview))
    encode = cogview.encode_prompt

    def poisoned(prompt, *arguments, **named):
        if "poison!!!" in prompt:
            raise ValueError("poison")
        return encode(prompt, *arguments, **named)

    monkeypatch.setattr(cogview, "encode_prompt", poisoned)
    bad = begin(pipeline, ask("poison!!!", seed=9))
    good = begin(pipeline, SHORT)
    with pytest.raises(ValueError, match="poison"):
        pipeline.step([good, bad])
    assert (good.step, bad.step, pipeline.family.batches) == (0, 0, None)
    pipeline.step([good], 2)
    assert good.done
    assert pipeline.family.batches is True


def test_out_of_memory_is_not_mistaken_for_a_refusal_of_batches(cogview, monkeypatch):
    pipeline = FamilyPipeline(WholeCall(cogview))

    def full(prompt, *arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cogview, "encode_prompt", full)
    with pytest.raises(OutOfMemory):
        pipeline.step([begin(pipeline, SHORT)], 2)
    assert pipeline.family.batches is None


# Truncation.


def test_a_single_tokenizer_determines_truncation(cogview):
    pipeline = FamilyPipeline(WholeCall(cogview, 16))
    assert (pipeline.card.max_prompt_tokens, pipeline.card.prompt) == (16, PromptForm())
    assert FamilyPipeline(WholeCall(cogview)).card.max_prompt_tokens == 1024
    short, long, negative = pipeline.encode(
        [ask("b" * 14), ask("b" * 15), ask("b", negative_prompt="b" * 15)]
    )
    assert (short.truncated, long.truncated, negative.truncated) == (False, True, True)
    cut = [alone(pipeline, ask("b" * 14 + letter)) for letter in "cd"]
    assert torch.equal(*cut)
    whole = [alone(pipeline, ask("b" * 13 + letter)) for letter in "cd"]
    assert not torch.equal(*whole)


def test_prompts_are_not_counted_with_templates_or_several_tokenizers(tiny_pipe):
    assert PromptTexts(tiny_pipe("Flux"), None).limit is None
    sana = FamilyPipeline(WholeCall(tiny_pipe("Sana")))  # adds an instruction to every prompt
    assert sana.card.max_prompt_tokens == 300
    assert (sana.card.prompt, sana.tokenizer_json()) == (None, None)
    assert not sana.encode([ask("b" * 400)])[0].truncated

"""Counting with `tokenizer_json` and `Card.prompt` gives the same result as the model."""

import pytest
from tokenizers import Tokenizer

from pipelines.fake import FakePipeline
from pipelines.families import make_family
from pipelines.families.whole_call import WholeCall
from pipelines.placements.family_pipeline import FamilyPipeline
from pipelines.text import TokenCounter, chat_form
from tests.pipelines.serving import ask
from tests.pipelines.tiny import BUILDERS
from tests.pipelines.tiny_parts import chat_tokenizer

TEXTS = [
    "",
    "a red cat",
    "  white space \n\n at both ends\t ",
    "UPPER Case, ΑΝΤΙΓΟΝΟΣ, İstanbul, ﬁne",
    "日本語のプロンプト 🦊 é é",
    "\n\nA newline that a template's own might swallow\n",
    "<|im_end|> special </s> tokens <|endoftext|> <pad> <|im_start|>assistant",
    "{braces} {{ and }} percent %s",
    "\x1c control \x1f\u2003",
    "a [IMG]picture[IMG] token [INST] </s>",
    "word " * 700,
]


def count(pipeline, tokenizer: Tokenizer, text: str) -> int:
    """Count tokens like the service does."""
    form = pipeline.card.prompt
    return len(tokenizer.encode(form.of(text)).ids) - form.dropped


CLEANED = "PixArtSigma"
"""Its captions are cleaned as diffusers does, so they can't be counted from outside."""


@pytest.fixture(params=["fake", *(name for name in BUILDERS if name != CLEANED)])
def pipeline(request, tiny_pipe):
    if request.param == "fake":
        return FakePipeline()
    return FamilyPipeline(make_family(tiny_pipe(request.param), None))


def test_captions_that_are_cleaned_are_not_counted(tiny_pipe):
    pipeline = FamilyPipeline(make_family(tiny_pipe(CLEANED), None))
    assert (pipeline.tokenizer_json(), pipeline.card.prompt) == (None, None)


def test_tokens_are_counted_as_the_model_counts_them(pipeline):
    tokenizer = Tokenizer.from_str(pipeline.tokenizer_json())
    if isinstance(pipeline, FakePipeline):
        assert count(pipeline, tokenizer, " a few\n words ") == 3
        return
    family = pipeline.family
    for text in TEXTS:
        own = family.count(text) - pipeline.card.prompt.dropped
        assert count(pipeline, tokenizer, text) == own, text


def test_the_count_predicts_which_prompts_are_truncated(pipeline):
    tokenizer = Tokenizer.from_str(pipeline.tokenizer_json())
    limit = pipeline.card.max_prompt_tokens
    short, long = 0, 2 * limit
    while long - short > 1:
        middle = (short + long) // 2
        fits = count(pipeline, tokenizer, "b " * middle) <= limit
        short, long = (middle, long) if fits else (short, middle)
    prompts = ["b " * short, "b " * long]
    assert [c.truncated for c in pipeline.encode([ask(p) for p in prompts])] == [False, True]


@pytest.mark.parametrize("name", ["SD15", "PixArtSigma"])
def test_a_whole_call_counts_like_its_family(tiny_pipe, name):
    pipe = tiny_pipe(name)
    whole, family = FamilyPipeline(WholeCall(pipe)), FamilyPipeline(make_family(pipe, None))
    assert whole.card.max_prompt_tokens == family.card.max_prompt_tokens
    assert whole.card.prompt == family.card.prompt
    assert whole.tokenizer_json() == family.tokenizer_json()


def test_a_whole_call_with_several_tokenizers_publishes_none(tiny_pipe):
    pipeline = FamilyPipeline(WholeCall(tiny_pipe("SDXL")))
    assert (pipeline.tokenizer_json(), pipeline.card.prompt) == (None, None)


def test_a_template_that_changes_the_text_has_no_form():
    assert chat_form(lambda text: f"<user>{text}</user>").of("x") == "<user>x</user>"
    assert chat_form(lambda text: f"<user>{text.strip()}</user>") is None


def test_a_slow_tokenizer_has_no_json():
    assert TokenCounter(str.split).to_json() is None


def test_truncation_and_padding_are_not_in_the_json():
    tokenizer = chat_tokenizer()
    tokenizer("x", padding="max_length", truncation=True, max_length=8)
    plain = Tokenizer.from_str(TokenCounter(tokenizer).to_json())
    assert len(plain.encode("x" * 20).ids) == 20
    assert len(plain.encode("x").ids) == 1

"""FLUX.2-dev's folder names a processor, but can be loaded without torchvision."""

import json
import shutil

import pytest

from jobs.errors import ModelUnavailable
from pipelines.load import load_pipeline, read_card
from pipelines.loading.checkpoint import find_checkpoint
from pipelines.loading.processors import tokenizers_of
from tests.pipelines.serving import entry
from tests.pipelines.tiny_parts import MISTRAL_TEMPLATE

PROCESSOR = {"tokenizer": "PixtralProcessor", "text_encoder": "Mistral3ForConditionalGeneration"}


def test_a_processor_is_replaced_with_its_tokenizer(tiny_folder):
    folder = tiny_folder("Flux2")
    assert find_checkpoint(entry(folder)).components["tokenizer"] == "PixtralProcessor"
    pipeline = load_pipeline(entry(folder, max_sequence_length=320), "cpu")
    assert not hasattr(pipeline.family.pipe.tokenizer, "image_processor")
    assert pipeline.card.prompt.before.startswith("<s>[SYSTEM_PROMPT]You are an AI")


def test_only_listed_processors_are_replaced_unless_given(tiny_folder):
    folder = tiny_folder("Flux2")
    assert list(tokenizers_of(folder, PROCESSOR, loaded=())) == ["tokenizer"]
    assert tokenizers_of(folder, PROCESSOR, loaded={"tokenizer": None}) == {}
    assert tokenizers_of(folder, {"tokenizer": "Qwen2VLProcessor"}, loaded=()) == {}


@pytest.mark.parametrize("name", ["Flux2", "Chroma"])
def test_the_card_does_not_need_the_weights(tiny_folder, name):
    model = entry(tiny_folder(name), max_sequence_length=320)
    card, tokenizer = read_card(model)
    pipeline = load_pipeline(model, "cpu")
    assert (card, tokenizer) == (pipeline.card, pipeline.tokenizer_json())


def test_a_template_that_gives_different_tokens_is_refused(tiny_folder, tmp_path):
    """The processor would add the <s> itself."""
    shutil.copytree(tiny_folder("Flux2"), tmp_path / "model")
    template = tmp_path / "model" / "tokenizer" / "chat_template.jinja"
    assert template.read_text() == MISTRAL_TEMPLATE
    template.write_text(MISTRAL_TEMPLATE.removeprefix("{{ bos_token }}"))
    with pytest.raises(ModelUnavailable, match=r"tokenizer doesn't begin with .*'<s>'"):
        load_pipeline(entry(tmp_path / "model"), "cpu")


def test_a_folder_without_the_tokenizer_is_refused(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder("Flux2"), tmp_path / "model")
    config = tmp_path / "model" / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    (tmp_path / "model" / "tokenizer" / "chat_template.jinja").unlink()
    config.write_text(json.dumps(settings | {"chat_template": None}))
    with pytest.raises(ModelUnavailable, match="chat_template"):
        load_pipeline(entry(tmp_path / "model"), "cpu")

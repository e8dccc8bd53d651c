"""Components of tiny pipelines: tokenizers of single bytes, text encoders, VAEs."""

from typing import Any

import diffusers as d
import transformers as t
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

BYTES = sorted(ByteLevel.alphabet())
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% set text = m['content'] if m['content'] is string "
    "else m['content'] | map(attribute='text') | join %}{% if m['role'] == 'system' %}"
    "[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ text }}[/INST]{% endif %}"
    "{% endfor %}"
)
MISTRAL_TOKENS = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]")
WIDTH = 32
"""Hidden size of most parts."""


def clip_tokenizer() -> Any:
    tokens = [*BYTES, *(byte + "</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return t.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocab += [(chr(code), -3.0) for code in range(33, 127)]
    return t.T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def chat_tokenizer() -> Any:
    tokens = [*BYTES, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = t.Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=4096)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def mistral_tokenizer() -> Any:
    """Adds <s> before a text, like FLUX.2-dev's tokenizer and template."""
    tokens = ["<s>", "</s>", "<pad>", *MISTRAL_TOKENS, *BYTES]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=list(MISTRAL_TOKENS),
        model_max_length=4096,
        chat_template=MISTRAL_TEMPLATE,
    )


def mistral(layers: int) -> Any:
    text = {
        "model_type": "mistral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 264,
        "max_position_embeddings": 4096,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    config = t.Mistral3Config(text_config=text, vision_config=vision, image_token_index=7)
    return t.Mistral3ForConditionalGeneration(config)


def clip(kind: Any = t.CLIPTextModel, hidden: int = WIDTH) -> Any:
    config = t.CLIPTextConfig(
        vocab_size=514,
        hidden_size=hidden,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        projection_dim=WIDTH,
        max_position_embeddings=77,
    )
    return kind(config)


def t5() -> Any:
    return t.T5EncoderModel(
        t.T5Config(
            vocab_size=98,
            d_model=WIDTH,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def qwen3(kind: Any, layers: int) -> Any:
    return kind(
        t.Qwen3Config(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=259,
            max_position_embeddings=4096,
        )
    )


def vae(channels: int, scaling: float, shift: float | None = None, quant: bool = False) -> Any:
    return d.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        shift_factor=shift,
        scaling_factor=scaling,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )

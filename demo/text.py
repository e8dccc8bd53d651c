"""The two text encoders: CLIP for the whole sentence, T5 for its words.

Flux has no mask for text, so every pad token reaches the picture. Here T5 is built so
that words and pads never attend to each other. All pads then have the same constant
output vector, however many there are. A transformer that's trained with this vector,
and with a bias for its number of repetitions, works with any text length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from demo.tokenizers import MODEL_MAX_LENGTH, clip_tokenizer, t5_tokenizer

WIDTH: Final = 96
HEAD: Final = 32
TEXT_TOKENS: Final = 24
"""The text length in training; captions are shorter, except with long nonsense words."""

CLIP_END: Final = 1
T5_PAD: Final = 0


class Tokens(NamedTuple):
    """Token ids of N sentences, each (N, TEXT_TOKENS)."""

    clip: Tensor
    t5: Tensor


def tokenize(tokenizer: Any, tokenizer_2: Any, sentences: Sequence[str]) -> Tokens:
    """CLIP's and T5's tokens, padded and cut to the length for training."""
    how = {
        "padding": "max_length",
        "truncation": True,
        "max_length": TEXT_TOKENS,
        "return_tensors": "pt",
    }
    clip = tokenizer(list(sentences), **how).input_ids
    clip[:, -1] = CLIP_END  # a cut sentence still needs its end token
    return Tokens(clip, tokenizer_2(list(sentences), **how).input_ids)


@dataclass(frozen=True)
class TextEncoders:
    """Both encoders with their tokenizers, under the names that FluxPipeline uses."""

    tokenizer: Any
    tokenizer_2: Any
    text_encoder: Any
    text_encoder_2: Any

    def pooled(self, clip_tokens: Tensor) -> Tensor:
        """(N, WIDTH): CLIP's output at each sentence's end."""
        longest = int((clip_tokens != CLIP_END).sum(1).max()) + 1
        output: Tensor = self.text_encoder(clip_tokens[:, :longest]).pooler_output
        return output

    def words(self, t5_tokens: Tensor) -> Tensor:
        """(N, tokens, WIDTH): T5's output for every token, pads included."""
        output: Tensor = self.text_encoder_2(t5_tokens)[0]
        return output


def build_text_encoders() -> TextEncoders:
    """Untrained encoders over the fixed vocabulary."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    clip, t5 = _build_clip(len(tokenizer)), _build_t5(len(tokenizer_2))
    keep_pads_apart(t5)
    return TextEncoders(tokenizer, tokenizer_2, clip.eval(), t5.eval())


def _build_clip(vocabulary: int) -> Any:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=WIDTH // HEAD,
        max_position_embeddings=MODEL_MAX_LENGTH,
        bos_token_id=0,
        eos_token_id=CLIP_END,
        pad_token_id=CLIP_END,
        hidden_act="gelu",
    )
    clip = CLIPTextModel(config)
    for name, parameter in clip.named_parameters():
        if "embedding" in name:
            nn.init.normal_(parameter, 0.0, 0.3)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
    return clip


def _build_t5(vocabulary: int) -> Any:
    config = T5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=HEAD,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=WIDTH // HEAD,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=T5_PAD,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    t5 = T5EncoderModel(config)
    for name, parameter in t5.named_parameters():
        if "shared" in name:
            nn.init.normal_(parameter, 0.0, 1.0)
        elif "relative" in name:  # strong from the start: "left of" depends on it
            nn.init.normal_(parameter, 0.0, 2.0)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
    return t5


@torch.no_grad()
def keep_pads_apart(t5: Any) -> None:
    """Restore the weights that separate words from pads; call it after each step.

    Channels 0 and 1 of the residual stream mark a token's kind: (0, 4) for a word,
    (-4, -4) for a pad. No layer writes to them. One query and key channel of each
    head reads only them, and its product is very negative between word and pad.
    """
    embedding = t5.shared.weight
    embedding[:, 0], embedding[:, 1] = 0.0, 4.0
    embedding[T5_PAD] = 0.0
    embedding[T5_PAD, :2] = -4.0
    for block in t5.encoder.block:
        layer, feed_forward = block.layer[0], block.layer[1]
        layer.layer_norm.weight[:2] = 1.0
        layer.SelfAttention.o.weight[:2] = 0.0
        feed_forward.DenseReluDense.wo.weight[:2] = 0.0
        for projection, channel in ((layer.SelfAttention.q, 1), (layer.SelfAttention.k, 0)):
            projection.weight[::HEAD] = 0.0
            projection.weight[::HEAD, channel] = 6.0

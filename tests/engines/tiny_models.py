"""Tiny random models with a byte-level tokenizer, as Hugging Face folders, and what transformers answers with them.

``python tiny_models.py FOLDER REFERENCE``: a process of its own, because transformers imports torchvision, which needs
the stand-ins of ``tools/sglang_cpu`` beside a CPU build of torch. Seeded, so that runs can be repeated.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import draft_heads
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 512
EOS_TOKEN = 2
HEAD_DIM = 64
LAYERS = 2
KV_HEADS = 2
MAX_POSITIONS = 4096
# Wide enough that attention decides which token wins; at the usual 0.02 the last token alone does.
_INITIALIZER_RANGE = 0.08


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A model of one architecture.

    Args:
        name: folder name.
        qwen3: Qwen3, which normalises Q and K in every head, and not Llama.
        group: query heads of one kv head.
    """

    name: str
    qwen3: bool
    group: int


LLAMA_GROUP_3 = TinyModel("llama-group-3", qwen3=False, group=3)
QWEN3_GROUP_2 = TinyModel("qwen3-group-2", qwen3=True, group=2)
MODELS = (LLAMA_GROUP_3, QWEN3_GROUP_2)
# Half of its layers keep a recurrent state; bfloat16, in which alone vLLM computes these on a CPU.
HYBRID = "qwen3-next"
HYBRID_INTERVAL = 2
# Drafts for the second model, as SGLang reads it.
EAGLE_HEAD, EAGLE3_HEAD = "eagle-head", "eagle3-head"
# The hybrid with a head that drafts for it.
HYBRID_WITH_MTP = "qwen3-next-mtp"
# Every other layer has a window.
WINDOWED, WINDOW = "gemma3", 96
# The same with weights that keep it from repeating its last token, so that greedy tokens tell what was attended to.
TALKATIVE = "gemma3-talkative"
_NORM_WEIGHT = 15
# Every other layer has the same window, and all have learned sinks, which take about half of the weight.
SINKS = "gpt-oss"
_SINK_LOGIT = 6
# Multi-head latent attention, of the only widths that vLLM attends to on a CPU.
LATENT = "deepseek-v2"
LATENT_DIM, ROPE_DIM = 512, 64
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": MAX_POSITIONS // 2,
    "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip

# Prompts, one seed each, whose answers by transformers are kept.
REFERENCE_LENGTHS = (5, 127, 128, 300, 530)
REFERENCE_TOKENS = 24


def prompt(length: int, seed: int = 0) -> list[int]:
    """Return random tokens, none of them special. Prompts of one seed are prefixes of each other."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tokens: list[int] = torch.randint(3, VOCABULARY, (MAX_POSITIONS,), generator=generator)[:length].tolist()
    return tokens


def reference_prompts() -> list[list[int]]:
    """Return the prompts whose answers by transformers are kept."""
    return [prompt(length, seed=length) for length in REFERENCE_LENGTHS]


def main(folder: Path, reference: Path) -> None:
    """Save all models, and the greedy answers of transformers by model name, in the order of `REFERENCE_LENGTHS`."""
    answers = {}
    for model in MODELS:
        built = _build(model)
        built.save_pretrained(folder / model.name)
        _save_tokenizer(folder / model.name)
        answers[model.name] = [_greedy_tokens(built, tokens, REFERENCE_TOKENS) for tokens in reference_prompts()]
    _build_windowed().save_pretrained(folder / WINDOWED)
    others = {HYBRID: _build_hybrid(), TALKATIVE: _build_talkative(), LATENT: _build_latent(), SINKS: _build_sinks()}
    for name, built in others.items():
        built.save_pretrained(folder / name)
        answers[name] = [_greedy_tokens(built.float(), tokens, REFERENCE_TOKENS) for tokens in reference_prompts()]
    _name(folder / HYBRID / "config.json", full_attention_interval=HYBRID_INTERVAL)
    _name(folder / LATENT / "config.json", moe_layer_freq=1)
    for name in (LATENT, SINKS):
        _save_tokenizer(folder / name)
    draft_heads.save_eagle_head(folder / QWEN3_GROUP_2.name, folder / EAGLE_HEAD)
    draft_heads.save_eagle3_head(folder / QWEN3_GROUP_2.name, folder / EAGLE3_HEAD, (-1, 0))
    draft_heads.save_with_mtp(folder / HYBRID, folder / HYBRID_WITH_MTP)
    reference.write_text(json.dumps(answers))


def _build(model: TinyModel) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    heads = KV_HEADS * model.group
    config_class, model_class = (Qwen3Config, Qwen3ForCausalLM) if model.qwen3 else (LlamaConfig, LlamaForCausalLM)
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=heads * HEAD_DIM,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=_INITIALIZER_RANGE,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS_TOKEN,
    )
    torch.manual_seed(0)
    return model_class(config).to(torch.float32)


def _build_hybrid() -> PreTrainedModel:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=4 * HEAD_DIM,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2 * LAYERS,
        full_attention_interval=HYBRID_INTERVAL,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=_INITIALIZER_RANGE,
        bos_token_id=1,
        eos_token_id=EOS_TOKEN,
    )
    torch.manual_seed(0)
    return Qwen3NextForCausalLM(config).to(torch.bfloat16)


def _name(path: Path, **settings: int) -> None:
    """Add to a configuration what transformers no longer writes and SGLang reads; checkpoints in use have it."""
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def _build_windowed() -> PreTrainedModel:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=4 * HEAD_DIM,
        intermediate_size=512,
        num_hidden_layers=2 * LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        layer_types=["sliding_attention", "full_attention"] * LAYERS,
        sliding_window=WINDOW,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=_INITIALIZER_RANGE,
        bos_token_id=1,
        eos_token_id=EOS_TOKEN,
    )
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).to(torch.float32)


def _build_talkative() -> PreTrainedModel:
    """The same, but for what layers add to a token: it outweighs the token's own embedding, the output matrix too."""
    model = _build_windowed()
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data.fill_(_NORM_WEIGHT)
        layer.post_feedforward_layernorm.weight.data.fill_(_NORM_WEIGHT)
    return model


def _build_sinks() -> PreTrainedModel:
    from transformers import GptOssConfig, GptOssForCausalLM

    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0}
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=4 * HEAD_DIM,
        intermediate_size=64,
        num_hidden_layers=2 * LAYERS,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        layer_types=["sliding_attention", "full_attention"] * LAYERS,
        sliding_window=WINDOW,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=yarn | {"original_max_position_embeddings": MAX_POSITIONS // 2, "truncate": False},
        initializer_range=_INITIALIZER_RANGE,
        bos_token_id=1,
        eos_token_id=EOS_TOKEN,
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).to(torch.float32)
    for layer in model.model.layers:
        # SGLang keeps them in bfloat16
        layer.self_attn.sinks.data = (_SINK_LOGIT + 2 * torch.randn(4)).bfloat16().float()
    return model


def _build_latent() -> PreTrainedModel:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=LATENT_DIM,
        qk_rope_head_dim=ROPE_DIM,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        # The only kind that SGLang computes on a CPU.
        rope_parameters=_YARN,
        initializer_range=_INITIALIZER_RANGE,
        bos_token_id=1,
        eos_token_id=EOS_TOKEN,
    )
    torch.manual_seed(0)
    return DeepseekV2ForCausalLM(config).to(torch.float32)


def _greedy_tokens(model: PreTrainedModel, tokens: list[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([tokens])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    generated: list[int] = out[0, len(tokens) :].tolist()
    return generated


def _save_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"<x{index}>" for index in range(len(pieces), VOCABULARY)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

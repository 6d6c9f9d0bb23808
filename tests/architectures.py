"""A tiny random model of every causal architecture that the installed transformers can build; run as a script, which of them a tree mask serves.

`python tests/architectures.py --out data/results/architectures.json`
"""
import argparse
import copy
import inspect
import json
import time
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

V, LARGEST = 151, 8e6   # the character tokenizer's vocabulary; parameters of what still counts as tiny

_SIZES = {
    V: "vocab_size audio_vocab_size vocab_size_per_layer_input",
    32: "hidden_size n_embd d_model dim embedding_size word_embed_proj_dim moe_intermediate_size shared_expert_intermediate_size "
        "expert_ffn_hidden_size shared_intermediate_size lru_width attention_hidden_size",
    64: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff n_inner ffn_hidden_size ffn_intermediate_size inner_dim mamba_d_ssm "
        "attention_window_size block_size",
    4: "num_hidden_layers n_layer n_layers num_layers num_local_experts num_experts n_routed_experts moe_num_experts mamba_n_heads "
       "mamba_num_heads mamba_dt_rank time_step_rank mamba_d_conv",
    2: "decoder_layers encoder_layers num_decoder_layers num_encoder_layers num_attention_heads n_head n_heads num_heads decoder_attention_heads "
       "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads num_key_value_heads num_kv_heads multi_query_group_num "
       "num_experts_per_tok num_experts_per_token moe_topk moe_k o_groups index_n_heads mamba_expand n_mamba_heads linear_num_key_heads "
       "linear_num_value_heads altup_num_inputs num_codebooks",
    16: "head_dim attention_head_dim q_lora_rank kv_lora_rank qk_head_dim v_head_dim index_head_dim mamba_d_head mamba_head_dim mamba_headdim "
        "mamba_chunk_size chunk_size linear_key_head_dim linear_value_head_dim global_head_dim num_buckets key_value_proj_dim image_size patch_size",
    512: "max_position_embeddings max_target_positions n_positions n_ctx max_seq_len index_topk",
    8: "rotary_dim qk_rope_head_dim qk_nope_head_dim o_lora_rank state_size mamba_d_state hidden_size_per_layer_input laurel_rank",
    1: "n_group topk_group n_shared_experts zero_expert_num num_shared_experts mamba_n_groups n_groups mamba_ngroups bos_token_id eos_token_id "
       "first_k_dense_replace num_random_blocks",
    0: "pad_token_id num_kv_shared_layers hash_seed rescale_every",
    0.3: "initializer_range init_std",   # larger than usual: logits that are flat would hide what is wrong
    4096: "sliding_window attention_chunk_size",
}
SMALL = {name: value for value, names in _SIZES.items() for name in names.split()} | {
    **dict.fromkeys("dropout attention_dropout residual_dropout activation_dropout layerdrop".split(), 0.0), "use_mamba_kernels": False}
OWN = {   # what a config asks for beside its sizes
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]), "mamba2": dict(num_heads=4, expand=2), "zaya": dict(num_experts_per_tok=1),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2), "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "deepseek_v3": dict(head_dim=8), "axk1": dict(head_dim=8), "longcat_flash": dict(head_dim=8), "youtu": dict(head_dim=8),
    "codegen": dict(n_head=4),
    "reformer": dict(axial_pos_shape=[16, 32], axial_pos_embds_dim=[16, 16], attn_layers=["local", "lsh"], num_hidden_layers=2),
    "zamba2": dict(layer_types=["mamba", "hybrid"] * 2), "mimo_v2_flash": dict(v_head_dim=16, head_dim=16, swa_head_dim=16, swa_v_head_dim=16),
}


def _options(cls):
    "The fields of `SMALL` that a config class has, and its sub-configs."
    have = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "__dataclass_fields__", ()))
    try: have |= set(vars(cls()))
    except Exception: pass
    mapped = getattr(cls, "attribute_map", {})
    subs = {name: _options(sub) for name, sub in (getattr(cls, "sub_configs", None) or {}).items() if hasattr(sub, "model_type")}
    found = {k: v for k, v in SMALL.items() if k in have or k in mapped}
    return {**{k: v for k, v in found.items() if mapped.get(k) not in found}, **subs}


def build(kind, **options):
    "A tiny random model, float32, in eval mode. Raises whatever its config or its constructor raises, `ValueError` for one that is not tiny."
    cls, model_cls = CONFIG_MAPPING[kind], getattr(transformers, NAMES[kind])
    config = cls(**{**_options(cls), **OWN.get(kind, {}), **options})
    if hasattr(config, "is_decoder"): config.is_decoder = True
    if model_cls.config_class is not cls: config = config.get_text_config(decoder=True)
    with torch.device("meta"): size = sum(p.numel() for p in model_cls(copy.deepcopy(config)).parameters())
    if size > LARGEST: raise ValueError(f"{size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    return model_cls(config).float().eval()


def verdict(kind) -> dict:
    "Was it built, is it served, why not, and what did asking cost?"
    from threadweaver_ref.scoring import check_model
    try: model = build(kind)
    except Exception as error: return {"verdict": "not built", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
    began = time.perf_counter()
    try: check_model(model)
    except ValueError as error:   # a model that cannot run at all was built from sizes that do not fit
        row = {"verdict": "not built" if "cannot run alone" in str(error) else "refused", "why": str(error)}
    else: row = {"verdict": "served"}
    return {**row, "seconds": round(time.perf_counter() - began, 3)}


def main():
    from threadweaver_ref.evaluate import provenance, public_path
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    rows = {kind: verdict(kind) for kind in NAMES}
    for kind, row in rows.items(): print(f"{kind:28} {row['verdict']:10} {row.get('why', '')}")
    counts = {v: sum(row["verdict"] == v for row in rows.values()) for v in ("served", "refused", "not built")}
    print(counts)
    about = provenance(f"python tests/architectures.py --out {public_path(out)}", public_path(out), 0) if out else {}
    if out: out.write_text(json.dumps({**about, "counts": counts, "architectures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    main()

# SPDX-License-Identifier: Apache-2.0
"""How near every model family is to `transformers` (extra: parity): prints the README's table of relative errors.

    python experiments/parity.py [--real smollm2-135m-instruct,gemma3-270m] [--json]

For each family a small random model of transformers is saved and read by us. Columns: logits of whole sequences,
logits of branches forked from one prefix (transformers gets each as a sequence of its own), and the gradient of the
next-token loss for every tensor. Errors are relative to the largest reference value, for gradients a norm over a norm,
the worst tensor; float32 on both sides. `--real` adds checkpoints, read here, exported, and read by transformers.
"""

import argparse
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from rlp_jax.checkpoints_io.load import load, save_hf
from rlp_jax.checkpoints_io.names import disassemble
from rlp_jax.models.cache import fork

SMALL = {
    "vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": None,
    "attn_implementation": "eager",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES = {
    "Llama, SmolLM2": ("llama", {}),
    "Llama 3.1 and later": ("llama", {"rope_parameters": LLAMA3}),
    "Qwen2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Gemma 3 text": (
        "gemma3_text",
        {"rope_parameters": GEMMA_ROPE, "sliding_window": 7, "query_pre_attn_scalar": 24,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "Nemotron-H": (
        "nemotron_h",
        {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"] * 2, "mamba_num_heads": 8,
         "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16, "eos_token_id": None,
         "num_hidden_layers": None},
    ),
}  # fmt: skip


def worst(ours, theirs) -> float:
    """The largest difference over the largest reference value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def their_logits(peer, tokens_BT):
    import torch

    with torch.no_grad():
        return peer(torch.from_numpy(np.asarray(tokens_BT, np.int64)), use_cache=False).logits.numpy()


def small_pair(model_type: str, fields: dict):
    """A random model of transformers, and what we read of it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in {**SMALL, **fields}.items() if value is not None or "token" in name}
    torch.manual_seed(0)
    peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).float().eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            shift = 1.0 if "norm" in name and model_type != "gemma3_text" else 0.0
            parameter.copy_(torch.randn_like(parameter) * 0.2 + shift)
    return peer


def read_back(peer):
    from rlp_jax.checkpoints_io.huggingface import read_directory
    from rlp_jax.models.transformer import LanguageModel

    with tempfile.TemporaryDirectory() as directory:
        peer.save_pretrained(directory)
        config, params = read_directory(directory)
        return LanguageModel(config), jax.tree.map(jnp.asarray, params)


def branch_error(peer, model, params) -> float:
    """Three branches a document, ragged, after one pass over the documents."""
    rng = np.random.default_rng(1)
    document_BT, branch_BRS = rng.integers(0, 199, (2, 40)), rng.integers(0, 199, (2, 3, 9))
    length_BR = np.array([[40, 23, 3], [7, 1, 40]])
    _, cache = model.apply(params, document_BT, stops_BK=length_BR)
    ours_BRSV, _ = model.apply(params, branch_BRS, fork(cache, length_BR))
    theirs_BRSV = np.empty(ours_BRSV.shape)
    for b, r in np.ndindex(*length_BR.shape):
        sequence = np.concatenate([document_BT[b, : length_BR[b, r]], branch_BRS[b, r]])
        theirs_BRSV[b, r] = their_logits(peer, sequence[None])[0, -9:]
    return worst(ours_BRSV, theirs_BRSV)


def gradient_error(peer, model, params, tokens_BT) -> float:
    import torch

    tokens = torch.from_numpy(tokens_BT)
    peer(tokens, labels=tokens, use_cache=False).loss.backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in peer.named_parameters()}

    def loss(params):
        logprob_BTV = jax.nn.log_softmax(model.apply(params, tokens_BT)[0][:, :-1])
        return -jnp.take_along_axis(logprob_BTV, tokens_BT[:, 1:, None], -1).mean()

    ours = {name: read() for name, _, read in disassemble(model.config, jax.grad(loss)(params))}
    if len(ours) != len(theirs):
        raise SystemExit(f"we have {len(ours)} tensors, transformers {len(theirs)}")
    # Published Nemotron-H checkpoints name tensors otherwise than the class in memory: match by the last parts.
    suffix = {name.split(".", 1)[1].replace("norm_f", "norm"): value for name, value in theirs.items()}
    errors = []
    for name, gradient in ours.items():
        match = theirs.get(name)
        if match is None:
            match = suffix[name.split(".", 1)[1].replace("norm_f", "norm")]
        errors.append(np.linalg.norm(gradient - match.reshape(gradient.shape)) / np.linalg.norm(match))
    return float(max(errors))


def real_error(preset: str, tokens: int = 48) -> float:
    """Logits of a checkpoint on random tokens: ours, and those of transformers on our export."""
    import torch
    from transformers import AutoModelForCausalLM

    model, params, tokenizer = load(preset)
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "model"
        save_hf(path, model, params, tokenizer)
        peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens_BT = np.random.default_rng(0).integers(5, tokenizer.vocab_size, (1, tokens))
    return worst(model.apply(params, tokens_BT)[0], their_logits(peer, tokens_BT))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", default="", help="presets with weights, separated by commas")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()

    result = {}
    print("| family | logits | branches | gradient |\n|---|---|---|---|")
    for family, (model_type, fields) in FAMILIES.items():
        peer = small_pair(model_type, fields)
        model, params = read_back(peer)
        tokens_BT = np.random.default_rng(0).integers(0, 199, (2, 60))
        row = {
            "logits": worst(model.apply(params, tokens_BT)[0], their_logits(peer, tokens_BT)),
            "branches": branch_error(peer, model, params),
            "gradient": gradient_error(peer, model, params, tokens_BT),
        }
        result[family] = row
        print(f"| {family} | " + " | ".join(f"{value:.1e}" for value in row.values()) + " |", flush=True)
    for preset in filter(None, args.real.split(",")):
        result[preset] = {"logits": real_error(preset)}
        print(f"| {preset} | {result[preset]['logits']:.1e} | | |", flush=True)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

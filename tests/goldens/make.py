# SPDX-License-Identifier: Apache-2.0
"""Makes the goldens of this directory with transformers: tiny random models, and real ones from their GGUF files.

    python tests/goldens/make.py [smollm2 | nemotron_h | dense | gemma3 | gemma3_lines TOKENIZER_JSON]

Without arguments, all but the last. Needs the extra "parity", and `accelerate`, which transformers asks for to open a
GGUF file. Nothing of rlp_jax takes part but the path of the weights. One correction: transformers leaves out the
splitting rule that SmolLM2's published tokenizer.json has and the file calls "smollm" (every digit apart, before
GPT-2's rule), so "\\n\\n1" would come out as three tokens where the model was trained on two. It is set here.

smollm2_logits.npz, gemma3_logits.npz: for each prompt its ids, and at some positions the 64 largest logits, their ids,
and the logsumexp.
tokenizer_lines.json: varied lines of text and their ids in SmolLM2's tokenizer.
gemma3_lines.json: some of them in Gemma 3's, by its published tokenizer.json.
nemotron_h.npz: a tiny random Nemotron-H of transformers. Its config.json, its weights (float16 numbers), token ids,
logits of the whole sequences, and logits of a prefill followed by single tokens.
dense.npz: the models of tests/tiny_dense.py. For each its config.json, logits of two sequences, and for each tensor the
norm of the next-token loss's gradient and its product with a direction that is drawn like a weight.
"""

import json
import pathlib
import random
import sys
import unicodedata

import numpy as np

HERE = pathlib.Path(__file__).parent
PROMPTS = (
    "The capital of France is",
    "<|im_start|>user\nWhat is 17 + 25? Think step by step.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n\n"
    "\ndef main():\n",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?\n" * 12,
)
TOP = 64
POSITIONS = 8

SENTENCES = (
    "It's the dog's bone; they're sure we'll find what I'd lost, don't you think? I'm sure you've SEEN IT'S Tail.",
    "In 1729 = 1³ + 12³ = 9³ + 10³, x₂ ≈ 3.14159, ½ + ¼ = ¾, №5, Ⅷ, ٣٤٥, १२३, 四十二.",
    "Größe über alles, naïve café façade, Æsop's œuvre, ÅNGSTRÖM, ıİ, ß, ſ.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "זה כיף סתם לשמוע איך תנצח קרפד עץ טוב בגן.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण",
    "いろはにほへと ちりぬるを カタカナ ﾊﾝｶｸ 漢字仮名交じり文。",
    "我能吞下玻璃而不伤身体。「引號」，句號。",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈👍🏽 ❤️ ☃ ♞ 🇫🇷",
    "e\u0301 versus \u00e9, A\u030a versus \u00c5, \u1112\u1161\u11ab versus \ud55c, \ufb01 ligature, \u212b",
    "zero\u200bwidth, nbsp\u00a0here, soft\u00adhyphen, \ufeffbom, \u2028line\u2029paragraph, ideographic\u3000space",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; } // comment",
    "    def __init__(self, *args, **kwargs) -> None:\n\t\tsuper().__init__()\r\n\r\n\n\n  return f'{x!r:>10}'",
    "SELECT COUNT(*) FROM `users` WHERE id <> 42 AND name LIKE '%o''Brien%';",
    r"\begin{align} \frac{\partial f}{\partial x} &= \sum_{i=1}^{n} x_i^2 \\ \end{align}",
    "https://example.org/a?b=c&d=%20e#f  mailto:someone+tag@example.com 192.168.0.1 2024-02-29T23:59:60Z",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <think>maybe</think> <|not_a_token|> <file_sep>",
    "!!!??? ... --- === ~~~ ''' \"\"\" ``` ((())) [[]] {{}} <>& $100 €5 £3 ¥1 50% #1 @me *x* _y_",
    "ALLCAPSWORD camelCaseWord snake_case_word kebab-case-word x1y2z3 v2.0.1-rc3 3rd 1,000,000",
    "",
    " ",
    "\n",
    "\t\t  \n \n  x",
    "\x00\x01\x7f control",
)


def lines() -> list[str]:
    """About 400 lines: the sentences above, their pieces with odd white space, and random Unicode."""
    rng = random.Random(0)
    result = list(SENTENCES) + [unicodedata.normalize("NFD", line) for line in SENTENCES]
    words = [word for line in SENTENCES for word in line.split(" ") if word]
    spaces = [" ", "  ", "   ", "\t", "\n", " \n", "\n\n", "\r\n", "\u00a0", " \t ", "\u3000"]
    for _ in range(200):
        result.append("".join(rng.choice(words) + rng.choice(spaces) for _ in range(rng.randint(1, 12))))
    for _ in range(60):
        result.append("".join(rng.choice("0123456789.,+-*/=() x") for _ in range(rng.randint(1, 40))))
    blocks = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x2000, 0x2BFF), (0x3040, 0x30FF), (0x1F300, 0x1FAFF)]
    for _ in range(80):
        low, high = rng.choice(blocks)
        result.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 20))))
    return result


def smollm2() -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlp_jax.checkpoints_io.fetch import fetch
    from rlp_jax.models.presets import WEIGHTS

    path = fetch(WEIGHTS["smollm2-135m-instruct"])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in PROMPTS]
    np.savez_compressed(HERE / "smollm2_logits.npz", **top_logits(model, ids))
    texts = lines()
    write_lines("tokenizer_lines.json", texts, [tokenizer(text, add_special_tokens=False).input_ids for text in texts])


def top_logits(model, prompts: list[list[int]]) -> dict[str, np.ndarray]:
    """What is kept of a real model's logits."""
    import torch

    arrays = {}
    for number, ids_T in enumerate(prompts):
        position_P = np.unique(np.linspace(0, len(ids_T) - 1, POSITIONS).astype(np.int32))
        with torch.no_grad():
            kept = torch.from_numpy(position_P).long()
            logits_PV = model(torch.tensor([ids_T]), logits_to_keep=kept).logits[0].double()
        top = logits_PV.topk(TOP)
        arrays |= {
            f"ids_{number}": np.asarray(ids_T, np.int32),
            f"position_{number}": position_P,
            f"top_ids_{number}": top.indices.numpy().astype(np.int32),
            f"top_logits_{number}": top.values.numpy().astype(np.float32),
            f"logsumexp_{number}": logits_PV.logsumexp(-1).numpy().astype(np.float32),
        }
    return arrays


def write_lines(file: str, texts: list[str], ids: list[list[int]]) -> None:
    rows = ",\n".join(json.dumps([text, row], separators=(",", ":")) for text, row in zip(texts, ids, strict=True))
    (HERE / file).write_text(f"[\n{rows}\n]\n", encoding="utf-8")


def gemma3() -> None:
    """The base model; the last prompt is longer than its window of 512 tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlp_jax.checkpoints_io.fetch import fetch
    from rlp_jax.models.presets import WEIGHTS

    path = fetch(WEIGHTS["gemma3-270m"])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    prompts = (PROMPTS[0], PROMPTS[2], PROMPTS[3] + PROMPTS[3][: len(PROMPTS[3]) // 2])
    ids = [[2, *tokenizer(prompt, add_special_tokens=False).input_ids] for prompt in prompts]
    assert len(ids[-1]) > 512 + 32
    np.savez_compressed(HERE / "gemma3_logits.npz", **top_logits(model, ids))


def gemma3_lines(tokenizer_json: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_json)
    texts = [*lines()[:30], *lines()[60::14], "<start_of_turn>user\nhi<end_of_turn>\n<table><tr><td>x</td></table>"]
    texts += ["a literal \u2581\u2581 mark", " " * 70 + "x", "\n" * 40 + "x", "\t" * 35]
    write_lines("gemma3_lines.json", texts, [tokenizer.encode(text, add_special_tokens=False).ids for text in texts])


def dense() -> None:
    import torch

    sys.path.insert(0, str(HERE.parent))
    from tiny_dense import TINY, draw, reference_model

    tokens_BT = np.random.default_rng(0).integers(0, 101, (2, 24))
    arrays = {"tokens": tokens_BT.astype(np.int32)}
    for name, shape in TINY.items():
        model = reference_model(**shape)
        out = model(torch.from_numpy(tokens_BT), labels=torch.from_numpy(tokens_BT))
        out.loss.backward()
        arrays[f"{name} config"] = json.dumps(model.config.to_dict())
        arrays[f"{name} logits"] = out.logits.detach().numpy()
        for tensor, parameter in model.named_parameters():
            gradient = parameter.grad.double().numpy()
            along = (gradient * draw(tensor, gradient.shape, shape["family"])).sum()
            arrays[f"{name} gradient {tensor}"] = np.array([np.linalg.norm(gradient), along], np.float32)
    np.savez_compressed(HERE / "dense.npz", **arrays)


def nemotron_h() -> None:
    import torch
    import transformers

    config = transformers.NemotronHConfig(
        vocab_size=41, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=6, intermediate_size=20,
        layers_block_type=["linear_attention", "mlp", "full_attention"] * 2 + ["linear_attention", "mlp"],
        mamba_num_heads=6, mamba_head_dim=4, ssm_state_size=5, n_groups=2, conv_kernel=4, chunk_size=8,
        layer_norm_epsilon=1e-3, max_position_embeddings=64, attn_implementation="eager",
        time_step_min=1e-30,  # its prefill raises smaller steps to this, its decoding does not: keep them apart
    )  # fmt: skip
    model = transformers.NemotronHForCausalLM(config).float().eval()
    rng = np.random.default_rng(0)
    weights = {}
    for name, parameter in model.named_parameters():
        value = (0.3 * rng.normal(size=parameter.shape) + ("norm" in name)).astype(np.float16)
        parameter.data = torch.from_numpy(value.astype(np.float32))
        weights[f"weight {name}"] = value
    tokens_BT, prompt = rng.integers(0, config.vocab_size, (2, 21)), 13
    with torch.no_grad():
        tokens = torch.from_numpy(tokens_BT)
        whole_BTV = model(tokens).logits.numpy()
        step = model(tokens[:, :prompt], use_cache=True)
        decoded = [step.logits[:, -1]]
        for t in range(prompt, tokens_BT.shape[1]):
            step = model(tokens[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
            decoded.append(step.logits[:, -1])
    np.savez_compressed(
        HERE / "nemotron_h.npz", config=json.dumps(config.to_dict()), tokens=tokens_BT.astype(np.int32),
        logits=whole_BTV, prompt=prompt, decoded=torch.stack(decoded, 1).numpy(), **weights,
    )  # fmt: skip


if __name__ == "__main__":
    makers = {"smollm2": smollm2, "nemotron_h": nemotron_h, "dense": dense, "gemma3": gemma3}
    if sys.argv[1:2] == ["gemma3_lines"]:
        gemma3_lines(sys.argv[2])
    else:
        for name in sys.argv[1:] or makers:
            makers[name]()

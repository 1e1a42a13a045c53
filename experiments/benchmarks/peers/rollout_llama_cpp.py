# SPDX-License-Identifier: Apache-2.0
"""Rollouts with llama.cpp: each document is decoded once, its G sequences copy its cells (seq_cp), and all live
sequences go into one llama_batch a token. A sequence that has its length leaves the batch.

The sampler is llama.cpp's own (temperature, then a draw from the whole distribution), one a sequence.
"""

import ctypes

import llama_cpp as lc
from protocol import serve

TYPES = {"f16": lc.GGML_TYPE_F16, "f32": lc.GGML_TYPE_F32}
SILENT = lc.llama_log_callback(lambda level, text, data: None)
FLASH = {"auto": lc.LLAMA_FLASH_ATTN_TYPE_AUTO, "off": lc.LLAMA_FLASH_ATTN_TYPE_DISABLED}


def make_context(model, job, sequences: int):
    """A context with room for every document's prefix and thoughts."""
    params = lc.llama_context_default_params()
    prefix, new = len(job["documents"][0]), max(map(max, job["lengths"]))
    params.kv_unified = job["unified"]  # one buffer whose cells sequences share, or a buffer a sequence
    shared, own = len(job["documents"]) * prefix, sequences * new
    cells = shared + own if job["unified"] else sequences * (-(-(prefix + new) // 256) * 256)
    params.n_ctx = -(-cells // 256) * 256
    params.n_batch = max(shared, sequences)
    params.n_ubatch = job["ubatch"]
    params.n_seq_max = sequences
    params.n_threads = params.n_threads_batch = job["threads"]
    params.type_k = params.type_v = TYPES[job["cache"]]
    params.flash_attn_type = FLASH[job["flash"]]
    context = lc.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama_init_from_model failed")
    return context


def make_sampler(temperature: float, seed: int):
    chain = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
    lc.llama_sampler_chain_add(chain, lc.llama_sampler_init_temp(temperature))
    lc.llama_sampler_chain_add(chain, lc.llama_sampler_init_dist(seed))
    return chain


def fill(batch, rows) -> None:
    """rows: (token, position, sequence, whether its logits are wanted)."""
    batch.n_tokens = len(rows)
    for i, (token, position, sequence, wanted) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
        batch.seq_id[i][0] = sequence


def prepare(job):
    lc.llama_log_set(SILENT, ctypes.c_void_p(0))
    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(job["gguf"].encode(), lc.llama_model_default_params())
    group, lengths = job["group"], [length for row in job["lengths"] for length in row]
    context = make_context(model, job, len(lengths))
    memory = lc.llama_get_memory(context)
    samplers = [make_sampler(job["temperature"], seed) for seed in range(len(lengths))]
    batch = lc.llama_batch_init(lc.llama_n_batch(context), 0, 1)
    prefix = len(job["documents"][0])

    def decode(rows):
        fill(batch, rows)
        if code := lc.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code}")

    def read_documents():
        lc.llama_memory_clear(memory, True)
        rows = [
            (token, position, b * group, position == prefix - 1)
            for b, document in enumerate(job["documents"])
            for position, token in enumerate(document)
        ]
        decode(rows)

    def last(b):  # a document's last token in the batch
        return (b + 1) * prefix - 1

    def run():
        read_documents()
        for r in range(len(lengths)):
            if r % group:
                lc.llama_memory_seq_cp(memory, r - r % group, r, -1, -1)
        tokens = [lc.llama_sampler_sample(samplers[r], context, last(r // group)) for r in range(len(lengths))]
        made, live = len(lengths), [r for r, length in enumerate(lengths) if length > 1]
        step = 1
        while live:
            decode([(tokens[r], prefix + step - 1, r, True) for r in live])
            for i, r in enumerate(live):
                tokens[r] = lc.llama_sampler_sample(samplers[r], context, i)
            made, step = made + len(live), step + 1
            live = [r for r in live if lengths[r] > step]
        return made

    read_documents()
    entries = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
    rows = [lc.llama_get_logits_ith(context, last(b))[:entries] for b in range(len(job["documents"]))]
    facts = {"llama_cpp_python": lc.__version__, "weights": job["gguf"].rsplit("/", 1)[-1]}
    return run, {"next": [max(range(entries), key=row.__getitem__) for row in rows], **facts}


if __name__ == "__main__":
    serve(prepare)

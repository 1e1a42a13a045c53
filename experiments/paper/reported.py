# SPDX-License-Identifier: Apache-2.0
"""The paper's own numbers (arXiv 2510.01265), as far as this repository quotes them, by table or figure. In percent."""

# Table 1, Qwen3-1.7B-Base, Overall: (after the arm, after SFT and RLVR).
TABLE_1 = {"base": (30.32, 39.34), "cpt_tokens": (30.85, 39.90), "rlp": (36.03, 42.51)}
# Table 2, Nemotron-Nano-12B-v2, Overall, likewise.
TABLE_2 = {"base": (42.81, 65.31), "rlp": (61.32, 68.09)}
# Table 3: budget: (RPT, RLP).
TABLE_3 = {"tokens": (41.69, 43.35), "flops": (35.68, 42.86)}
# Table 4, 170M tokens, Overall; RLP's is the range over six corpora.
TABLE_4 = {"base": 34.19, "cpt_tokens": 35.01, "cpt_flops": 38.04, "rlp": (41.43, 43.36)}
FIGURE_2A = {4: 41.38, 8: 41.95, 16: 42.17, 32: 41.75}  # rollouts G
FIGURE_2B = {64: 11.50, 128: 9.96, 256: 14.08, 512: 24.65, 1024: 38.89, 2048: 42.17, 4096: 42.21}  # thought length
FIGURE_2C = {0.0: 42.17, 1e-4: 41.35, 1e-3: 41.44}  # coefficient of the KL term
TABLE_S6 = {0.99: 38.82, 0.995: 39.21, 0.999: 39.54, 0.9995: 39.20}  # tau of the moving average
# Table S.8, perplexity, from the first figure to the second.
TABLE_S8 = {"CrossThink": (2.91, 2.36), "WikiText-103": (5.83, 4.48)}

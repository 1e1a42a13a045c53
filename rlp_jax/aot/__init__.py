# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation for TPU pods on a machine without a TPU: does it fit, what does it move and cost."""

"""RLP, reinforcement as a pretraining objective, in JAX."""

"""Parameters and FLOPs of the Transformer, from its config alone. No TensorFlow.

FLOPs per token of one training step (forward and backward) are `6N + 12·L·d·T` (PaLM, arXiv:2204.02311, appendix B):
N is the number of parameters that take part in a matrix product (all but the position table and, when it is not tied
to the output, the input embedding), L layers, d model dim, T sequence length. The attention term counts the full T x T
matrix, as the common formula does, although half of it is masked.
"""

from tfdist.config import ModelConfig


def head_dim(config: ModelConfig) -> int:
    return config.model_dim // config.num_heads


def kv_heads(config: ModelConfig) -> int:
    return config.num_kv_heads or config.num_heads


def mlp_dim(config: ModelConfig) -> int:
    return config.mlp_dim or 4 * config.model_dim


def num_parameters(config: ModelConfig, sequence_length: int) -> int:
    dim, bias = config.model_dim, int(config.use_bias)
    kv_dim = kv_heads(config) * head_dim(config)
    attention = sum(dim * out + bias * out for out in (dim, kv_dim, kv_dim, dim))
    hidden = mlp_dim(config)
    num_in = 2 if config.activation == "swiglu" else 1
    mlp = num_in * (dim * hidden + bias * hidden) + hidden * dim + bias * dim
    norm = 2 * dim if config.norm == "layer" else dim
    embeddings = config.vocab_size * dim * (1 if config.tie_embeddings else 2)
    positions = sequence_length * dim if config.positions == "learned" else 0
    return config.num_layers * (attention + mlp + 2 * norm) + norm + embeddings + positions


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of forward and backward for one token at training sequence length T."""
    idle = sequence_length * config.model_dim if config.positions == "learned" else 0
    if not config.tie_embeddings:
        idle += config.vocab_size * config.model_dim
    matmul_parameters = num_parameters(config, sequence_length) - idle
    return 6 * matmul_parameters + 12 * config.num_layers * config.model_dim * sequence_length

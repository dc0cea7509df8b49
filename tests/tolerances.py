"""Every tolerance of the tests, with its reason."""

# Largest error over the largest expected magnitude, by the dtype of the result, of a Metal kernel under the emulator
# against the float64 oracle. Sums of up to a few thousand float32 products; half precision rounds the result once.
METAL = {
    "float32": 5e-6,
    "float16": 2**-10,
    "bfloat16": 2**-7,
    # scores of 1000 and more are known to 1e-4 in float32, and so are their exponentials
    "large_scores": 1e-3,
}

# Encoding in float32 against the oracle's float64: shares of differing bytes (a code is decided otherwise where
# rounding crosses a threshold; a trellis path may have an equally good neighbour), and the excess of squared error.
METAL_ENCODE = {
    "differing_bytes_scalar": 2e-3,
    "differing_bytes_trellis": 2e-2,
    "differing_scales": 0.05,
    "squared_error": 1e-4,
    "refined_error": 1e-3,
    "shaped_error": 2e-2,
}

# CUDA against float64 over the same pages, norm of the error over norm of the result. Queries and weights are 16-bit
# fixed point inside the kernels (about 1e-4); half precision rounds the result once more. Scores: largest error
# in nats per unit of the largest score.
CUDA_ATTENTION = {"float32": 5e-4, "float16": 1e-3, "bfloat16": 4e-3}
CUDA_LSE = 2e-3
CUDA_SCORES = 2e-4
# Scores of 50 nats and more carry 50 times the relative error of a query's 16 bits.
CUDA_PEAKED = 4e-3
# Keys, values and queries in float16 under flash attention.
CUDA_PREFILL = 2e-3
# The same in MLX, whose products of float32 keep 11 bits of each factor on tensor cores.
MLX_CUDA_PREFILL = 6e-3
CUDA_PREFILL_LSE = 1e-2
# Two parts joined with weights in float32, rounded to the dtype.
CUDA_MERGE = {"float32": 3e-6, "float16": 6e-4, "bfloat16": 5e-3}
CUDA_MERGE_LSE = 1e-5
# decode_pages in float32: scales and rotation in float32.
CUDA_DECODE = {"float32": 3e-6, "float16": 6e-4, "bfloat16": 5e-3}
# encode in float32 against the oracle in float64: near-ties of a level choice go the other way. Share of differing
# codes of a scalar code; relative difference of the squared error that a whole side leaves.
CUDA_CODES_DIFFER = 1e-3
# The trellis search tries one seam of the circle, not all, with costs in float16.
CUDA_ENCODE_LOSS = 2e-2
# The same where keys and values are refined and keys fed back: fixed multiples instead of each vector's own, one
# multiple for values on paths, and errors that are fed back before the path is known.
# Of one page, where chance alone makes 3 %; over many pages keys lose about 1.5 % and values on paths 2.5 %.
CUDA_REFINED_KEYS = 0.06
CUDA_REFINED_VALUES = 0.07

# Largest logit error over the largest logit, float32 models of random weights.
HF = {
    # the same sums in another order, through a few layers
    "same_values": 1e-4,
    # a code of a later layer at a tie goes to the other level by any other rounding, which moves logits by a per cent
    "codes": 0.05,
}

# CPU kernels against the float64 oracle over the same pages: largest error over the largest magnitude of the result.
# Inside, queries and weights are 15- or 16-bit fixed point; a half-precision result is rounded once more.
CPU_ATTENTION = {"float32": 3e-4, "float16": 2**-10, "bfloat16": 2**-7}
# Log-sum-exp in nats, for scores up to a few tens: 15-bit queries move a score by a few 1e-5.
CPU_LSE = 3e-4
# Scores and value sums, error over the largest magnitude.
CPU_SCORES = 1e-4
CPU_SUMS = 2e-4
# decode_pages in float32 (scale times level, then the rotation), error over the largest magnitude; half precision
# rounds once more.
CPU_DECODE = {"float32": 1e-6, "float16": 2**-11, "bfloat16": 2**-8}
# encode in float32 against the oracle in float64: a value at a threshold, or a path with an equal twin, may go the
# other way. Share of bytes that differ, and relative excess of squared error.
CPU_ENCODE_BYTES = 5e-3
CPU_ENCODE_LOSS = 1e-4
# The same where each vector is coded at several scales and the best by one measure is kept: near-ties of candidates.
CPU_REFINED_LOSS = 3e-3
# The same of a single page of one or two heads, where one near-tie is a larger share.
CPU_ENCODE_PAGE_LOSS = 2e-2
# merge of two float32 results against the whole.
MERGE = 1e-5

# Published Lloyd-Max levels have four digits (Max 1960, table I).
PUBLISHED_LEVELS = 5e-4
PUBLISHED_MSE = 5e-4
# Rounding of a codebook to int8 may cost this share of its squared error.
INT8_CODEBOOK_LOSS = 2e-3
# Float64 against float64.
EXACT = 1e-10
# float32 matrices that should be orthogonal or inverse to each other.
ORTHOGONAL = 1e-5

# MLX arrays in host memory, through the native CPU kernels, against the float64 oracle: largest error over the largest
# expected magnitude, by the dtype of the result; and the share of bytes that encoding in float32 decides otherwise.
MLX_CPU = {"float32": 2e-4, "float16": 1e-3, "bfloat16": 8e-3, "differing_bytes": 3e-3}
# Log-probabilities of models in float32 whose packed layers ran on the native kernels, against stock layers of
# decoded values.
MLX_MODEL = 2e-2

# Levels printed to four digits (Max 1960).
LLOYD_MAX = 6e-4
# Trained levels against their int8 rounding: half a step of 2.4 / 127, and the seed's own digits.
TRELLIS_LEVELS = 0.0105
# float32 matrices applied in float64, per channel.
TRANSFORM = 2e-6
# Largest difference over the largest logit between SmolLM2 in mlx-lm and in transformers, both in float32: where all
# tokens are exact, and with packed ones, where a key on the edge between two codes may fall either way.
MLX_STOCK = 1e-4
MLX_SMOLLM2 = 2e-2

# Relative squared error of keys and values of N(0, 1): the codes' own (Lloyd-Max, or the trellis), a few per cent for
# the 8 bits of the mean row and of the scales, and 10 per cent for 64 tokens' chance.
PRESET_ERROR = {"balanced": (0.028, 0.040), "small": (0.105, 0.105), "fidelity": (0.012, 0.028)}
# A path that starts where two laps say, against one that starts where all starts were tried: squared error.
START_SEARCH = 1.02
# Error of refined encoding in float32 against the oracle in float64, per page: any rounding can send a search down
# another branch, as good on average.
ENCODE_LIKE_REFERENCE = 0.04
# KL on a canary model over the plain model's: 1.2 over thousands of positions; here are a few hundred.
CANARY = 1.6
# Bytes of a CUDA kernel's stack. None is the aim; the largest is decode attention at head_dim 512, at 128 it is 56.
CUDA_STACK_BYTES = 96
# Energies read off weights through a norm, whose epsilon of 1e-5 shortens the probe.
NORM_EPSILON = 3e-5
# KL of 3 bits on models of random weights, whose attention is spread over hundreds of tokens.
HEAD_256 = 0.01
SINK_LOGITS = 0.01
# Shares of the softmax mass: float32 sums of a page, float64 over pages.
SPARSE_MASS = 2e-6

# Logits of tokens drawn in a batch, under the largest of the same row alone, in standard deviations of the logits:
# matrix products round by batch size, and where a rounded key lies on the border of two codes, the code changes.
SERVED_LOGITS = 0.1
# Parts of an attention merged in float64.
MERGE_DOUBLE = 1e-12

# vLLM, SmolLM2 in float32 over 1,024 tokens of Genesis: KL over the likeliest tokens against vLLM's own cache (and of a
# prompt read anew against one whose prefix was cached), share of equal top tokens.
VLLM = {"kl": 0.03, "same_top": 0.9}
# vLLM, small models with random weights, preset fidelity over 700 tokens read in chunks of 256: share of top tokens
# that are those of vLLM's own cache (seen: 0.57 to 0.90; of predictions of an unrelated text 0.003).
VLLM_RANDOM_SAME_TOP = 0.45
# The same on CUDA: exponentials to 2^-22, sums of fixed point.
CUDA_SPARSE_MASS = 1e-5
# RoPE frequencies and rotations that a model computes in float32.
ROPE_FLOAT32 = 1e-6

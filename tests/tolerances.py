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
}

# CUDA against float64 over the same pages, norm of the error over norm of the result. Queries and weights are 16-bit
# fixed point inside the kernels (about 1e-4); half precision rounds the result once more. Scores: largest error
# in nats per unit of the largest score.
CUDA_ATTENTION = {"float32": 5e-4, "float16": 1e-3, "bfloat16": 4e-3}
CUDA_LSE = 2e-3
CUDA_SCORES = 2e-4
# decode_pages in float32: scales and rotation in float32.
CUDA_DECODE = {"float32": 3e-6, "float16": 6e-4, "bfloat16": 5e-3}
# encode in float32 against the oracle in float64: near-ties of a level choice go the other way. Share of differing codes of a
# scalar code; relative difference of the squared error that a whole side leaves.
CUDA_CODES_DIFFER = 1e-3
CUDA_ENCODE_LOSS = 2e-3

# Largest logit error over the largest logit, float32 models of random weights.
HF = {
    # the same sums in another order, through a few layers
    "same_values": 1e-4,
    # a code of a later layer at a tie goes to the other level by any other rounding, which moves logits by a per cent
    "codes": 0.05,
}

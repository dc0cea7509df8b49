"""Every tolerance of the tests, with its reason."""

# Largest error over the largest expected magnitude, by the dtype of the result, of a Metal kernel under the emulator
# against the float64 oracle. Sums of up to a few thousand float32 products; half precision rounds the result once.
METAL = {
    "float32": 5e-6,
    "float16": 2**-10,
    # scores of 1000 and more are known to 1e-4 in float32, and so are their exponentials
    "large_scores": 1e-3,
}

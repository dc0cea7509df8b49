"""Decode attention beside the fastest attention of torch in the same run: `forgeattn bench decode` by another name.

python benchmarks/bench_decode_attention.py --device cpu --json benchmarks/results/decode_attention-cpu-DATE.json
"""

import sys

from forgeattention.tools.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "decode", *sys.argv[1:]]))

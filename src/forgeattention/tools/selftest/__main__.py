"""One step of `forgeattn selftest`, in its own process."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from ...util.files import write_json


def found_by(asked: dict[str, Any]) -> dict[str, Any]:
    """The result of a step; what it raised is a failure with a reason."""
    from .arrays import Skipped

    try:
        if asked["step"] == "ops":
            from . import oracle

            return oracle.run(asked)
        from . import model, speed

        return {"decode": speed.run, "needles": model.needles, "generation": model.generation}[asked["step"]](asked)
    except Skipped as reason:
        return {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:2000]}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    write_json(Path(asked["out"]), found_by(asked))

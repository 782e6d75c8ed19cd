"""States of environments as checkpoints keep them."""

import json
from typing import Any

import numpy as np


def through_files(state: Any, arrays: dict[str, np.ndarray]) -> Any:
    """A state as a checkpoint keeps it: arrays apart, the rest as JSON text."""

    def split(value: Any) -> Any:
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            return {key: split(item) for key, item in value.items()}
        if isinstance(value, list):
            return [split(item) for item in value]
        if isinstance(value, np.ndarray):
            arrays[str(len(arrays))] = value.copy()
            return {"array": str(len(arrays) - 1)}
        return value

    def join(value: Any) -> Any:
        if isinstance(value, dict):
            if "array" in value:
                return arrays[value["array"]]
            return {key: join(item) for key, item in value.items()}
        return [join(item) for item in value] if isinstance(value, list) else value

    return join(json.loads(json.dumps(split(state))))

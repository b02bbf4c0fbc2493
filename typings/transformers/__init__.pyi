# For pyright, which would otherwise read all models of transformers, three thousand files, at each check.
from typing import Any

def __getattr__(name: str) -> Any: ...

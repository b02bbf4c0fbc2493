# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from .upload import upload_folder


__all__ = ["upload_folder"]

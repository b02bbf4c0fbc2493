# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from .upload import open_repo, upload_folder


__all__ = ["open_repo", "upload_folder"]

# SPDX-License-Identifier: Apache-2.0
"""A Space that shows an AGE-VLM: the app of `agevlm app`, on whatever hardware the Space has.

The variable AGEVLM_MODEL of the Space, or the first of `models` in README.md, is the model.
"""

import os
from pathlib import Path

try:
    import spaces  # before torch, which it prepares for ZeroGPU
except ImportError:  # not on a Space
    gpu = None
else:
    gpu = spaces.GPU  # without effect on other hardware than ZeroGPU

from huggingface_hub import metadata_load

from agevlm.inference import load_model
from agevlm.serving import Batcher
from agevlm.serving.app import Sessions, build_app, launch

MODEL = os.environ.get("AGEVLM_MODEL") or metadata_load(Path(__file__).with_name("README.md"))["models"][0]

model, processor = load_model(MODEL)
# Its thread begins with the first question, in the process that has the GPU.
demo = build_app(Batcher(model, processor), Sessions(model, processor), title=Path(MODEL).name, gpu=gpu)

if __name__ == "__main__":
    launch(demo)

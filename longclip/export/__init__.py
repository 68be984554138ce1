"""A trained model for everybody else: open_clip, transformers, diffusers, LLaVA, ComfyUI, onnxruntime.

    export_model("runs/demo", "exports/demo", "hf")     # files, a check by the library itself, a model card
    import_weights("longclip-B.pt", "models/longclip-B")

An export holds a plain dual encoder: split position tables are merged, training-only settings dropped.
What a format cannot express is refused with the whole list, before anything is written; what was written is
opened by its library in a process without longclip and must give the same ids and features.

`model` what is exported · `openclip`, `huggingface`, `vocabulary`, `onnx_graphs` the formats · `formats`
their list · `parity`, `reader` the check · `facts`, `snippets`, `card` what is said about it · `push` to a
hub, when asked
"""

from .exporting import export_model, write
from .formats import FORMATS
from .importing import import_weights
from .model import DTYPES

__all__ = ["DTYPES", "FORMATS", "export_model", "import_weights", "write"]

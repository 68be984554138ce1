"""How each format is opened, as it stands in model cards; CONTEXT is the length in tokens.

They are run by a test, with DIR a folder and photo.jpg a picture.
"""

from __future__ import annotations

_OPEN_CLIP = """
import open_clip, torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIR")
tokenizer = open_clip.get_tokenizer("local-dir:DIR")  # CONTEXT tokens
model.eval()
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("photo.jpg"))[None], normalize=True)
    text = model.encode_text(tokenizer(["a long description ..."]), normalize=True)
print(image @ text.T)
"""

_HF = """
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("DIR").eval(), CLIPProcessor.from_pretrained("DIR")
text, options = ["a long description ..."], {"padding": True, "truncation": True, "return_tensors": "pt"}
inputs = processor(text=text, images=Image.open("photo.jpg"), **options)
with torch.no_grad():
    print(model(**inputs).logits_per_image)
"""

_HF_VISION = """
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModel  # what LLaVA's mm_vision_tower=DIR loads

tower, processor = CLIPVisionModel.from_pretrained("DIR").eval(), CLIPImageProcessor.from_pretrained("DIR")
pixels = processor(Image.open("photo.jpg"), return_tensors="pt")["pixel_values"]
with torch.no_grad():
    print(tower(pixels, output_hidden_states=True).hidden_states[-2].shape)
"""

_HF_TEXT = """
import torch
from transformers import AutoTokenizer, CLIPTextModel

tokenizer, encoder = AutoTokenizer.from_pretrained("DIR"), CLIPTextModel.from_pretrained("DIR").eval()
# StableDiffusionPipeline.from_pretrained(SD15, tokenizer=tokenizer, text_encoder=encoder)
ids = tokenizer(["a long prompt ..."], padding="max_length", truncation=True, return_tensors="pt").input_ids
with torch.no_grad():
    print(encoder(ids).last_hidden_state.shape)  # [1, CONTEXT, width]
"""

_CLIP_L = (
    "Put `clip_l.safetensors` into ComfyUI's `models/text_encoders/` and choose it in a CLIP loader node."
)

_ONNX = """
import numpy as np, onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("DIR/tokenizer.json")  # cuts and pads to CONTEXT tokens
ids = np.array([caption.ids for caption in tokenizer.encode_batch(["a long description ..."])])
text = onnxruntime.InferenceSession("DIR/text.onnx").run(None, {"input_ids": ids})[0]
print(text.shape)  # L2-normalised; image.onnx takes pixel_values as preprocessor_config.json makes them
"""


def _python(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


SNIPPETS = {
    "open_clip": _python(_OPEN_CLIP),
    "hf": _python(_HF),
    "hf-vision": _python(_HF_VISION),
    "hf-text": _python(_HF_TEXT),
    "clip_l": _CLIP_L,
    "onnx": _python(_ONNX),
}

"""Sentences by Florence-2 (Xiao et al. 2024, arXiv:2311.06242), through transformers' own classes: no code comes with the model."""

from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import Florence2ForConditionalGeneration, Florence2Processor

from sdlora.captioner import Captioner

MODEL = "florence-community/Florence-2-base"
FILES = ("*.json", "*.txt", "*.safetensors")
TASK = "<DETAILED_CAPTION>"
BEAMS, MOST_TOKENS = 3, 256


class Florence2(Captioner):
    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        transformers.utils.logging.disable_progress_bar()
        self.processor = Florence2Processor.from_pretrained(folder)
        model, found = Florence2ForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        if found["missing_keys"]:  # transformers would go on with random numbers in their place
            raise ValueError(f"it lacks weights, such as {min(found['missing_keys'])}; models in the first layout need converting")
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def caption(self, path: Path, picture: Image.Image) -> str:
        asked = self.processor(images=picture, text=TASK, return_tensors="pt").to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**asked, max_new_tokens=MOST_TOKENS, num_beams=BEAMS, do_sample=False)
        text: str = self.processor.batch_decode(tokens, skip_special_tokens=True)[0]
        return text


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> Captioner:
    return Florence2(folder, device, dtype)

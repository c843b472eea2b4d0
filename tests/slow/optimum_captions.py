"""Captions images by Optimum, as docs/browser.md does: python optimum_captions.py EXPORTED_FOLDER IMAGE...

Prints a JSON object: captions by number of beams. Optimum's optimum-onnx 0.1.0 requires transformers 4.57.
"""

import json
import sys

from optimum.onnxruntime import ORTModelForVision2Seq
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor


folder, *images = sys.argv[1:]
model = ORTModelForVision2Seq.from_pretrained(folder)
tokenizer, processor = AutoTokenizer.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)
pixel_values = processor([Image.open(image) for image in images], return_tensors="pt").pixel_values
captions = {}
for num_beams in (1, 3):
    tokens = model.generate(pixel_values, num_beams=num_beams)
    captions[num_beams] = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
print(json.dumps(captions))

"""The image processor of a TinyCap repository in Pillow and numpy, equal to the last bit.

`CLIPImageProcessor` on Pillow is what it equals (transformers' choice where torchvision isn't installed).
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image


# What else a `preprocessor_config.json` may say, where it asks for nothing that this file doesn't do.
NEUTRAL = {"do_pad": (None, False), "pad_size": (None,), "input_data_format": (None,), "do_convert_rgb": (None, True)}
DESCRIPTIVE = {"image_processor_type", "processor_class", "data_format", "return_tensors", "default_to_square"}
STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize"}
HONOURED = STEPS | {"size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std"}


class ImagePreprocessor:
    """RGB images -> pixel values, by the settings of a `preprocessor_config.json`.

    Args:
        config: the content of that file.

    Raises:
        ValueError: the config asks for something that this preprocessor doesn't do; names it.
    """

    def __init__(self, config: dict):
        kind = config.get("image_processor_type", "CLIPImageProcessor")
        if kind.removesuffix("Fast").removesuffix("Pil") != "CLIPImageProcessor":
            raise ValueError(f"image_processor_type: expected CLIPImageProcessor, got {kind}")
        for name, value in config.items():
            if name in NEUTRAL and value not in NEUTRAL[name]:
                raise ValueError(f"preprocessor config: expected {name} {NEUTRAL[name][-1]}, got {value}")
            if name not in HONOURED | DESCRIPTIVE | set(NEUTRAL) and value is not None:
                raise ValueError(f"preprocessor config: {name}={value} isn't supported without transformers")
        for name in STEPS:
            if not config.get(name, True):
                raise ValueError(f"preprocessor config: expected {name} true, got {config[name]}")
        size, crop = config.get("size", {"shortest_edge": 224}), config.get("crop_size", 224)
        self.shortest_edge = size.get("shortest_edge") if isinstance(size, dict) else size
        crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
        self.crop_height, self.crop_width = crop["height"], crop["width"]
        if self.shortest_edge is None or max(self.crop_height, self.crop_width) > self.shortest_edge:
            raise ValueError(
                "preprocessor config: expected a shortest_edge that is no shorter than the crop "
                f"{self.crop_height}x{self.crop_width}, got size {size}"
            )
        self.resample = Image.Resampling(config.get("resample", Image.Resampling.BICUBIC))
        # A byte has 256 values: what becomes of each in each channel is computed once, in the processor's own types.
        scaled = (np.arange(256, dtype=np.float64) * config.get("rescale_factor", 1 / 255)).astype(np.float32)
        means, stds = (np.array(config[name], dtype=np.float32) for name in ("image_mean", "image_std"))
        self.values = [(scaled - mean) / std for mean, std in zip(means, stds)]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImagePreprocessor":
        return cls(json.loads((Path(folder) / "preprocessor_config.json").read_text(encoding="utf-8")))

    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        """RGB images of any sizes -> (B, 3, crop height, crop width), float32."""
        pixel_values = np.empty((len(images), len(self.values), self.crop_height, self.crop_width), np.float32)
        for image, target in zip(images, pixel_values):
            pixels = np.asarray(self._resize_and_crop(image))
            for channel, values in enumerate(self.values):
                np.take(values, pixels[..., channel], out=target[channel])
        return pixel_values

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        shortest, longest = sorted((width, height))
        longest = int(self.shortest_edge * longest / shortest)
        size = (self.shortest_edge, longest) if width <= height else (longest, self.shortest_edge)
        image = image.resize(size, self.resample)
        left, top = (size[0] - self.crop_width) // 2, (size[1] - self.crop_height) // 2
        return image.crop((left, top, left + self.crop_width, top + self.crop_height))

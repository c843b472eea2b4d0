"""A Gradio Space that captions photos with a TinyCap; the variable TINYCAP_MODEL is its repository's name or folder."""

import os

import gradio as gr
from transformers import pipeline


captioner = pipeline("image-to-text", model=os.environ.get("TINYCAP_MODEL", "."), trust_remote_code=True)


def caption(image, threshold):
    if image is None:
        raise gr.Error("Choose a photo first.")
    (found,) = captioner(image, return_confidence=True)
    is_sure = found["confidence"] >= threshold
    return found["generated_text"] if is_sure else "Not sure", round(found["confidence"], 2)


inputs = [gr.Image(type="pil", label="Photo"), gr.Slider(0, 0.9, 0.3, step=0.05, label="Not sure below")]
outputs = [gr.Textbox(label="Caption"), gr.Number(label="Probability that it is right")]
demo = gr.Interface(caption, inputs, outputs, title="TinyCap", flagging_mode="never")

if __name__ == "__main__":
    demo.launch()
